"""Decode step of the operator next to other implementations, eager and as a CUDA graph."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_attention import DecodingState, decay, lightning_attention_step

from .cases import StepCase
from .harness import FLUSHED_BYTES, Call, Clock, Comparison, captured, release
from .implementations import STEP_IMPLEMENTATIONS, Step, StepImplementation
from .oracles import TOLERANCES, checked_error
from .report import Column, Record, Table, dtype_name, field, rounded, times_ours
from .run import Benchmark

# Number of calls between two readings of a clock, so that the time of a reading does not count.
MIN_CALLS, MAX_CALLS = 20, 128


def benchmark(cases: list[StepCase], device: torch.device, *, seconds: float) -> Benchmark:
    """Measure with every implementation for the device."""
    implementations = [found for found in STEP_IMPLEMENTATIONS if found.device == device.type]
    measure_case = partial(measure, implementations=implementations, device=device, seconds=seconds)
    return Benchmark("kernel", cases, measure_case, _title, _TABLE, max(case.state_bytes for case in cases))


@torch.no_grad()
def measure(
    case: StepCase,
    bandwidth: float,
    *,
    implementations: Iterable[StepImplementation],
    device: torch.device,
    seconds: float,
) -> list[Record]:
    """Measure a case.

    Args:
        case: shape and dtype.
        bandwidth: bandwidth of a copy in bytes/s, for the least time (the floor).
        implementations: implementations for the type of `device`.
        device: device to measure on.
        seconds: approximate time to spend on each measurement.

    Returns:
        Sizes of the case and results of every implementation: `error` of output and state against float64, and
        `microseconds`, `times_floor` and `times_ours` of a call: `eager`, of consecutive calls until the device has
        finished; `graph`, of a CUDA graph of them; `host`, without a floor, until a call returns. The latter two are
        None on a CPU. An implementation that raises or is wrong has `not_measured`, the reason, in place of results.
    """
    inputs = StepInputs(case, device)
    comparison: Comparison[_Prepared] = Comparison(device)
    for implementation in implementations:
        comparison.prepare(implementation.name, partial(_prepare, implementation, inputs, device))
    times = {
        kind: comparison.times(lambda prepared, kind=kind: prepared.rounds[kind], seconds, clock)
        for kind, clock in _clocks(device).items()
    }

    def results(name: str, prepared: _Prepared) -> Record:
        record: Record = {"error": rounded(prepared.error), "graph": None, "host": None}
        for kind, of_kind in times.items():
            time = of_kind[name] / inputs.calls
            record[kind] = {
                "microseconds": rounded(time * 1e6),
                "times_floor": None if kind == "host" else rounded(time * bandwidth / case.minimal_bytes),
                "times_ours": times_ours(of_kind, name),
            }
        return record

    sizes = {
        "batch_size": case.batch_size,
        "num_heads": case.num_heads,
        "head_dim": case.head_dim,
        "dtype": dtype_name(case.dtype),
    }
    return comparison.records(sizes, results)


class StepInputs:
    """Random q, k, v `[B, 1, H, D]` and states `[B, H, D, D]`, in so many sets that their states exceed the caches.

    Attributes:
        calls: number of calls of a round, which uses the sets in turn.
    """

    def __init__(self, case: StepCase, device: torch.device):
        B, H, D = case.batch_size, case.num_heads, case.head_dim
        uncached = -(-FLUSHED_BYTES // case.state_bytes)
        self.calls = min(max(uncached, MIN_CALLS), MAX_CALLS)
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        self.sets: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for _ in range(min(uncached, self.calls)):
            q, k, v = (random(B, 1, H, D, dtype=case.dtype) for _ in range(3))
            self.sets.append((q, k, v, random(B, H, D, D, dtype=torch.float32)))
        self.log_decay = decay.log_decay(H, preset="alibi").to(device)


@dataclass(frozen=True)
class _Prepared:
    """Rounds of calls of an implementation, by kind of time, and its error."""

    rounds: dict[str, Call]
    error: float


def step_error(step: Step, inputs: StepInputs, start: Callable[..., Any] = lambda state, *_: state) -> float:
    """Largest relative error of output and state, over the first and last head of the last batch row.

    Raises:
        ArithmeticError: the error is above the tolerance, or NaN.
    """
    q, k, v, state = inputs.sets[0]
    heads = sorted({0, state.shape[1] - 1})
    q_, k_, v_ = (x[-1:, :, heads].double() for x in (q, k, v))
    exact_state = state[-1:, heads].double()
    exact_output = lightning_attention_step(q_, k_, v_, inputs.log_decay[heads], state=exact_state, backend="reference")
    output, new_state = step(q, k, v, start(state.clone(), q.dtype, torch.zeros(len(q))))
    if isinstance(new_state, DecodingState):
        new_state = new_state.fold_(inputs.log_decay)
    new_state, exact_state = new_state[-1:, heads].transpose(1, 2), exact_state.transpose(1, 2)
    return max(
        checked_error("o", output[-1:, :, heads], exact_output, TOLERANCES[q.dtype]),
        checked_error("state", new_state, exact_state, TOLERANCES[torch.float32]),
    )


def _prepare(implementation: StepImplementation, inputs: StepInputs, device: torch.device) -> _Prepared:
    step = implementation.build(inputs.log_decay)
    error = step_error(step, inputs, implementation.start)
    release(device)
    places = torch.arange(len(inputs.sets) * len(inputs.sets[0][0])).view(len(inputs.sets), -1)
    states = [
        implementation.start(state, q.dtype, fraction)
        for (q, _, _, state), fraction in zip(inputs.sets, places / places.numel(), strict=True)
    ]

    def round_of_calls() -> object:
        # Keep as many new states as there are sets, or the calls would write the same memory, which a cache holds.
        kept: deque[tuple[Tensor, Any]] = deque(maxlen=len(inputs.sets))
        for i in range(inputs.calls):
            q, k, v, _ = inputs.sets[i % len(inputs.sets)]
            kept.append(step(q, k, v, states[i % len(inputs.sets)]))
        return kept

    rounds = {kind: captured(round_of_calls) if kind == "graph" else round_of_calls for kind in _clocks(device)}
    return _Prepared(rounds, error)


def _clocks(device: torch.device) -> dict[str, Clock]:
    """Clock of each kind of time."""
    return {"eager": "wall", "graph": "device", "host": "host"} if device.type == "cuda" else {"eager": "wall"}


def _title(case: StepCase, bandwidth: float) -> str:
    floor = case.minimal_bytes / bandwidth * 1e6
    return f"B {case.batch_size}, H {case.num_heads}, D {case.head_dim}: floor {floor:.3g} µs"


def _columns(kind: str) -> list[Column]:
    return [
        Column("µs", 11, field(kind, "microseconds"), ".4g"),
        Column("floor", 9, field(kind, "times_floor"), ".3g", "x"),
        Column("ours", 8, field(kind, "times_ours"), ".3g", "x"),
    ]


_TIME, _, _RATIO = _columns("host")
_TABLE = Table({"eager": _columns("eager"), "graph": _columns("graph"), "host": [_TIME, _RATIO]})
