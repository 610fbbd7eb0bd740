"""Options of `python -m benchmarks`, their defaults, and what its commands share."""

import json
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import torch
from rich.console import Console
from typer import Option

if TYPE_CHECKING:
    from .run import Benchmark, Plot

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}

Output = Annotated[
    Path,
    Option(help="Folder for the results and the plot. Runs of other kinds from the same device and commit are kept."),
]
Dtype = Annotated[
    str | None, Option(help="float32, bfloat16 or float16. By default bfloat16 on a GPU, float32 on a CPU.")
]
Device = Annotated[str | None, Option(help="cpu or cuda. By default cuda if PyTorch sees a GPU.")]
Size = Annotated[str | None, Option(help="Size of the model, as in train. By default 385M on a GPU, demo on a CPU.")]
Compile = Annotated[bool | None, Option("--compile/--no-compile", help="Compile the layers. By default on a GPU.")]
OUTPUT = Path("benchmark")

Value = TypeVar("Value")


def doubling(start: int, count: int) -> list[int]:
    return [start << i for i in range(count)]


def or_default(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def size_of(name: str | None, device: torch.device) -> str:
    from lightning_attention.models import SIZES

    name = name or ("385M" if device.type == "cuda" else "demo")
    if name not in SIZES:
        raise ValueError(f"--size must be one of {', '.join(SIZES)}, got {name!r}")
    return name


def device_of(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU")
    return torch.device(name)


def hopper_device() -> torch.device:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise ValueError("this benchmark needs a GPU of compute capability 9.0 (H100, H200)")
    return torch.device("cuda")


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    name = name or ("bfloat16" if device.type == "cuda" else "float32")
    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def check_only(only: str | None, kinds: Sequence[str]) -> None:
    if only not in (None, *kinds):
        raise ValueError(f"--only must be {', '.join(kinds[:-1])} or {kinds[-1]}, got {only!r}")


def check_belongs(only: str | None, kinds: Sequence[str], **options: object) -> None:
    """Refuse options that are given and belong to other kinds than the one that --only chooses."""
    for name, value in options.items():
        if value is not None and only not in (None, *kinds):
            option = name.replace("_", "-")
            raise ValueError(f"--only {only} does not go with --{option}, which is for {' and '.join(kinds)}")


def console() -> Console:
    return Console(soft_wrap=True, markup=False, emoji=False, highlight=False)


def command_line() -> str:
    return shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])


def run_benchmarks(
    name: str,
    measured: Sequence["Benchmark"],
    plot: "Plot | None",
    device: torch.device,
    dtype: torch.dtype,
    output: Path,
) -> None:
    from .run import run

    printer = console()
    for path in run(
        name, measured, plot, device, dtype=dtype, command=command_line(), output=output, echo=printer.print
    ):
        printer.print(f"wrote {path}")


def write_results(name: str, results: Any, device: torch.device, output: Path) -> None:
    """Write the results so far, and print the last of them."""
    from .machine import machine
    from .report import write

    time = datetime.now(UTC).isoformat(timespec="seconds")
    document = {"machine": machine(device), "command": command_line(), "time": time, "results": results}
    write(document, output / f"{name}.json")
    console().print(json.dumps(results[-1] if isinstance(results, list) else results, indent=1))
