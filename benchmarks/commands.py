"""The commands of `python -m benchmarks`."""

import shlex
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from typer import Option

from lightning_attention.cli.options import (
    Command,
    check_at_least,
    given_options,
    option_names,
    show_help_without_command,
)
from lightning_attention.extras import require

if TYPE_CHECKING:
    from .run import Picture, Plan

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

MAX_GPUS = 100_000  # the model of a chain goes through its links one by one
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


@app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Measure implementations side by side."""
    show_help_without_command(context)
    require("bench", "matplotlib")


@app.command("op", cls=Command)
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
        float | None,
        Option(help="To spend on each measurement, about; 0: the fewest runs. By default 0.2 on a GPU, 2 on a CPU."),
    ] = None,
) -> None:
    """The operator, forward and backward, beside other implementations and scaled_dot_product_attention."""
    from .cases import TABLE, OpCase
    from .op import plan
    from .plot import plot_sweep
    from .run import Picture

    torch_device = _device(device)
    torch_dtype = _dtype(dtype, torch_device)
    on_gpu = torch_device.type == "cuda"
    _check_only(only, ("table", "sweep"))
    has_sizes = any(size is not None for size in (length, batch_size, heads, head_dim))
    if only == "table" and has_sizes:
        raise ValueError("--only table has sizes of its own: leave out --length, --batch-size, --heads and --head-dim")

    def or_default(given, gpu, cpu):
        return given if given is not None else gpu if on_gpu else cpu

    # The longest first: an implementation that tunes itself at its first call keeps what it found for all lengths.
    lengths = sorted(set(length or [512 << i for i in range(12 if on_gpu else 8)]), reverse=True)
    batch_size = or_default(batch_size, 1, 1)
    heads, head_dim = or_default(heads, 16, 8), or_default(head_dim, 128, 64)
    seconds = or_default(seconds, 0.2, 2.0)
    check_at_least(1, length=lengths, batch_size=batch_size, heads=heads, head_dim=head_dim)
    check_at_least(0, softmax_up_to=softmax_up_to, seconds=seconds)
    kinds = [only] if only else ["table", "sweep"] if on_gpu and not has_sizes else ["sweep"]
    cases = {
        "table": [OpCase(B, T, H, D, torch_dtype, documents) for B, T, H, D, documents in TABLE],
        "sweep": [OpCase(batch_size, length, heads, head_dim, torch_dtype) for length in lengths],
    }
    up_to = {"table": or_default(softmax_up_to, 1 << 15, 1 << 14), "sweep": or_default(softmax_up_to, 1 << 16, 1 << 14)}
    plans = [plan(kind, cases[kind], torch_device, softmax_up_to=up_to[kind], seconds=seconds) for kind in kinds]
    _run("op", plans, Picture("sweep", plot_sweep), torch_device, torch_dtype, output)


@app.command("decode", cls=Command)
def decode(
    output: Annotated[
        Path,
        Option(
            help="Folder for decode.json and decode.png. Of a decode.json in it from the same device and commit, runs "
            "of other kinds are kept."
        ),
    ] = Path("benchmark"),
    only: Annotated[
        str | None,
        Option(
            help="kernel: the operator alone; model: a token of a whole model against the length of its context; "
            "engine: many requests at once. By default all of them."
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        Option(
            help="Context length of the model; repeat for more. By default doubling from 1024 to 1048576 on a GPU, to "
            "65536 on a CPU."
        ),
    ] = None,
    batch_size: Annotated[int | None, Option(help="Sequences that the model decodes. By default 1.")] = None,
    max_requests: Annotated[
        int | None, Option(help="Requests that the engine answers at a time. By default 64.")
    ] = None,
    size: Annotated[
        str | None, Option(help="Of model and engine, as in train. By default 385M on a GPU, demo on a CPU.")
    ] = None,
    dtype: Annotated[
        str | None, Option(help="float32, bfloat16 or float16. By default bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
    device: Annotated[str | None, Option(help="cpu or cuda. By default cuda where PyTorch sees a GPU.")] = None,
    seconds: Annotated[
        float | None,
        Option(
            help="To spend on each measurement, about; 0 for the fewest runs. By default 0.2 on a GPU, 0.5 on a CPU."
        ),
    ] = None,
) -> None:
    """Decoding: the operator, a model beside softmax attention with a KV cache, and many requests beside one by one."""
    from .plot import plot_model
    from .run import Picture

    torch_device = _device(device)
    torch_dtype = _dtype(dtype, torch_device)
    on_gpu = torch_device.type == "cuda"
    _check_only(only, ("kernel", "model", "engine"))
    for name, value, kinds in (
        ("--length", length, ("model",)),
        ("--batch-size", batch_size, ("model",)),
        ("--max-requests", max_requests, ("engine",)),
        ("--size", size, ("model", "engine")),
    ):
        if value is not None and only not in (None, *kinds):
            raise ValueError(f"--only {only} does not go with {name}, which is for {' and '.join(kinds)}")
    lengths = sorted(set(length or [1024 << i for i in range(11 if on_gpu else 7)]))
    batch_size = 1 if batch_size is None else batch_size
    max_requests = 64 if max_requests is None else max_requests
    seconds = (0.2 if on_gpu else 0.5) if seconds is None else seconds
    check_at_least(1, length=lengths, batch_size=batch_size, max_requests=max_requests)
    check_at_least(0, seconds=seconds)
    size = _size(size, torch_device)
    kinds = [only] if only else ["kernel", "model", "engine"]
    plans = _decode_plans(kinds, lengths, batch_size, max_requests, size, torch_dtype, torch_device, seconds)
    _run("decode", plans, Picture("model", plot_model), torch_device, torch_dtype, output)


@app.command("train", cls=Command)
def train(
    output: Annotated[Path, Option(help="Folder for train.json and train.png.")] = Path("benchmark"),
    length: Annotated[
        list[int] | None,
        Option(
            help="Tokens of the sequence; repeat for more. By default doubling from 65536 to 4194304 on a GPU, from "
            "1024 to 16384 on a CPU."
        ),
    ] = None,
    segment_length: Annotated[
        int | None, Option(help="Tokens of a segment. By default 32768 on a GPU, 512 on a CPU.")
    ] = None,
    size: Annotated[
        str | None, Option(help="Of the model, as in train. By default 385M on a GPU, demo on a CPU.")
    ] = None,
    dtype: Annotated[
        str | None,
        Option(
            help="Of the autocast: float32 for none, bfloat16, float16. By default bfloat16 on a GPU, float32 on a CPU."
        ),
    ] = None,
    device: Annotated[str | None, Option(help="cpu or cuda. By default cuda where PyTorch sees a GPU.")] = None,
    compile: Annotated[bool, Option("--compile", help="torch.compile the model.")] = False,
) -> None:
    """A step of training against the length of one sequence, by segments, beside the whole where it is short."""
    from . import train as bench_train
    from .cases import TrainingCase
    from .plot import plot_training
    from .run import Picture

    torch_device = _device(device)
    torch_dtype = _dtype(dtype, torch_device)
    on_gpu = torch_device.type == "cuda"
    lengths = sorted(set(length or [(65536 if on_gpu else 1024) << i for i in range(7 if on_gpu else 5)]))
    segment_length = (32768 if on_gpu else 512) if segment_length is None else segment_length
    if (least := min([*lengths, segment_length])) < 1:
        raise ValueError(f"lengths and --segment-length must be at least 1, got {least}")
    check_at_least(2, length=lengths)
    size = _size(size, torch_device)
    cases = [TrainingCase(length, segment_length) for length in lengths]
    plan = bench_train.plan(
        cases,
        lambda: bench_train.random_model(size, torch_device, compiled=compile),
        size,
        torch_device,
        torch_dtype,
    )
    _run("train", [plan], Picture("train", plot_training), torch_device, torch_dtype, output)


@app.command("scaling", cls=Command)
def scaling(
    context: typer.Context,
    size: Annotated[str, Option(help="Of the model, as in train.")] = "1B",
    tokens: Annotated[
        list[int] | None, Option(help="On each GPU; repeat for more. By default 8192, 32768 and 131072.")
    ] = None,
    gpus: Annotated[
        list[int] | None, Option(help="At most 100000; repeat for more. By default 8, 32, 128, 256 and 1024.")
    ] = None,
    batch_size: Annotated[int, Option(help="Sequences that the tokens of a GPU are slices of.")] = 1,
    blocks: Annotated[int | None, Option(help="That a ring cuts a state into. By default as ours does.")] = None,
    node_size: Annotated[int, Option(help="GPUs of a node.")] = 8,
    network_gigabits: Annotated[float, Option(help="Per second, from every GPU to other nodes.")] = 400.0,
    speed: Annotated[
        float | None,
        Option(help="Tokens per second and GPU without exchange. By default scaled from a published 1B model."),
    ] = None,
    published: Annotated[bool, Option("--check", help="Predictions beside published figures instead.")] = False,
) -> None:
    """Nothing is measured: tokens per second and GPU of sequence parallelism, by a model of its cost."""
    from lightning_attention.models import LightningConfig

    from .scaling import BLOCKS, Cluster, Compute, Link, Model, check, predictions, scaled_tokens_per_second

    if published:
        if extra := given_options(context) - {"published"}:
            raise ValueError(f"--check has options of its own: leave out {option_names(extra)}")
        print(*check(), sep="\n")
        return
    tokens, gpus = tokens or [8192, 32768, 131072], gpus or [8, 32, 128, 256, 1024]
    blocks = BLOCKS if blocks is None else blocks
    check_at_least(1, tokens=tokens, gpus=gpus, batch_size=batch_size, blocks=blocks, node_size=node_size)
    if max(gpus) > MAX_GPUS:
        raise ValueError(f"--gpus must be at most {MAX_GPUS}, got {max(gpus)}")
    for name, value in (("--network-gigabits", network_gigabits), ("--speed", speed)):
        if value is not None and not 1e-6 <= value <= 1e12:
            raise ValueError(f"{name} must be between 1e-6 and 1e12, got {value}")
    config = LightningConfig.from_size(_size(size, torch.device("cpu")))
    model = Model([config.layer_state_shape(i) for i in range(config.num_hidden_layers)], batch_size)
    cluster = Cluster(node_size, network=Link(network_gigabits * 1e9 / 8, Cluster.network.latency))
    compute = Compute(speed or scaled_tokens_per_second(config))
    print(*predictions(model, compute, cluster, blocks, tokens, gpus), sep="\n")


def _decode_plans(
    kinds: list[str],
    lengths: list[int],
    batch_size: int,
    max_requests: int,
    size: str,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> list["Plan"]:
    from . import cases, decode_kernel

    plans = {}
    if "kernel" in kinds:
        steps = [cases.StepCase(batch, 64, 128, dtype) for batch in cases.STEP_BATCHES[device.type]]
        plans["kernel"] = decode_kernel.plan(steps, device, seconds=seconds)
    if kinds != ["kernel"]:
        from . import decode_engine, decode_model

        model = cache(lambda: decode_model.random_model(size, dtype, device))
        contexts = [cases.ContextCase(batch_size, length) for length in lengths]
        plans["model"] = decode_model.plan(contexts, model, size, device, seconds=seconds)
        serving = [cases.ServingCase(*cases.REQUESTS[device.type], max_requests)]
        plans["engine"] = decode_engine.plan(serving, model, size, device, seconds=seconds)
    return [plans[kind] for kind in kinds]


def _size(name: str | None, device: torch.device) -> str:
    from lightning_attention.models import SIZES

    name = name or ("385M" if device.type == "cuda" else "demo")
    if name not in SIZES:
        raise ValueError(f"--size must be one of {', '.join(SIZES)}, got {name!r}")
    return name


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU")
    return torch.device(name)


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    name = name or ("bfloat16" if device.type == "cuda" else "float32")
    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _check_only(only: str | None, kinds: Sequence[str]) -> None:
    if only not in (None, *kinds):
        raise ValueError(f"--only must be {', '.join(kinds[:-1])} or {kinds[-1]}, got {only!r}")


def _run(
    name: str, plans: Sequence["Plan"], picture: "Picture", device: torch.device, dtype: torch.dtype, output: Path
) -> None:
    from .run import run

    console = Console(soft_wrap=True, markup=False, emoji=False)
    written = run(
        name,
        plans,
        picture,
        device,
        dtype=dtype,
        command=shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        output=output,
        echo=lambda line: console.print(line, highlight=False),
    )
    for path in written:
        console.print(f"wrote {path}")
