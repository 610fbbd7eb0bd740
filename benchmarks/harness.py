"""Time and memory of calls, measured side by side."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch

from lightning_attention.cuda_graph import record

Call = Callable[[], object]
# Clock of a measurement: the device's, by events; the wall clock, until the device has finished; or the host's, until
# the call returns. On a CPU all are the wall clock.
Clock = Literal["device", "wall", "host"]
Prepared = TypeVar("Prepared")

# Zeroing this many bytes evicts a call's data from L2. A GPU takes about 1 ms for all, longer than the host takes to
# enqueue any call here, so that no call waits for its launches.
FLUSHED_BYTES, FLUSHES = 1 << 29, 8

MAX_RUNS = 100


class Comparison(Generic[Prepared]):
    """Implementations side by side. An implementation that raises is left out, with the reason; the others go on.

    Attributes:
        prepared: what is left of `prepare`, by name of implementation.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.prepared: dict[str, Prepared] = {}
        self._failures: dict[str, str] = {}
        self._names: list[str] = []

    def prepare(self, name: str, prepare: Callable[[], Prepared]) -> None:
        self._names.append(name)
        try:
            self.prepared[name] = prepare()
        except Exception as error:  # any exception of an implementation is its result
            self._failures[name] = reason(error)
        release(self.device)

    def leave_out(self, name: str, why: str) -> None:
        self._names.append(name)
        self._failures[name] = why

    def times(self, call_of: Callable[[Prepared], Call], seconds: float, clock: Clock = "device") -> dict[str, float]:
        """Seconds of a call of each implementation, see `interleaved_times`."""
        calls = {name: call_of(prepared) for name, prepared in self.prepared.items()}
        times, failures = interleaved_times(calls, seconds, self.device, clock)
        self._failures |= failures
        self.prepared = {name: prepared for name, prepared in self.prepared.items() if name not in failures}
        return times

    def records(
        self, sizes: dict[str, Any], results: Callable[[str, Prepared], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Name, sizes and results of every implementation; in place of results `not_measured`, the reason, if any."""
        return [
            {"implementation": name, **sizes}
            | ({"not_measured": self._failures[name]} if name in self._failures else results(name, self.prepared[name]))
            for name in self._names
        ]


def interleaved_times(
    calls: Mapping[str, Call], seconds: float, device: torch.device, clock: Clock = "device"
) -> tuple[dict[str, float], dict[str, str]]:
    """Measure calls in turns, so that a noisy moment affects all of them.

    Args:
        calls: calls by name.
        seconds: approximate time to spend on each call. After a warm-up run, a call runs at least five times (three if
            it takes over 0.1 s) and at most 100.
        device: device of the calls.
        clock: what to measure.

    Returns:
        Median seconds of each call (the minimum for the host clock, since other processes on the host's cores can
        double a time), and the reasons of the calls that raised.
    """
    timers = {"device": _event_timer, "wall": _wall_timer, "host": _host_timer}
    timed = timers["wall" if device.type == "cpu" else clock](device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    failures: dict[str, str] = {}

    def run(name: str) -> float:
        try:
            return timed(calls[name])
        except Exception as error:  # any exception of a call is its result
            failures[name] = reason(error)
            del times[name]
            return 0.0

    for name in calls:
        run(name)
    while unfinished := [name for name, spent in times.items() if not _is_enough(spent, seconds)]:
        for name in unfinished:
            elapsed = run(name)
            if name in times:
                times[name].append(elapsed)
    typical = min if clock == "host" else statistics.median
    return {name: typical(spent) for name, spent in times.items()}, failures


def reason(error: Exception) -> str:
    """Describe an exception in one line of at most 200 characters."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:200]


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Peak memory of a call beyond the memory in use before, including its results.

    On a CPU, resident memory; None except on Linux with glibc, where a process can measure it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory freed by earlier calls would be used again
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
        before = _proc_bytes("/proc/self/status", "VmRSS")
        call()
        return max(_proc_bytes("/proc/self/status", "VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def captured(call: Call) -> Call:
    """Capture a call as a CUDA graph, and return its replay. A replay overwrites and returns the captured results."""
    graph, result = record(call)

    def replay(_: Call = call) -> object:  # the call holds what the graph reads
        graph.replay()
        return result

    return replay


def kernel_launches(call: Call) -> int | None:
    """Count kernels, copies and fills that a call launches on a GPU: the nodes of a CUDA graph. None if not capturable.

    A profiler would count them too, but slows down the host from then on.
    """
    graph, count = torch.cuda.CUDAGraph(keep_graph=True), ctypes.c_size_t()
    with suppress(RuntimeError):
        call()
        with torch.cuda.graph(graph):
            call()
        handle = ctypes.c_void_p(graph.raw_cuda_graph())
        if ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(handle, None, ctypes.byref(count)) == 0:
            return count.value
    return None


def release(device: torch.device) -> None:
    """Free the memory that an implementation has left behind."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int | None:
    """Free memory; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return _proc_bytes("/proc/meminfo", "MemAvailable")
    except OSError:
        return None


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy larger than the caches."""
    size = 1 << 30 if device.type == "cuda" else 1 << 28
    source = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    times, _ = interleaved_times({"copy": lambda: target.copy_(source)}, 0.05, device)
    return 2 * size / times["copy"]


def _is_enough(spent: list[float], seconds: float) -> bool:
    least = 3 if spent and min(spent) > 0.1 else 5
    return len(spent) >= MAX_RUNS or (len(spent) >= least and sum(spent) >= seconds)


def _wall_timer(device: torch.device) -> Callable[[Call], float]:
    def timed(call: Call) -> float:
        start = time.perf_counter()
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - start
        del result
        return elapsed

    return timed


def _host_timer(device: torch.device) -> Callable[[Call], float]:
    def timed(call: Call) -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return timed


def _event_timer(device: torch.device) -> Callable[[Call], float]:
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed(call: Call) -> float:
        for _ in range(FLUSHES):
            flushed.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return timed


def _proc_bytes(file: str, field: str) -> int:
    """Field that the kernel gives in KiB, in bytes."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in {file}")
