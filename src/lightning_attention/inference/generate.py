"""From a checkpoint to a stream of text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer

from ..models import LightningForCausalLM
from ..models.checkpoint import last_checkpoint, load_model


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: tokens to write, at most.
        temperature: 0 takes the likeliest token.
        top_k: sample from the k likeliest; 0 is all.
        top_p: sample from the likeliest of this total probability.
        repetition_penalty: above 1 avoids what was there already.
        seed: makes sampling repeatable.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")

    def for_generate(self) -> dict[str, Any]:
        """As arguments of transformers' generate()."""
        common = {"max_new_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}
        if self.temperature == 0:
            return common | {"do_sample": False}
        sampling = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return common | {"do_sample": True} | sampling


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
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise ValueError("the prompt is empty, and the tokenizer has no token for the beginning of a document")
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
