"""The operator beside other implementations of it, and beside softmax attention: the measuring loop."""

import gc
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from .cases import BACKWARD, FORWARD, OpCase, Pass
from .harness import enqueue_seconds, interleaved_times, peak_bytes, reason
from .oracles import Oracles
from .peers import OURS, Calls, Inputs, Peer

Record = dict[str, Any]


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
    inputs = Inputs(case, device)
    oracles = Oracles(inputs)
    ready: dict[str, Calls] = {}
    facts: dict[str, Record] = {}
    failures: dict[str, str] = {}
    for peer in peers:
        if case.length > _max_length(peer, softmax_up_to):
            failures[peer.name] = f"not run beyond {_max_length(peer, softmax_up_to)} tokens"
            continue
        try:
            ready[peer.name], facts[peer.name] = _prepare(peer, case, inputs, oracles, device, host_times)
        except Exception as error:  # whatever an implementation raises is its result
            failures[peer.name] = reason(error)
        _free(device)
    del oracles
    _free(device)

    times: dict[str, dict[str, float]] = {}
    for direction in (FORWARD, BACKWARD):
        calls = {name: getattr(call, direction.name) for name, call in ready.items() if name not in failures}
        times[direction.name], failed = interleaved_times(calls, seconds, device)
        failures |= failed

    records = []
    for peer in peers:
        record: Record = {
            "implementation": peer.name,
            "batch_size": case.batch_size,
            "length": case.length,
            "num_heads": case.num_heads,
            "head_dim": case.head_dim,
            "dtype": str(case.dtype).removeprefix("torch."),
        }
        if peer.name in failures:
            record["not_measured"] = failures[peer.name]
        else:
            record |= facts[peer.name]
            for direction in (FORWARD, BACKWARD):
                of_this = times[direction.name]
                record[direction.name] |= _pass_record(
                    case, direction, peer, of_this[peer.name], of_this.get(OURS), bandwidth
                )
        records.append(record)
    return records


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
    facts: Record = {"error": _rounded(oracles.error(calls))}
    key = peer.name, case.dtype, case.head_dim
    if key not in host_times:
        host_times[key] = _host_time(peer, case, device)
    host_time = host_times[key]
    facts["host_microseconds"] = None if host_time is None else _rounded(host_time * 1e6)
    facts["peak_bytes"] = peak_bytes(calls.both, device)
    for direction in (FORWARD, BACKWARD):
        facts[direction.name] = _memory_record(case, direction, peak_bytes(getattr(calls, direction.name), device))
    return calls, facts


def _host_time(peer: Peer, case: OpCase, device: torch.device) -> float | None:
    """Seconds of the host for a forward call too small to keep the GPU busy."""
    calls = Calls(peer, Inputs(replace(case, batch_size=1, length=128), device))
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
        "workspace_over_inputs": _rounded(workspace / inputs),
    }


def _pass_record(
    case: OpCase, direction: Pass, peer: Peer, time: float, our_time: float | None, bandwidth: float
) -> Record:
    """`milliseconds`; that over the floor and over ours; `teraflops` of the arithmetic of its kind of algorithm."""
    flops = case.quadratic_flops(direction) if peer.is_quadratic else case.linear_flops(direction)
    return {
        "milliseconds": _rounded(time * 1e3),
        "times_floor": _rounded(time * bandwidth / case.minimal_bytes(direction)),
        "times_ours": None if our_time is None else _rounded(time / our_time),
        "teraflops": _rounded(flops / time / 1e12),
    }


def _max_length(peer: Peer, softmax_up_to: int) -> float:
    if peer.is_quadratic:
        return softmax_up_to
    return float("inf") if peer.max_length is None else peer.max_length


def _free(device: torch.device) -> None:
    """What an implementation has left, for the next one."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")
