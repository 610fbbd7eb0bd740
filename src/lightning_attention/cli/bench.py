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


@app.callback()
def bench() -> None:
    """Measure implementations side by side."""
    require("bench", "matplotlib")


@app.command("op")
def op(
    output: Annotated[Path, Option(help="Folder for op.json and op.png.")] = Path("benchmark"),
    length: Annotated[
        list[int] | None, Option(help="Sequence length; repeat for more. By default 512 to 65536, doubling.")
    ] = None,
    batch_size: Annotated[int, Option(help="Sequences.")] = 1,
    heads: Annotated[int, Option(help="Heads.")] = 8,
    head_dim: Annotated[int, Option(help="Head size, of keys and values.")] = 64,
    dtype: Annotated[str, Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, Option(help="cpu or cuda.")] = "cpu",
    softmax_up_to: Annotated[int, Option(help="Longest sequence for quadratic attention.")] = 16384,
    seconds: Annotated[float, Option(help="To spend on each measurement, about.")] = 2.0,
) -> None:
    """The operator, forward and backward, beside scaled_dot_product_attention."""
    from ..bench.cases import OpCase
    from ..bench.op import measure, write

    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if dtype not in dtypes:
        raise ValueError(f"--dtype must be one of {', '.join(dtypes)}, got {dtype!r}")
    lengths = sorted(set(length or [512 << i for i in range(8)]))
    if min([*lengths, batch_size, heads, head_dim]) < 1:
        raise ValueError("lengths, --batch-size, --heads and --head-dim must be at least 1")
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU")
    cases = [OpCase(batch_size, length, heads, head_dim, dtypes[dtype]) for length in lengths]
    console = Console(soft_wrap=True)
    console.print(f"{'length':>8}  {'implementation':30}{'ms':>10}{'µs/token':>10}{'memory/q':>10}{'speedup':>9}")
    records = []
    for record in measure(cases, target, softmax_up_to=softmax_up_to, seconds=seconds):
        records.append(record)
        memory, speedup = record["peak_over_q"], record["speedup"]
        console.print(
            f"{record['length']:>8}  {record['implementation']:30}{record['milliseconds']:>10.2f}"
            f"{record['microseconds_per_token']:>10.2f}"
            f"{'' if memory is None else f'{memory:.2f}':>10}{'' if speedup is None else f'{speedup:.2f}x':>9}",
            highlight=False,
        )
    command = shlex.join(["lightning-attention", *sys.argv[1:]])
    for path in write(records, target, command, output):
        console.print(f"wrote {path}")
