"""How the next token is chosen."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..models import LightningForCausalLM

log = logging.getLogger(__name__)

NOT_FINITE = "the model's logits are NaN or infinite: its weights hold such values, or its numbers overflow"

# Options of a generation_config that do not change which tokens are chosen, or that the caller decides.
NOT_APPLIED = {"bos_token_id", "do_sample", "eos_token_id", "max_length", "pad_token_id", "return_dict_in_generate"}
NOT_APPLIED |= {"transformers_version", "use_cache"}
# Positive numbers of float32.
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: tokens to generate, at most.
        temperature: 0 takes the likeliest token.
        top_k: sample from the k likeliest; 0 is all.
        top_p: sample from the likeliest of this total probability.
        repetition_penalty: above 1 avoids what was there already.
        seed: makes sampling repeatable.

    Raises:
        ValueError: an option is out of its range, or not a number.
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
            if not _is_finite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.max_new_tokens >= 1 << 63:
            raise ValueError(f"max_new_tokens must be below 2^63, got {self.max_new_tokens}")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 64:
            raise ValueError(f"seed must be at least -2^63 and below 2^64, got {self.seed}")
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


def stop_token_ids(model: LightningForCausalLM) -> frozenset[int]:
    """Tokens that end a text: `eos_token_id` of the model's generation_config, or else of its configuration."""
    for config in (model.generation_config, model.config):
        ids = None if config is None else config.eos_token_id
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else map(int, ids))
    return frozenset()


def warn_of_ignored_options(model: LightningForCausalLM) -> None:
    """Log which options of the model's generation_config generate() would apply and this library does not."""
    config = model.generation_config
    given = {} if config is None else config.to_diff_dict()
    replaced = {field.name for field in fields(SamplingOptions)} | NOT_APPLIED
    ignored = sorted(name for name in given if name not in replaced and not name.startswith(("_", "output_")))
    if ignored:
        log.warning("options of the model's generation_config that are not applied: %s", ", ".join(ignored))


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


class Sampler:
    """Chooses the tokens of one sequence; `choose` does it for many at once.

    Random numbers belong to the sequence, so that its tokens do not depend on the others in a batch.

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
    """Choose the next token of every batch row of `logits` `[B, vocab_size]`.

    Options apply in the order of transformers' generate(): repetition penalty, temperature, top k, top p.

    Raises:
        ValueError: logits are NaN or infinite.
    """
    tokens = [token for token in choose_each(logits, samplers) if token is not None]
    if len(tokens) < len(samplers):
        raise ValueError(NOT_FINITE)
    return tokens


def choose_each(logits: Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """Choose as `choose` does; None for a batch row with NaN or infinite logits. -inf only excludes a token."""
    logits = logits.float()
    # The largest logit is NaN if any of them is.
    is_usable = logits.amax(dim=-1).isfinite()
    logits = _penalized(logits, samplers)
    tokens = logits.argmax(dim=-1)
    rows = [row for row, sampler in enumerate(samplers) if sampler.options.temperature > 0]
    if rows:
        drawing = [samplers[row] for row in rows]
        index = torch.tensor(rows, device=logits.device)
        tokens[index] = _draw(logits[index], drawing)
    chosen = [None if token < 0 else token for token in tokens.where(is_usable, -1).tolist()]
    for token, sampler in zip(chosen, samplers, strict=True):
        if token is not None and sampler.seen is not None:
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
    penalized = torch.where(x > 0, x / penalty, x * penalty).clamp(-LARGEST, LARGEST)
    return logits.index_copy(0, index, torch.where(seen & x.isfinite(), penalized, x))


def _draw(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    options = [sampler.options for sampler in samplers]
    # The likeliest token has logit 0, whatever the temperature: nothing overflows.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    logits = logits / _column([x.temperature for x in options], logits)
    if any(x.top_k or x.top_p < 1 for x in options):
        ranked, order = logits.sort(dim=-1, descending=True)
        rank = torch.arange(logits.shape[1], device=logits.device)
        top_k = _column([min(x.top_k or logits.shape[1], logits.shape[1]) for x in options], logits)
        ranked = ranked.masked_fill(rank >= top_k, float("-inf"))
        probabilities = ranked.softmax(dim=-1)
        above = probabilities.cumsum(dim=-1) - probabilities  # of all that are likelier
        top_p = _column([x.top_p for x in options], logits)
        ranked = ranked.masked_fill((above >= top_p) & (rank > 0), float("-inf"))
        # Back into the order of the vocabulary, in which the others are drawn too.
        logits = torch.empty_like(logits).scatter(1, order, ranked)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    threshold = _column([sampler.random() for sampler in samplers], cumulative) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """One option per batch row, `[B, 1]`; never 0 or infinite where it does not fit the dtype."""
    column = torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
    return column.clamp(SMALLEST, LARGEST).to(like.dtype)
