"""How the next token is chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
        for name in ("max_new_tokens", "top_k", "seed"):
            if type(value := getattr(self, name)) is not int and not (name == "seed" and value is None):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        for name in ("temperature", "top_p", "repetition_penalty"):
            if type(value := getattr(self, name)) not in (int, float):
                raise ValueError(f"{name} must be a number, got {value!r}")
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


class Sampler:
    """Chooses the tokens of one sequence; `choose` does it for many at once.

    Random numbers are each sequence's own, so that what it writes does not depend on which others it is decoded with.

    Args:
        options: of the sequence.
        prompt: its tokens so far.
        vocab_size: number of tokens.
        device: where logits will be.
    """

    def __init__(self, options: SamplingOptions, prompt: Sequence[int], vocab_size: int, device: torch.device):
        self.options = options
        self._generator = torch.Generator("cpu")
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)
        self.seen: Tensor | None = None
        if options.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(prompt, device=device)] = True

    def random(self) -> float:
        return torch.rand((), generator=self._generator, dtype=torch.float64, device="cpu").item()


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of every row of `logits` `[B, vocab_size]`.

    In the order of transformers' generate(): repetition penalty, temperature, top k, top p.
    """
    logits = _penalized(logits.float(), samplers)
    tokens = logits.argmax(dim=-1)
    rows = [row for row, sampler in enumerate(samplers) if sampler.options.temperature > 0]
    if rows:
        drawing = [samplers[row] for row in rows]
        index = torch.tensor(rows, device=logits.device)
        tokens[index] = _draw(logits[index], drawing)
    chosen = tokens.tolist()
    for token, sampler in zip(chosen, samplers, strict=True):
        if sampler.seen is not None:
            sampler.seen[token] = True
    return chosen


def _penalized(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Logits of tokens that were there already: divided by the penalty where above 0, multiplied below."""
    rows = [row for row, sampler in enumerate(samplers) if sampler.seen is not None]
    if not rows:
        return logits
    index = torch.tensor(rows, device=logits.device)
    seen = torch.stack([seen for row in rows if (seen := samplers[row].seen) is not None])
    penalty = _column([samplers[row].options.repetition_penalty for row in rows], logits)
    x = logits[index]
    return logits.index_copy(0, index, torch.where(seen, torch.where(x > 0, x / penalty, x * penalty), x))


def _draw(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    options = [sampler.options for sampler in samplers]
    logits = logits / _column([x.temperature for x in options], logits)
    if any(x.top_k or x.top_p < 1 for x in options):
        ranked, order = logits.sort(dim=-1, descending=True)
        rank = torch.arange(logits.shape[1], device=logits.device)
        top_k = _column([x.top_k or logits.shape[1] for x in options], logits)
        ranked = ranked.masked_fill(rank >= top_k, float("-inf"))
        probabilities = ranked.softmax(dim=-1)
        above = probabilities.cumsum(dim=-1) - probabilities  # of all that are likelier
        top_p = _column([x.top_p for x in options], logits)
        ranked = ranked.masked_fill((above >= top_p) & (rank > 0), float("-inf"))
        # Back into the order of the vocabulary, in which the others are drawn too.
        logits = torch.empty_like(logits).scatter(1, order, ranked)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    threshold = _column([sampler.random() for sampler in samplers], cumulative) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_max(logits.shape[1] - 1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
