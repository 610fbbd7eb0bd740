"""One token of the operator beside other implementations of it, eager and as a CUDA graph."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_attention import decay, lightning_attention_step

from .cases import StepCase
from .harness import FLUSHED_BYTES, Call, Clock, Contest, captured, release
from .oracles import TOLERANCES, checked_error
from .peers import OURS, STEP_PEERS, Step, StepPeer
from .report import Column, Record, Table, dtype_name, rounded
from .run import Plan

# Calls between two readings of a clock, so that what a reading takes does not count.
MIN_CALLS, MAX_CALLS = 20, 128


def plan(cases: list[StepCase], device: torch.device, *, seconds: float) -> Plan:
    """Of `measure` with every implementation for the device."""
    peers = [peer for peer in STEP_PEERS if peer.device == device.type]

    def measured(bandwidth: float) -> Iterator[list[Record]]:
        return measure(cases, peers, device, bandwidth=bandwidth, seconds=seconds)

    return Plan("kernel", cases, measured, _title, _TABLE, max(case.state_bytes for case in cases))


@torch.no_grad()
def measure(
    cases: Iterable[StepCase], peers: Iterable[StepPeer], device: torch.device, *, bandwidth: float, seconds: float
) -> Iterator[list[Record]]:
    """The records of one case after the other, one for every implementation.

    A record has the sizes and then `error` of output and state against float64, and the times of a call, in
    `microseconds`, `times_floor` and `times_ours`: `eager`, of calls in a row until the device has done them; `graph`,
    of a CUDA graph of them; and `host`, without a floor, until a call returns. On a CPU the latter two are None. For an
    implementation that raises or is wrong it has `not_measured`.

    Args:
        cases: shapes.
        peers: implementations, all for the type of `device`.
        device: where to run.
        bandwidth: of a copy, in bytes per second; it gives the floor of every time.
        seconds: to spend on each timing, about.
    """
    peers = list(peers)
    for case in cases:
        yield _measure_case(case, peers, device, bandwidth, seconds)


@torch.no_grad()
def cpu_step(num_heads: int = 8, head_dim: int = 64, *, rounds: int = 300) -> dict[str, float]:
    """Microseconds of a decode step of one sequence on a CPU, beside the three plain calls that do the same.

    Short rounds of calls of each take turns, and the least time of each counts. The state stays in the cache, so this
    is what a call costs apart from moving memory. Run it by
    `python -c "from benchmarks.decode_kernel import cpu_step; print(cpu_step())"`.
    """
    q, k, v = torch.randn(3, 1, num_heads, head_dim)
    state = torch.zeros(1, num_heads, head_dim, head_dim)
    log_decay = decay.log_decay(num_heads, preset="alibi")
    factor = log_decay.exp()[:, None, None]

    def ours() -> Tensor:
        return lightning_attention_step(q, k, v, log_decay, state=state)

    def einsum() -> Tensor:
        state.mul_(factor).addcmul_(k[..., :, None], v[..., None, :])
        return torch.einsum("bhk,bhkv->bhv", q, state)

    def matmul() -> Tensor:
        state.mul_(factor).addcmul_(k[..., :, None], v[..., None, :])
        return (q[:, :, None] @ state)[:, :, 0]

    calls = {OURS: ours, "mul_, addcmul_, einsum": einsum, "mul_, addcmul_, matmul": matmul}
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(MIN_CALLS):
                call()
            least[name] = min(least[name], (time.perf_counter() - start) / MIN_CALLS * 1e6)
    return least


class StepInputs:
    """Random q, k, v `[B, 1, H, D]` and states `[B, H, D, D]`, in as many sets as no cache holds, if `calls` use them.

    Attributes:
        calls: of a round, which takes the sets in turn.
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
class _Calls:
    """A round of calls of an implementation, by how it is called, and its error."""

    rounds: dict[str, Call]
    error: float


