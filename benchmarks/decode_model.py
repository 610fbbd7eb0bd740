"""Decode step of a model against context length, next to the same layers with softmax attention and a KV cache."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_attention import DecodingState
from lightning_attention.inference.checks import check_ring
from lightning_attention.inference.decoder import Decoder
from lightning_attention.inference.pool import StatePool
from lightning_attention.models import LightningConfig, LightningForCausalLM

from .baselines.softmax import SoftmaxDecoder, cache_shape
from .cases import ContextCase
from .harness import Call, Comparison, free_bytes, peak_bytes, release
from .implementations import IMPLEMENTATIONS, Implementation
from .report import OURS, Column, Record, Table, dtype_name, field, mebibytes, rounded, times_ours
from .run import Benchmark
from .scaling import num_parameters

MakeModel = Callable[[], LightningForCausalLM]


def random_model(size: str, dtype: torch.dtype, device: torch.device) -> LightningForCausalLM:
    """Create a model of a size in `SIZES` with random weights, in eval mode."""
    torch.manual_seed(0)
    model: Any = LightningForCausalLM(LightningConfig.from_size(size))
    return model.to(device=device, dtype=dtype).eval()


def benchmark(
    cases: list[ContextCase], make_model: MakeModel, size: str, device: torch.device, *, seconds: float
) -> Benchmark:
    """Measure next to every softmax attention for the device; `make_model` is called for the first case."""
    attentions = [found for found in IMPLEMENTATIONS if found.device == device.type and found.is_softmax]

    def measure_case(case: ContextCase, bandwidth: float) -> list[Record]:
        return measure(case, make_model(), size, attentions, seconds=seconds)

    needed = max(needed_bytes(size, case.batch_size) for case in cases)
    return Benchmark("model", cases, measure_case, _title, _TABLE, needed)


def needed_bytes(size: str, sequences: int) -> int:
    """Least memory: weights of 2 bytes, and a state per sequence."""
    config = LightningConfig.from_size(size)
    state = sum(prod(config.layer_state_shape(i)) for i in range(config.num_hidden_layers))
    return 2 * num_parameters(config) + torch.float32.itemsize * sequences * state


@dataclass(frozen=True)
class _Prepared:
    """Step to measure, and its memory."""

    step: Call
    state_bytes: int
    peak_bytes: int | None


def measure(
    case: ContextCase, model: LightningForCausalLM, size: str, attentions: Iterable[Implementation], *, seconds: float
) -> list[Record]:
    """Measure a case.

    Args:
        case: batch size and context length.
        model: model in eval mode.
        size: name of the model's size, to record.
        attentions: implementations of softmax attention for the model's device.
        seconds: approximate time to spend on each measurement.

    Returns:
        Sizes of the case and results of our model, then of every softmax attention: `milliseconds` of a step on the
        wall clock, from tokens to logits; `times_ours`; `state_bytes` of states or KV cache; `peak_bytes` of an eager
        step beyond these and the weights. What raises, or does not fit in memory, has `not_measured` in place of
        results.
    """
    comparison: Comparison[_Prepared] = Comparison(model.device)
    comparison.prepare(OURS, partial(_prepare_ours, model, case))
    cache: list[Tensor] = []
    for attention in attentions:
        comparison.prepare(attention.name, partial(_prepare_softmax, model, case, attention, cache))
    times = comparison.times(lambda prepared: prepared.step, seconds, "wall")

    def results(name: str, prepared: _Prepared) -> Record:
        return {
            "milliseconds": rounded(times[name] * 1e3),
            "times_ours": times_ours(times, name),
            "state_bytes": prepared.state_bytes,
            "peak_bytes": prepared.peak_bytes,
        }

    sizes = {"size": size, "batch_size": case.batch_size, "length": case.length, "dtype": dtype_name(model.dtype)}
    return comparison.records(sizes, results)


def _prepare_ours(model: LightningForCausalLM, case: ContextCase) -> _Prepared:
    """Prepare a step from random states; the context length only sets the position."""
    B, device = case.batch_size, model.device
    ring_dtype = model.dtype if check_ring(model, None) else None  # as the engine decides
    pool = StatePool(model.config, B, device=device, ring_dtype=ring_dtype)
    slots = [pool.allocate() for _ in range(B)]
    for state in pool.states:
        (state.state if isinstance(state, DecodingState) else state).normal_()
    decoder = Decoder(model, pool, B)
    tokens, positions = _tokens(B), [case.length - 1] * B
    inputs = torch.tensor([tokens, positions, slots], device=device)
    decoder.step(inputs)
    peak = peak_bytes(lambda: decoder.step(inputs), device)
    return _Prepared(lambda: decoder(tokens, positions, slots), pool.nbytes, peak)


def _prepare_softmax(
    model: LightningForCausalLM, case: ContextCase, attention: Implementation, cache: list[Tensor]
) -> _Prepared:
    """Prepare a step on `cache`, which all calls share and the first one fills."""
    device = model.device
    if not cache:
        cache.extend(random_cache(model, case))
    decoder = SoftmaxDecoder(model, cache, attention.context)
    tokens, position = _tokens(case.batch_size), case.length - 1
    inputs = torch.tensor([*tokens, position], device=device)
    decoder.step(inputs)
    peak = peak_bytes(lambda: decoder.step(inputs), device)
    return _Prepared(lambda: decoder(tokens, position), sum(x.nbytes for x in cache), peak)


def random_cache(model: LightningForCausalLM, case: ContextCase) -> Sequence[Tensor]:
    """Random keys and values of all layers.

    Raises:
        MemoryError: the cache does not fit in memory.
    """
    shape = cache_shape(model.config, case.batch_size, case.length)
    needed = model.config.num_hidden_layers * prod(shape) * model.dtype.itemsize
    release(model.device)
    free = free_bytes(model.device)
    if free is not None and needed > free:
        raise MemoryError(f"a KV cache of {needed / 2**30:.4g} GiB does not fit: {free / 2**30:.4g} GiB are free")
    return [torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(model.config.num_hidden_layers)]


def _tokens(batch_size: int) -> list[int]:
    return [1] * batch_size


def _title(case: ContextCase, bandwidth: float) -> str:
    return f"B {case.batch_size}, {case.length} tokens"


_TABLE = Table(
    {
        "a token": [Column("ms", 11, field("milliseconds"), ".4g"), Column("ours", 9, field("times_ours"), ".3g", "x")],
        "memory, MiB": [
            Column("state", 13, mebibytes("state_bytes"), ".4g"),
            Column("step", 9, mebibytes("peak_bytes"), ".3g"),
        ],
    }
)
