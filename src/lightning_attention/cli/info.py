"""`lightning-attention info`: versions, devices and backends."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from ..ops.backends import BACKENDS
from ..ops.problem import Problem

PACKAGES = ("torch", "triton", "transformers", "accelerate", "tokenizers", "safetensors")


def info() -> None:
    """Show versions, devices, and the backends with the reasons why one cannot run."""
    console = Console(soft_wrap=True, markup=False, emoji=False)
    table = Table("package", "version", box=None)
    table.add_row("lightning-attention", _version("lightning-attention"))
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        table.add_row(package, _version(package))
    console.print(table)

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    table = Table("device", "name", box=None)
    for device in devices:
        table.add_row(str(device), _name(device))
    console.print()
    console.print(table)

    table = Table("backend", "device", "runs", box=None)
    for name, backend in BACKENDS.items():
        for device in devices:
            problem = Problem(1, 1024, 8, 128, 128, 1, _dtype(device), device)
            reasons = backend.unsupported_reasons(problem)
            table.add_row(name, str(device), f"no: {'; '.join(reasons)}" if reasons else "yes")
    console.print()
    console.print(table)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
