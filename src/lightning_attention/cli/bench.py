"""`lightning-attention bench`: measurements, side by side in one run."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from typer import Option

from ..extras import require

app = typer.Typer(help="Measure implementations side by side.", no_args_is_help=True)

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


@app.callback()
def bench() -> None:
    """Measure implementations side by side."""
    require("bench", "matplotlib")


@app.command("op")
def op(
    output: Annotated[
        Path,
        Option(
            help="Folder for op.json and op.png. Of an op.json in it from the same device and commit, a run of the "
            "table keeps the sweep and a run of the sweep keeps the table."
        ),
    ] = Path("benchmark"),
    only: Annotated[
        str | None,
        Option(help="table: some shapes of models; sweep: doubling lengths. By default both on a GPU, sweep on a CPU."),
    ] = None,
    length: Annotated[
        list[int] | None,
        Option(
            help="Length of a sweep; repeat for more. By default doubling from 512 to 1048576 on a GPU, to 65536 on a "
            "CPU. This or another size leaves the table out."
        ),
    ] = None,
    batch_size: Annotated[int | None, Option(help="Sequences of a sweep. By default 1.")] = None,
    heads: Annotated[int | None, Option(help="Heads of a sweep. By default 16 on a GPU, 8 on a CPU.")] = None,
    head_dim: Annotated[
        int | None, Option(help="Head size of a sweep, of keys and values. By default 128 on a GPU, 64 on a CPU.")
    ] = None,
    dtype: Annotated[
        str | None, Option(help="float32, bfloat16 or float16. By default bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
    device: Annotated[str | None, Option(help="cpu or cuda. By default cuda where PyTorch sees a GPU.")] = None,
    softmax_up_to: Annotated[
        int | None,
        Option(
            help="Longest sequence for quadratic implementations. By default 65536 on a GPU, 32768 in the table, "
            "16384 on a CPU."
        ),
    ] = None,
    seconds: Annotated[
        float | None, Option(help="To spend on each measurement, about. By default 0.2 on a GPU, 2 on a CPU.")
    ] = None,
) -> None:
    """The operator, forward and backward, beside other implementations and scaled_dot_product_attention."""
    from ..bench.cases import TABLE, OpCase
    from ..bench.run import Plan, run

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device == "cuda"
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if on_gpu and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if only not in (None, "table", "sweep"):
        raise ValueError(f"--only must be table or sweep, got {only!r}")
    has_sizes = any(size is not None for size in (length, batch_size, heads, head_dim))
    if only == "table" and has_sizes:
        raise ValueError("--only table has sizes of its own: leave out --length, --batch-size, --heads and --head-dim")

    def or_default(given, gpu, cpu):
        return given if given is not None else gpu if on_gpu else cpu

    # The longest first: an implementation that tunes itself at its first call keeps what it found for all lengths.
    lengths = sorted(set(length or [512 << i for i in range(12 if on_gpu else 8)]), reverse=True)
    batch_size = or_default(batch_size, 1, 1)
    heads, head_dim = or_default(heads, 16, 8), or_default(head_dim, 128, 64)
    if min([*lengths, batch_size, heads, head_dim]) < 1:
        raise ValueError("lengths, --batch-size, --heads and --head-dim must be at least 1")
    sweep = [OpCase(batch_size, length, heads, head_dim, DTYPES[dtype]) for length in lengths]
    table = [OpCase(*shape, DTYPES[dtype]) for shape in TABLE]
    plans = {
        "table": Plan("table", table, or_default(softmax_up_to, 1 << 15, 1 << 14)),
        "sweep": Plan("sweep", sweep, or_default(softmax_up_to, 1 << 16, 1 << 14)),
    }
    kinds = [only] if only else ["table", "sweep"] if on_gpu and not has_sizes else ["sweep"]
    console = Console(soft_wrap=True)
    written = run(
        [plans[kind] for kind in kinds],
        torch.device(device),
        seconds=or_default(seconds, 0.2, 2.0),
        command=shlex.join(["lightning-attention", *sys.argv[1:]]),
        output=output,
        echo=lambda line: console.print(line, highlight=False, markup=False),
    )
    for path in written:
        console.print(f"wrote {path}")
