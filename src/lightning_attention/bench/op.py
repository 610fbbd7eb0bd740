"""The operator beside other implementations of it, and beside softmax attention: the measuring loop."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from .cases import BACKWARD, FORWARD, OpCase, Pass
from .harness import Contest, enqueue_seconds, peak_bytes, release
from .oracles import Oracles
from .peers import OURS, PEERS, Calls, Inputs, Peer
from .report import Column, Record, Table, dtype_name, rounded
from .run import Plan


def plan(kind: str, cases: list[OpCase], device: torch.device, *, softmax_up_to: int, seconds: float) -> Plan:
    """Of `measure` with every implementation for the device; `kind` is "table" or "sweep"."""
    peers = [peer for peer in PEERS if peer.device == device.type]

    def measured(bandwidth: float) -> Iterator[list[Record]]:
        return measure(cases, peers, device, bandwidth=bandwidth, softmax_up_to=softmax_up_to, seconds=seconds)

    return Plan(kind, cases, measured, title, TABLE)


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

    A record has the sizes and then `error` against float64, `host_microseconds` that a small forward call takes of the
    host, `peak_bytes` of forward and backward in one call, and `forward` and `backward` apart (see `_pass_record`). For
    an implementation that raises or is wrong it has `not_measured` instead, the reason; the others go on.

    Args:
        cases: shapes.
        peers: implementations, all for the type of `device`.
        device: where to run.
        bandwidth: of a copy, in bytes per second; it gives the floor of every time.
        softmax_up_to: longest sequence to run quadratic implementations on.
        seconds: to spend on each timing, about.
    """
    peers, host_times = list(peers), {}
    for case in cases:
        yield _measure_case(case, peers, device, bandwidth, softmax_up_to, seconds, host_times)


def _measure_case(
    case: OpCase,
    peers: list[Peer],
    device: torch.device,
    bandwidth: float,
    softmax_up_to: int,
    seconds: float,
    host_times: dict[tuple[str, torch.dtype, int], float | None],
) -> list[Record]:
    contest = _prepare_all(case, peers, device, softmax_up_to, host_times)
    release(device)
    times = {
        direction: contest.times(lambda ready, direction=direction: getattr(ready[0], direction.name), seconds)
        for direction in (FORWARD, BACKWARD)
    }

    def measured(peer: Peer, facts: Record) -> Record:
        for direction, of_this in times.items():
            facts[direction.name] |= _pass_record(
                case, direction, peer, of_this[peer.name], of_this.get(OURS), bandwidth
            )
        return facts

    sizes = {
        "batch_size": case.batch_size,
        "length": case.length,
        "num_heads": case.num_heads,
        "head_dim": case.head_dim,
        "dtype": dtype_name(case.dtype),
        "documents": case.documents,
    }
    return [contest.record(peer.name, sizes, lambda ready, peer=peer: measured(peer, ready[1])) for peer in peers]


def _prepare_all(
    case: OpCase,
    peers: list[Peer],
    device: torch.device,
    softmax_up_to: int,
    host_times: dict[tuple[str, torch.dtype, int], float | None],
) -> Contest[tuple[Calls, Record]]:
    inputs = Inputs(case, device)
    oracles = Oracles(inputs)
    contest: Contest[tuple[Calls, Record]] = Contest(device)
    for peer in peers:
        if case.length > _max_length(peer, softmax_up_to):
            contest.failures[peer.name] = f"not run beyond {_max_length(peer, softmax_up_to)} tokens"
        elif case.documents is not None and not peer.takes_documents:
            contest.failures[peer.name] = "it has no packed documents"
        else:
            contest.prepare(peer.name, lambda peer=peer: _prepare(peer, case, inputs, oracles, device, host_times))
    return contest


def _prepare(
    peer: Peer,
    case: OpCase,
    inputs: Inputs,
    oracles: Oracles,
    device: torch.device,
    host_times: dict[tuple[str, torch.dtype, int], float | None],
) -> tuple[Calls, Record]:
    """The calls, checked, and all that is measured of them but time."""
    calls = Calls(peer, inputs)
    facts: Record = {"error": rounded(oracles.error(calls))}
    key = peer.name, case.dtype, case.head_dim
    if key not in host_times:
        host_times[key] = _host_time(peer, case, device)
    host_time = host_times[key]
    facts["host_microseconds"] = None if host_time is None else rounded(host_time * 1e6)
    facts["peak_bytes"] = peak_bytes(calls.both, device)
    for direction in (FORWARD, BACKWARD):
        facts[direction.name] = _memory_record(case, direction, peak_bytes(getattr(calls, direction.name), device))
    return calls, facts


def _host_time(peer: Peer, case: OpCase, device: torch.device) -> float | None:
    """Seconds of the host for a forward call too small to keep the GPU busy."""
    calls = Calls(peer, Inputs(replace(case, batch_size=1, length=128, documents=None), device))
    with torch.no_grad(), peer.context():
        return enqueue_seconds(calls.attend, device)


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