def step_error(step: Step, inputs: StepInputs) -> float:
    """The largest relative error of output and state, of the first and last head of the last row.

    Raises:
        ArithmeticError: it is above the tolerance, or NaN.
    """
    q, k, v, state = inputs.sets[0]
    heads = sorted({0, state.shape[1] - 1})
    q_, k_, v_ = (x[-1:, :, heads].double() for x in (q, k, v))
    exact_state = state[-1:, heads].double()
    exact_output = lightning_attention_step(q_, k_, v_, inputs.log_decay[heads], state=exact_state, backend="reference")
    output, new_state = step(q, k, v, state.clone())
    return max(
        checked_error("o", output[-1:, :, heads], exact_output, TOLERANCES[q.dtype]),
        checked_error(
            "state",
            new_state[-1:, heads].transpose(1, 2),
            exact_state.transpose(1, 2),
            TOLERANCES[torch.float32],
        ),
    )


def _measure_case(
    case: StepCase, peers: list[StepPeer], device: torch.device, bandwidth: float, seconds: float
) -> list[Record]:
    inputs = StepInputs(case, device)
    contest: Contest[_Calls] = Contest(device)
    for peer in peers:
        contest.prepare(peer.name, lambda peer=peer: _prepare(peer, inputs, device))
    times = {
        kind: contest.times(lambda calls, kind=kind: calls.rounds[kind], seconds, clock)
        for kind, clock in _clocks(device).items()
    }

    def facts(name: str, calls: _Calls) -> Record:
        record: Record = {"error": rounded(calls.error), "graph": None, "host": None}
        for kind, of_kind in times.items():
            seconds_a_call = of_kind[name] / inputs.calls
            record[kind] = {
                "microseconds": rounded(seconds_a_call * 1e6),
                "times_floor": None if kind == "host" else rounded(seconds_a_call * bandwidth / case.minimal_bytes),
                "times_ours": rounded(of_kind[name] / of_kind[OURS]) if OURS in of_kind else None,
            }
        return record

    sizes = {
        "batch_size": case.batch_size,
        "num_heads": case.num_heads,
        "head_dim": case.head_dim,
        "dtype": dtype_name(case.dtype),
    }
    return [contest.record(peer.name, sizes, lambda calls, peer=peer: facts(peer.name, calls)) for peer in peers]


def _prepare(peer: StepPeer, inputs: StepInputs, device: torch.device) -> _Calls:
    step = peer.build(inputs.log_decay)
    error = step_error(step, inputs)
    release(device)

    def round_of_calls() -> object:
        # New states are kept until as many others are there, or one would be written over and over, to a cache.
        kept: deque[tuple[Tensor, Tensor]] = deque(maxlen=len(inputs.sets))
        for i in range(inputs.calls):
            kept.append(step(*inputs.sets[i % len(inputs.sets)]))
        return kept

    rounds = {kind: captured(round_of_calls) if kind == "graph" else round_of_calls for kind in _clocks(device)}
    return _Calls(rounds, error)


def _clocks(device: torch.device) -> dict[str, Clock]:
    """By what each kind of time is measured."""
    return {"eager": "wall", "graph": "device", "host": "host"} if device.type == "cuda" else {"eager": "wall"}


def _title(case: StepCase, bandwidth: float) -> str:
    floor = case.minimal_bytes / bandwidth * 1e6
    return f"B {case.batch_size}, H {case.num_heads}, D {case.head_dim}: floor {floor:.3g} µs"


def _columns(kind: str) -> list[Column]:
    """Time, over the floor, over ours."""

    def value(field: str):
        return lambda record: record[kind] and record[kind][field]

    return [
        Column("µs", 11, value("microseconds"), ".4g"),
        Column("floor", 9, value("times_floor"), ".3g", "x"),
        Column("ours", 8, value("times_ours"), ".3g", "x"),
    ]


_TIME, _, _RATIO = _columns("host")
_TABLE = Table({"eager": _columns("eager"), "graph": _columns("graph"), "host": [_TIME, _RATIO]})
