"""Machine, versions and commit of a measurement."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

import lightning_attention

PACKAGES = ("triton", "flash-linear-attention", "fla-core", "lightning-attn")


def machine(device: torch.device) -> dict[str, Any]:
    """Describe device, versions and commit; None if unknown or not installed."""
    described: dict[str, Any] = {
        "device": _cpu() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning_attention": lightning_attention.__version__,
        "commit": _commit(),
    }
    if device.type == "cuda":
        described["cuda"] = torch.version.cuda
        described["driver"] = collect_env.get_nvidia_driver_version(collect_env.run)
        described |= {package: _version(package) for package in PACKAGES}
    return described


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout that the library is imported from, with `-dirty` if sources or benchmarks differ."""
    command = ["git", "-C", str(Path(lightning_attention.__file__).parent)]
    measured = ":/src", ":/benchmarks", ":(exclude,top)benchmarks/results"
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        status = [*command, "status", "--porcelain", "--", *measured]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("-dirty" if changed.strip() else "")
