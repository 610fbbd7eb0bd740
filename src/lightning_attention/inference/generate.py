"""From a checkpoint to a stream of text."""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer

from ..models import LightningForCausalLM
from ..models.checkpoint import last_checkpoint, load_model
from .sampling import SamplingOptions


def load(checkpoint: Path, *, bf16: bool = False) -> tuple[LightningForCausalLM, PreTrainedTokenizerFast]:
    """The model and tokenizer of a checkpoint, on the GPU if there is one.

    Args:
        checkpoint: a folder with a model, or the output folder of a run, whose last checkpoint is taken.
        bf16: weights in bfloat16; decays and states stay float32.

    Raises:
        ValueError: there is no checkpoint, it is not one of this library, or its weights do not fit its configuration.
    """
    folder = last_checkpoint(checkpoint)
    model: Any = load_model(folder, torch.bfloat16 if bf16 else torch.float32)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"{folder} holds no tokenizer: {error}") from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """The tokens of a prompt, as the model has learned that documents begin.

    Raises:
        ValueError: there is none, since the prompt is empty and the tokenizer has no token for a beginning.
    """
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise ValueError("the prompt is empty, and the tokenizer has no token for the beginning of a document")
    return ids


def stream(
    model: LightningForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, options: SamplingOptions
) -> Iterator[str]:
    """The continuation of a prompt, piece by piece as it is written.

    Args:
        model: as `load` returns it.
        tokenizer: likewise.
        prompt: may be empty where the tokenizer has a token for the beginning of a document.
        options: how tokens are chosen.

    Raises:
        ValueError: the prompt is empty and the tokenizer has no such token.
    """
    ids = encode(tokenizer, prompt)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    inputs = torch.tensor([ids], device=model.device)
    failure: list[BaseException] = []
    untyped: Any = model  # transformers types generate() for a protocol that its own models do not satisfy

    def work() -> None:
        try:
            untyped.generate(inputs, streamer=streamer, **options.for_generate())
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]
