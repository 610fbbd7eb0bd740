"""Time and memory of a call."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch

from lightning_attention.cuda_graph import record

Call = Callable[[], object]
# What is measured of a call: the device's time, by events; that on the wall, until the device has done what the call
# asks for; or what the call takes of the host, until it returns. On a CPU they are one.
Clock = Literal["device", "wall", "host"]
Ready = TypeVar("Ready")

# Zeroing this much evicts what a call left in L2. It takes a GPU longer than the host takes to enqueue any call here,
# about 1 ms, so that no call waits for its launches.
FLUSHED_BYTES, FLUSHES = 1 << 29, 8

MAX_RUNS = 100


class Contest(Generic[Ready]):
    """Implementations side by side. One that raises is out of what follows, with the reason; the others go on.

    Attributes:
        ready: what each of them has prepared, by name.
        failures: the reasons, by name.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.ready: dict[str, Ready] = {}
        self.failures: dict[str, str] = {}

    def prepare(self, name: str, prepare: Callable[[], Ready]) -> None:
        try:
            self.ready[name] = prepare()
        except Exception as error:  # whatever an implementation raises is its result
            self.failures[name] = reason(error)
        release(self.device)

    def times(self, call_of: Callable[[Ready], Call], seconds: float, clock: Clock = "device") -> dict[str, float]:
        """Of a call of each, as `interleaved_times`."""
        calls = {name: call_of(ready) for name, ready in self.ready.items()}
        times, failures = interleaved_times(calls, seconds, self.device, clock)
        for name, why in failures.items():
            self.failures[name] = why
            del self.ready[name]
        return times

    def record(self, name: str, sizes: dict[str, Any], facts: Callable[[Ready], dict[str, Any]]) -> dict[str, Any]:
        """Name, sizes, and then the facts, or `not_measured`: the reason why there are none."""
        found = {"not_measured": self.failures[name]} if name in self.failures else facts(self.ready[name])
        return {"implementation": name, **sizes, **found}


def interleaved_times(
    calls: dict[str, Call], seconds: float, device: torch.device, clock: Clock = "device"
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of each call, taken in turns so that a noisy moment falls on all of them: their median.

    Of the host it is the least, since what else runs on its cores makes the same call take up to twice as long.

    Args:
        calls: by name.
        seconds: to spend on each call, about. After one run that is not counted a call runs at least five times (three
            where it takes over 0.1 s) and at most 100.
        device: whose time is measured.
        clock: what is measured.

    Returns:
        The times, and the reasons of those that raised.
    """
    timers = {"device": _event_timer, "wall": _wall_timer, "host": _host_timer}
    timed = timers["wall" if device.type == "cpu" else clock](device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    failures: dict[str, str] = {}

    def run(name: str) -> float:
        try:
            return timed(calls[name])
        except Exception as error:  # whatever a call raises is its result
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
    """An exception in one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:200]


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Memory that a call takes at its peak beyond what was in use before, its results included.

    On a CPU this is resident memory, which only Linux with glibc lets a process measure; None elsewhere.
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
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed would hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
        before = _kibibytes("/proc/self/status", "VmRSS")
        call()
        return max(_kibibytes("/proc/self/status", "VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def captured(call: Call) -> Call:
    """The same call, recorded as a CUDA graph: it returns what the recorded one did, made anew by every replay."""
    graph, result = record(call)

    def replay() -> object:
        graph.replay()
        return result

    return replay


def release(device: torch.device) -> None:
    """What an implementation has left, for the next one."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int | None:
    """Memory that is left; None where only trying tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return _kibibytes("/proc/meminfo", "MemAvailable")
    except OSError:
        return None


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy that no cache holds."""
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


def _kibibytes(file: str, field: str) -> int:
    """In bytes, a field that the kernel tells in KiB."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in {file}")
