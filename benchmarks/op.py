"""The operator, forward and backward, next to other implementations and softmax attention."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from .cases import BACKWARD, FORWARD, OpCase, Pass
from .harness import Call, Comparison, kernel_launches, peak_bytes, release
from .implementations import IMPLEMENTATIONS, Calls, Implementation, Inputs
from .oracles import Oracles
from .report import Column, Record, Table, dtype_name, field, rounded, times_ours
from .run import Benchmark

# Longest sequence of the calls that measure the host, and their number: few enough not to fill a GPU's launch queue.
HOST_LENGTH, HOST_CALLS = 1024, 32


def benchmark(
    kind: str,
    cases: list[OpCase],
    device: torch.device,
    *,
    softmax_up_to: int,
    seconds: float,
    implementations: Sequence[Implementation] = IMPLEMENTATIONS,
) -> Benchmark:
    """Measure with every implementation for the device; `kind` is the key of the results."""
    implementations = [found for found in implementations if found.device == device.type]
    options = {"device": device, "softmax_up_to": softmax_up_to, "seconds": seconds}
    measure_case = partial(measure, implementations=implementations, **options)
    return Benchmark(kind, cases, measure_case, title, TABLE, max(case.needed_bytes for case in cases))


def measure(
    case: OpCase,
    bandwidth: float,
    *,
    implementations: Iterable[Implementation],
    device: torch.device,
    softmax_up_to: int,
    seconds: float,
) -> list[Record]:
    """Measure a case.

    Args:
        case: shape and dtype.
        bandwidth: bandwidth of a copy in bytes/s, for the least time (the floor).
        implementations: implementations for the type of `device`.
        device: device to measure on.
        softmax_up_to: longest sequence for quadratic implementations.
        seconds: approximate time to spend on each measurement.

    Returns:
        Sizes of the case and results of every implementation: `error` against float64; `peak_bytes` of forward and
        backward in one call; `forward` and `backward`, each with times and workspace; and, for a forward call without
        gradients on `host_length` tokens, `host_microseconds` and `host_launches`, None on a CPU. An implementation
        that raises or is wrong has `not_measured`, the reason, in place of results.
    """
    comparison = _prepare(case, implementations, device, softmax_up_to)
    release(device)
    times = {
        direction: comparison.times(lambda prepared, name=direction.name: getattr(prepared.calls, name), seconds)
        for direction in (FORWARD, BACKWARD)
    }
    host_times = {} if device.type == "cpu" else comparison.times(lambda prepared: prepared.host_calls, seconds, "host")

    def results(name: str, prepared: _Prepared) -> Record:
        record: Record = {"error": rounded(prepared.error), "peak_bytes": prepared.peak_bytes}
        is_quadratic = prepared.calls.implementation.is_quadratic
        for direction, of_pass in times.items():
            record[direction.name] = {
                **_memory_record(case, direction, prepared.pass_peak_bytes[direction]),
                **_time_record(case, direction, of_pass[name], bandwidth, is_quadratic),
                "times_ours": times_ours(of_pass, name),
            }
        host_time = host_times.get(name)
        return record | {
            "host_microseconds": None if host_time is None else rounded(host_time / HOST_CALLS * 1e6),
            "host_length": min(case.length, HOST_LENGTH),
            "host_launches": prepared.host_launches,
        }

    sizes = {
        "batch_size": case.batch_size,
        "length": case.length,
        "num_heads": case.num_heads,
        "head_dim": case.head_dim,
        "dtype": dtype_name(case.dtype),
        "documents": case.packed_sequences,
    }
    return comparison.records(sizes, results)


@dataclass(frozen=True)
class _Prepared:
    """Calls of an implementation, and its results other than times."""

    calls: Calls
    host_calls: Call
    host_launches: int | None
    error: float
    peak_bytes: int | None
    pass_peak_bytes: dict[Pass, int | None]


def _prepare(
    case: OpCase, implementations: Iterable[Implementation], device: torch.device, softmax_up_to: int
) -> Comparison[_Prepared]:
    inputs = Inputs(case, device)
    host_inputs = Inputs(replace(case, length=min(case.length, HOST_LENGTH)), device)
    oracles = Oracles(inputs)
    comparison: Comparison[_Prepared] = Comparison(device)

    def prepare(implementation: Implementation) -> _Prepared:
        calls, host_calls = Calls(implementation, inputs), Calls(implementation, host_inputs)
        error = oracles.error(calls)
        peaks = {direction: peak_bytes(getattr(calls, direction.name), device) for direction in (FORWARD, BACKWARD)}
        launches = None if device.type == "cpu" else kernel_launches(partial(_infer, host_calls, 1))
        both = peak_bytes(calls.both, device)
        return _Prepared(calls, partial(_infer, host_calls, HOST_CALLS), launches, error, both, peaks)

    for implementation in implementations:
        longest = softmax_up_to if implementation.is_quadratic else implementation.max_length
        if longest is not None and case.length > longest:
            comparison.leave_out(implementation.name, f"not run beyond {longest} tokens")
        elif case.packed_sequences is not None and not implementation.takes_packed_sequences:
            comparison.leave_out(implementation.name, "no packed sequences")
        else:
            comparison.prepare(implementation.name, partial(prepare, implementation))
    return comparison


def _infer(calls: Calls, count: int) -> None:
    with torch.no_grad(), calls.implementation.context():
        for _ in range(count):
            calls.attend()


def _memory_record(case: OpCase, direction: Pass, peak: int | None) -> Record:
    """Peak memory beyond the inputs; workspace, which is beyond the results too; workspace over the size of inputs."""
    if peak is None:
        return {"peak_bytes": None, "workspace_bytes": None, "workspace_over_inputs": None}
    workspace = max(peak - direction.results * case.tensor_bytes, 0)
    inputs = (direction.tensors - direction.results) * case.tensor_bytes
    return {"peak_bytes": peak, "workspace_bytes": workspace, "workspace_over_inputs": rounded(workspace / inputs)}


def _time_record(case: OpCase, direction: Pass, time: float, bandwidth: float, is_quadratic: bool) -> Record:
    """Milliseconds; time over the floor; teraflops by the arithmetic of the kind of algorithm."""
    flops = case.quadratic_flops(direction) if is_quadratic else case.linear_flops(direction)
    return {
        "milliseconds": rounded(time * 1e3),
        "times_floor": rounded(time * bandwidth / case.minimal_bytes(direction)),
        "teraflops": rounded(flops / time / 1e12),
    }


def title(case: OpCase, bandwidth: float) -> str:
    """Sizes of a case and its floors."""
    B, T, H, D = case.shape
    floors = [case.minimal_bytes(direction) / bandwidth * 1e3 for direction in (FORWARD, BACKWARD)]
    packed = "" if case.packed_sequences is None else f", {case.packed_sequences} sequences packed"
    return f"B {B}, T {T}, H {H}, D {D}{packed}: floor {floors[0]:.3g} ms forward, {floors[1]:.3g} ms backward"


def _pass_columns(name: str) -> list[Column]:
    return [
        Column("ms", 11, field(name, "milliseconds"), ".4g"),
        Column("floor", 9, field(name, "times_floor"), ".3g", "x"),
        Column("ours", 8, field(name, "times_ours"), ".3g", "x"),
        Column("extra", 8, field(name, "workspace_over_inputs", scale=100), ".0f", "%"),
    ]


TABLE = Table(
    {direction.name: _pass_columns(direction.name) for direction in (FORWARD, BACKWARD)}
    | {
        f"host, T <= {HOST_LENGTH}": [
            Column("µs", 9, field("host_microseconds"), ".0f"),
            Column("launches", 10, field("host_launches"), ".0f"),
        ]
    }
)
