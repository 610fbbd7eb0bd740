"""`lightning-attention generate`: text from a trained model."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TextIO

from typer import Option


def generate(
    checkpoint: Annotated[Path, Option(help="A checkpoint, or the output folder of a run.")],
    prompt: Annotated[str | None, Option(help="Text to go on from. By default standard input.")] = None,
    prompts: Annotated[
        Path | None,
        Option(
            help="A .jsonl file instead: lines with a text `prompt`, and options of their own (max_new_tokens, "
            "temperature, ..., and stop: a text or texts that end the answer). Answered many at a time."
        ),
    ] = None,
    output: Annotated[
        Path | None, Option(help="With --prompts, a .jsonl file for the answers. By default standard output.")
    ] = None,
    max_requests: Annotated[int, Option(help="With --prompts, how many are answered at a time.")] = 64,
    prefix_slots: Annotated[
        int, Option(help="With --prompts, states to keep so that a beginning they have in common is read once.")
    ] = 16,
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

    from ..inference import Engine, SamplingOptions, load, stream
    from ..inference.batch import answer_lines

    disable_progress_bar()
    options = SamplingOptions(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    if prompts is None:
        if output is not None:
            raise ValueError("--output goes with --prompts")
        model, tokenizer = load(checkpoint, bf16=bf16)
        text_so_far = sys.stdin.read() if prompt is None else prompt
        sys.stdout.write(text_so_far)
        for text in stream(model, tokenizer, text_so_far, options):
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return
    if prompt is not None:
        raise ValueError("give --prompt or --prompts, not both")
    if output is not None and output.exists() and output.samefile(prompts):
        raise ValueError("--output would overwrite --prompts")
    with prompts.open() as lines:
        count = sum(1 for line in lines if line.strip())
    model, tokenizer = load(checkpoint, bf16=bf16)
    engine = Engine(model, max_requests=max_requests, prefix_slots=prefix_slots)
    with prompts.open() as lines, _written_to(output) as file:
        failed = 0
        for answer in _with_progress(answer_lines(engine, tokenizer, lines, options), count):
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")
            file.flush()
            failed += "error" in answer
    if failed:
        print(f"{failed} of {count} lines could not be answered: their `error` says why", file=sys.stderr)


@contextmanager
def _written_to(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
    else:
        with path.open("w") as file:
            yield file


def _with_progress(answers: Iterator[dict], count: int) -> Iterator[dict]:
    """The same, with a bar on standard error."""
    from rich.console import Console
    from rich.progress import track

    yield from track(answers, "answering", total=count, console=Console(stderr=True))
