"""Choice of the next token: options and samplers."""

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

# Options of a generation_config that do not affect the choice of tokens, or that the caller sets.
NOT_APPLIED = {"bos_token_id", "do_sample", "eos_token_id", "max_length", "pad_token_id", "return_dict_in_generate"}
NOT_APPLIED |= {"transformers_version", "use_cache"}
# Smallest normal and largest float32.
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass(frozen=True)
class SamplingOptions:
    """Options for the choice of tokens.

    Attributes:
        max_new_tokens: tokens to generate, at most.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample from the k most likely tokens; 0 for all.
        top_p: sample from the fewest most likely tokens with this total probability.
        repetition_penalty: above 1 avoids tokens of the prompt and of the answer.
        seed: makes sampling repeatable.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range.

    Example:
        >>> from lightning_attention.inference import SamplingOptions
        >>> options = SamplingOptions(max_new_tokens=64, temperature=0.8, top_p=0.95, seed=0)
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
                raise TypeError(f"{name} must be a whole number, got {value!r}")
        for name in ("temperature", "top_p", "repetition_penalty"):
            if type(value := getattr(self, name)) not in (int, float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not _is_finite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        for name, is_right, range_ in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("max_new_tokens", self.max_new_tokens < 1 << 63, "below 2^63"),
            ("seed", self.seed is None or -(1 << 63) <= self.seed < 1 << 64, "at least -2^63 and below 2^64"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not is_right:
                raise ValueError(f"{name} must be {range_}, got {getattr(self, name)}")

    def for_generate(self) -> dict[str, Any]:
        """Arguments of transformers' `generate()` for these options."""
        common = {"max_new_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}
        if self.temperature == 0:
            return common | {"do_sample": False}
        sampling = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return common | {"do_sample": True} | sampling


def check_options(options: object) -> None:
    """Raise unless the options are `SamplingOptions`."""
    if not isinstance(options, SamplingOptions):
        raise TypeError(f"options must be SamplingOptions, got {type(options).__name__}")


def stop_token_ids(model: LightningForCausalLM) -> frozenset[int]:
    """Stop tokens of a model: `eos_token_id` of its generation_config, or else of its configuration."""
    for config in (model.generation_config, model.config):
        ids = None if config is None else config.eos_token_id
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else map(int, ids))
    return frozenset()


def warn_of_ignored_options(model: LightningForCausalLM) -> None:
    """Log the options of the model's generation_config that `generate()` applies and this library does not."""
    config = model.generation_config
    given = {} if config is None else config.to_diff_dict()
    replaced = {field.name for field in fields(SamplingOptions)} | NOT_APPLIED
    ignored = sorted(name for name in given if name not in replaced and not name.startswith(("_", "output_")))
    if ignored:
        log.warning("options of the model's generation_config that are not applied: %s", ", ".join(ignored))


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int above the largest float
        return False


class Sampler:
    """Sampling state of one sequence, for `choose`.

    Every sequence has its own random generator, so that its tokens do not depend on the others in a batch.

    Args:
        options: options of the sequence.
        prompt: tokens of the prompt.
        vocab_size: number of tokens in the vocabulary.
        device: device of the logits.
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
        """Draw a uniform number in [0, 1)."""
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
    """Choose as `choose`, with None for a batch row with NaN or infinite logits; -inf only excludes a token."""
    logits = logits.float()
    # The largest logit is NaN if any of them is.
    is_usable = logits.amax(dim=-1).isfinite()
    logits = _penalize(logits, samplers)
    tokens = logits.argmax(dim=-1)
    sampled = [i for i, sampler in enumerate(samplers) if sampler.options.temperature > 0]
    if sampled:
        index = torch.tensor(sampled, device=logits.device)
        tokens[index] = _sample(logits[index], [samplers[i] for i in sampled])
    chosen = [None if token < 0 else token for token in tokens.where(is_usable, -1).tolist()]
    for token, sampler in zip(chosen, samplers, strict=True):
        if token is not None and sampler.seen is not None:
            sampler.seen[token] = True
    return chosen


def _penalize(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Apply the repetition penalty to seen tokens: divide positive logits by the penalty, multiply negative ones."""
    seen = {i: sampler.seen for i, sampler in enumerate(samplers) if sampler.seen is not None}
    if not seen:
        return logits
    index = torch.tensor([*seen], device=logits.device)
    penalty = _column([samplers[i].options.repetition_penalty for i in seen], logits)
    x = logits[index]
    penalized = torch.where(x > 0, x / penalty, x * penalty).clamp(-LARGEST, LARGEST)
    return logits.index_copy(0, index, torch.where(torch.stack([*seen.values()]) & x.isfinite(), penalized, x))


def _sample(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    options = [sampler.options for sampler in samplers]
    # The largest logit becomes 0, so that no temperature overflows.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    logits = logits / _column([x.temperature for x in options], logits)
    if any(x.top_k or x.top_p < 1 for x in options):
        ranked, order = logits.sort(dim=-1, descending=True)
        rank = torch.arange(logits.shape[1], device=logits.device)
        top_k = _column([min(x.top_k or logits.shape[1], logits.shape[1]) for x in options], logits)
        ranked = ranked.masked_fill(rank >= top_k, float("-inf"))
        probabilities = ranked.softmax(dim=-1)
        above = probabilities.cumsum(dim=-1) - probabilities  # of all more likely tokens
        top_p = _column([x.top_p for x in options], logits)
        ranked = ranked.masked_fill((above >= top_p) & (rank > 0), float("-inf"))
        # Back to the order of the vocabulary, so that random numbers select as without top_k and top_p.
        logits = torch.empty_like(logits).scatter(1, order, ranked)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    threshold = _column([sampler.random() for sampler in samplers], cumulative) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Values of an option, `[B, 1]`, clamped to the normal numbers of float32."""
    column = torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
    return column.clamp(SMALLEST, LARGEST).to(like.dtype)
