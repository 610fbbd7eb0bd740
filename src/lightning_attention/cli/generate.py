"""`lightning-attention generate`: text from a trained model."""

import sys
from pathlib import Path
from typing import Annotated

from typer import Option


def generate(
    checkpoint: Annotated[Path, Option(help="A checkpoint, or the output folder of a run.")],
    prompt: Annotated[str | None, Option(help="Text to go on from. By default standard input.")] = None,
    max_new_tokens: Annotated[int, Option(help="Tokens to write, at most.")] = 256,
    temperature: Annotated[float, Option(help="0 takes the likeliest token every time.")] = 1.0,
    top_k: Annotated[int, Option(help="Sample from the k likeliest tokens; 0 is all.")] = 0,
    top_p: Annotated[float, Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    repetition_penalty: Annotated[float, Option(help="Above 1 avoids what was there already.")] = 1.0,
    seed: Annotated[int | None, Option(help="Makes sampling repeatable.")] = None,
    bf16: Annotated[bool, Option("--bf16", help="Run in bfloat16.")] = False,
) -> None:
    """Write text token by token, in constant memory, however long it gets."""
    from transformers.utils.logging import disable_progress_bar

    from ..inference import SamplingOptions, load, stream

    disable_progress_bar()
    options = SamplingOptions(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    model, tokenizer = load(checkpoint, bf16=bf16)
    text_so_far = sys.stdin.read() if prompt is None else prompt
    sys.stdout.write(text_so_far)
    for text in stream(model, tokenizer, text_so_far, options):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
