"""The operator beside other implementations of it, and beside softmax attention: the measuring loop."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from .cases import BACKWARD, FORWARD, OpCase, Pass
from .harness import Call, Contest, peak_bytes, release
from .oracles import Oracles
from .peers import OURS, PEERS, Calls, Inputs, Peer
from .report import Column, Record, Table, dtype_name, rounded
from .run import Plan

# Calls that measure the host: of at most so many tokens, and so few of them, that they do not fill the queue of a GPU.
SMALL_LENGTH, SMALL_CALLS = 1024, 32


def plan(kind: str, cases: list[OpCase], device: torch.device, *, softmax_up_to: int, seconds: float) -> Plan:
    """Of `measure` with every implementation for the device; `kind` is "table" or "sweep"."""
    peers = [peer for peer in PEERS if peer.device == device.type]

    def measured(bandwidth: float) -> Iterator[list[Record]]:
        return measure(cases, peers, device, bandwidth=bandwidth, softmax_up_to=softmax_up_to, seconds=seconds)

    return Plan(kind, cases, measured, title, TABLE, max(case.needed_bytes for case in cases))


def measure(
    cases: Iterable[OpCase],
    peers: Iterable[Peer],
    device: torch.device,
    *,
    bandwidth: float,
    softmax_up_to: int,
    seconds: float,
) -> Iterator[list[Record]]:
    """The records of one case after the other, one for every implementation.

    A record has the sizes and then `error` against float64, `peak_bytes` of forward and backward in one call, `forward`
    and `backward` apart (see `_pass_record`), and `host_microseconds` that a forward call without gradients takes of
    the host, for rows of at most 1024 tokens; None on a CPU. For an implementation that raises or is wrong it has
    `not_measured` instead, the reason; the others go on.

    Args:
        cases: shapes.
        peers: implementations, all for the type of `device`.
        device: where to run.
        bandwidth: of a copy, in bytes per second; it gives the floor of every time.
        softmax_up_to: longest sequence to run quadratic implementations on.
        seconds: to spend on each timing, about.
    """
    peers = list(peers)
    for case in cases:
        yield _measure_case(case, peers, device, bandwidth, softmax_up_to, seconds)


def _measure_case(
    case: OpCase, peers: list[Peer], device: torch.device, bandwidth: float, softmax_up_to: int, seconds: float
) -> list[Record]:
    contest = _prepare_all(case, peers, device, softmax_up_to)
    release(device)
    times = {
        direction: contest.times(lambda ready, direction=direction: getattr(ready.calls, direction.name), seconds)
        for direction in (FORWARD, BACKWARD)
    }
    host_times = {} if device.type == "cpu" else contest.times(lambda ready: ready.small_calls, seconds, "host")

    def measured(peer: Peer, facts: Record) -> Record:
        for direction, of_this in times.items():
            facts[direction.name] |= _pass_record(
                case, direction, peer, of_this[peer.name], of_this.get(OURS), bandwidth
            )
        host_time = host_times.get(peer.name)
        return facts | {"host_microseconds": None if host_time is None else rounded(host_time / SMALL_CALLS * 1e6)}

    sizes = {
        "batch_size": case.batch_size,
        "length": case.length,
        "num_heads": case.num_heads,
        "head_dim": case.head_dim,
        "dtype": dtype_name(case.dtype),
        "documents": case.documents,
    }
    return [contest.record(peer.name, sizes, lambda ready, peer=peer: measured(peer, ready.facts)) for peer in peers]


class _Ready(NamedTuple):
    """The calls, those that measure the host, and all that is measured but time."""

    calls: Calls
    small_calls: Call
    facts: Record


def _prepare_all(case: OpCase, peers: list[Peer], device: torch.device, softmax_up_to: int) -> Contest[_Ready]:
    inputs = Inputs(case, device)
    small_inputs = Inputs(replace(case, length=min(case.length, SMALL_LENGTH)), device)
    oracles = Oracles(inputs)
    contest: Contest[_Ready] = Contest(device)

    def prepare(peer: Peer) -> _Ready:
        calls = Calls(peer, inputs)
        error = oracles.error(calls)
        return _Ready(calls, _small_calls(Calls(peer, small_inputs)), _facts(calls, error, case, device))

    for peer in peers:
        if case.length > _max_length(peer, softmax_up_to):
            contest.failures[peer.name] = f"not run beyond {_max_length(peer, softmax_up_to)} tokens"
        elif case.documents is not None and not peer.takes_documents:
            contest.failures[peer.name] = "it has no packed documents"
        else:
            contest.prepare(peer.name, lambda peer=peer: prepare(peer))
    return contest


def _small_calls(calls: Calls) -> Call:
    def call_all() -> None:
        with torch.no_grad(), calls.peer.context():
            for _ in range(SMALL_CALLS):
                calls.attend()

    return call_all


def _facts(calls: Calls, error: float, case: OpCase, device: torch.device) -> Record:
    facts: Record = {"error": rounded(error), "peak_bytes": peak_bytes(calls.both, device)}
    for direction in (FORWARD, BACKWARD):
        facts[direction.name] = _memory_record(case, direction, peak_bytes(getattr(calls, direction.name), device))
    return facts


def _memory_record(case: OpCase, direction: Pass, peak: int | None) -> Record:
    """`peak_bytes` beyond the inputs; `workspace_bytes`, beyond results too; the latter over the size of the inputs."""
    if peak is None:
        return {"peak_bytes": None, "workspace_bytes": None, "workspace_over_inputs": None}
    workspace = max(peak - direction.results * case.tensor_bytes, 0)
    inputs = (direction.tensors - direction.results) * case.tensor_bytes
    return {
        "peak_bytes": peak,
        "workspace_bytes": workspace,
        "workspace_over_inputs": rounded(workspace / inputs),
    }


def _pass_record(
    case: OpCase, direction: Pass, peer: Peer, time: float, our_time: float | None, bandwidth: float
) -> Record:
    """`milliseconds`; that over the floor and over ours; `teraflops` of the arithmetic of its kind of algorithm."""
    flops = case.quadratic_flops(direction) if peer.is_quadratic else case.linear_flops(direction)
    return {
        "milliseconds": rounded(time * 1e3),
        "times_floor": rounded(time * bandwidth / case.minimal_bytes(direction)),
        "times_ours": None if our_time is None else rounded(time / our_time),
        "teraflops": rounded(flops / time / 1e12),
    }


def _max_length(peer: Peer, softmax_up_to: int) -> float:
    if peer.is_quadratic:
        return softmax_up_to
    return float("inf") if peer.max_length is None else peer.max_length


def title(case: OpCase, bandwidth: float) -> str:
    """The case and its floors."""
    B, T, H, D = case.shape
    floors = [case.minimal_bytes(direction) / bandwidth * 1e3 for direction in (FORWARD, BACKWARD)]
    documents = "" if case.documents is None else f", {case.documents} documents"
    return f"B {B}, T {T}, H {H}, D {D}{documents}: floor {floors[0]:.3g} ms forward, {floors[1]:.3g} ms backward"


def _pass_columns(name: str) -> list[Column]:
    """Time, time over the floor, time over ours, workspace over inputs."""

    def extra(record: Record) -> float | None:
        workspace = record[name]["workspace_over_inputs"]
        return None if workspace is None else 100 * workspace

    return [
        Column("ms", 11, lambda record: record[name]["milliseconds"], ".4g"),
        Column("floor", 9, lambda record: record[name]["times_floor"], ".3g", "x"),
        Column("ours", 8, lambda record: record[name]["times_ours"], ".3g", "x"),
        Column("extra", 8, extra, ".0f", "%"),
    ]


TABLE = Table(
    {direction.name: _pass_columns(direction.name) for direction in (FORWARD, BACKWARD)}
    | {"": [Column("host µs", 9, lambda record: record["host_microseconds"], ".0f")]}
)
