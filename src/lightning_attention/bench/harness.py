"""Time and memory of a call, and the machine they were measured on."""

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..version import __version__


def interleaved_times(calls: dict[str, Callable[[], object]], seconds: float, device: torch.device) -> dict[str, float]:
    """Median seconds of each call, taken in turns so that a noisy moment falls on all of them.

    Args:
        calls: by name.
        seconds: to spend on each call, about; every call runs at least three times, after one that is not counted.
        device: whose work a call waits for.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        _timed(call, device)
    while unfinished := [name for name, spent in times.items() if len(spent) < 3 or sum(spent) < seconds]:
        for name in unfinished:
            times[name].append(_timed(calls[name], device))
    return {name: statistics.median(spent) for name, spent in times.items()}


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
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
        before = _resident("VmRSS")
        call()
        return max(_resident("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to place a number."""
    name = _cpu() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning_attention": __version__,
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the checkout this package is installed from, with `-dirty` if its source differs from it."""
    command = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*command, "status", "--porcelain", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("-dirty" if changed.stdout.strip() else "")
