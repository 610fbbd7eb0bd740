"""Commands of `python -m benchmarks`."""

from functools import cache
from pathlib import Path
from typing import Annotated

import torch
import typer
from typer import Option

from lightning_attention.cli.options import (
    Command,
    check_at_least,
    given_options,
    option_names,
    show_help_without_command,
)
from lightning_attention.extras import require

from .options import (
    OUTPUT,
    Compile,
    Device,
    Dtype,
    Output,
    Size,
    check_belongs,
    check_only,
    console,
    device_of,
    doubling,
    dtype_of,
    hopper_device,
    or_default,
    run_benchmarks,
    size_of,
    write_results,
)
from .paper.commands import app as paper

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.add_typer(paper, name="paper")

MAX_GPUS = 100_000  # the cost model of a ring goes through its links one by one


@app.callback(invoke_without_command=True)
def benchmarks(context: typer.Context) -> None:
    """Measure implementations side by side in one run."""
    show_help_without_command(context)
    require("bench", "matplotlib")


@app.command("op", cls=Command)
def op(
    output: Output = OUTPUT,
    only: Annotated[
        str | None,
        Option(
            help="table: shapes of some models; sweep: doubling lengths; invariant: what invariant=True costs. By "
            "default table and sweep on a GPU, sweep on a CPU."
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        Option(
            help="Sequence length of the sweep; repeat for more. By default doubling from 512 to 1048576 on a GPU, to "
            "65536 on a CPU. This or another size leaves out the table."
        ),
    ] = None,
    batch_size: Annotated[int | None, Option(help="Sequences of the sweep. By default 1.")] = None,
    heads: Annotated[int | None, Option(help="Heads of the sweep. By default 16 on a GPU, 8 on a CPU.")] = None,
    head_dim: Annotated[
        int | None, Option(help="Head size of the sweep, K = V. By default 128 on a GPU, 64 on a CPU.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    softmax_up_to: Annotated[
        int | None,
        Option(
            help="Longest sequence for quadratic implementations. By default 65536 on a GPU, 32768 in the table, "
            "16384 on a CPU."
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        Option(
            help="Approximate time of each measurement, 0 for the fewest runs. By default 0.2 on a GPU, 2 on a CPU."
        ),
    ] = None,
) -> None:
    """The operator, forward and backward, next to other implementations and scaled_dot_product_attention."""
    from .cases import INVARIANT, TABLE, OpCase
    from .implementations import IMPLEMENTATIONS, INVARIANT_IMPLEMENTATIONS
    from .op import benchmark
    from .plot import plot_sweep
    from .run import Plot

    torch_device = device_of(device)
    torch_dtype = dtype_of(dtype, torch_device)
    on_gpu = torch_device.type == "cuda"
    check_only(only, ("table", "sweep", "invariant"))
    has_sizes = any(size is not None for size in (length, batch_size, heads, head_dim))
    if only in ("table", "invariant") and has_sizes:
        sizes = "--length, --batch-size, --heads and --head-dim"
        raise ValueError(f"--only {only} has sizes of its own: leave out {sizes}")
    # Longest first: an implementation that tunes itself at its first call keeps that choice for all lengths.
    lengths = sorted(set(length or doubling(512, 12 if on_gpu else 8)), reverse=True)
    batch_size = or_default(batch_size, 1)
    heads, head_dim = or_default(heads, 16 if on_gpu else 8), or_default(head_dim, 128 if on_gpu else 64)
    seconds = or_default(seconds, 0.2 if on_gpu else 2.0)
    check_at_least(1, length=lengths, batch_size=batch_size, heads=heads, head_dim=head_dim)
    check_at_least(0, softmax_up_to=softmax_up_to, seconds=seconds)
    kinds = [only] if only else ["table", "sweep"] if on_gpu and not has_sizes else ["sweep"]
    cases = {
        "table": [OpCase(B, T, H, D, torch_dtype, packed) for B, T, H, D, packed in TABLE],
        "sweep": [OpCase(batch_size, length, heads, head_dim, torch_dtype) for length in lengths],
        "invariant": [OpCase(B, T, H, D, torch_dtype, packed) for B, T, H, D, packed in INVARIANT[torch_device.type]],
    }
    up_to = {"table": 1 << 15 if on_gpu else 1 << 14, "sweep": 1 << 16 if on_gpu else 1 << 14, "invariant": 0}
    measured = [
        benchmark(
            kind,
            cases[kind],
            torch_device,
            softmax_up_to=or_default(softmax_up_to, up_to[kind]),
            seconds=seconds,
            implementations=INVARIANT_IMPLEMENTATIONS if kind == "invariant" else IMPLEMENTATIONS,
        )
        for kind in kinds
    ]
    run_benchmarks("op", measured, Plot("sweep", plot_sweep), torch_device, torch_dtype, output)


@app.command("decode", cls=Command)
def decode(
    output: Output = OUTPUT,
    only: Annotated[
        str | None,
        Option(
            help="kernel: the operator alone; model: a token of a model against context length; engine: many requests "
            "at once. By default all of them."
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
    size: Size = None,
    dtype: Dtype = None,
    device: Device = None,
    seconds: Annotated[
        float | None,
        Option(help="Approximate time of a measurement, 0 for the fewest runs. By default 0.2 on a GPU, 0.5 on a CPU."),
    ] = None,
) -> None:
    """Decoding: the operator, a model next to softmax attention with a KV cache, and the engine next to generate()."""
    from . import cases, decode_kernel
    from .plot import plot_model
    from .run import Plot

    torch_device = device_of(device)
    torch_dtype = dtype_of(dtype, torch_device)
    on_gpu = torch_device.type == "cuda"
    check_only(only, ("kernel", "model", "engine"))
    check_belongs(only, ("model",), length=length, batch_size=batch_size)
    check_belongs(only, ("engine",), max_requests=max_requests)
    check_belongs(only, ("model", "engine"), size=size)
    lengths = sorted(set(length or doubling(1024, 11 if on_gpu else 7)))
    batch_size, max_requests = or_default(batch_size, 1), or_default(max_requests, 64)
    seconds = or_default(seconds, 0.2 if on_gpu else 0.5)
    check_at_least(1, length=lengths, batch_size=batch_size, max_requests=max_requests)
    check_at_least(0, seconds=seconds)
    size = size_of(size, torch_device)
    measured = []
    if only in (None, "kernel"):
        steps = [cases.StepCase(batch, 64, 128, torch_dtype) for batch in cases.STEP_BATCHES[torch_device.type]]
        measured.append(decode_kernel.benchmark(steps, torch_device, seconds=seconds))
    if only != "kernel":
        from . import decode_engine, decode_model

        model = cache(lambda: decode_model.random_model(size, torch_dtype, torch_device))
        if only != "engine":
            contexts = [cases.ContextCase(batch_size, length) for length in lengths]
            measured.append(decode_model.benchmark(contexts, model, size, torch_device, seconds=seconds))
        if only != "model":
            serving = [cases.ServingCase(*cases.REQUESTS[torch_device.type], max_requests)]
            measured.append(decode_engine.benchmark(serving, model, size, torch_device, seconds=seconds))
    run_benchmarks("decode", measured, Plot("model", plot_model), torch_device, torch_dtype, output)


@app.command("train", cls=Command)
def train(
    output: Output = OUTPUT,
    length: Annotated[
        list[int] | None,
        Option(
            help="Tokens of the sequence; repeat for more. By default doubling from 65536 to 4194304 on a GPU, from "
            "1024 to 16384 on a CPU."
        ),
    ] = None,
    segment_length: Annotated[
        int | None, Option(help="Tokens of a training segment. By default 32768 on a GPU, 512 on a CPU.")
    ] = None,
    size: Size = None,
    dtype: Dtype = None,
    device: Device = None,
    compile: Annotated[bool, Option("--compile", help="Compile the layers.")] = False,
) -> None:
    """A training step against the length of one sequence, in segments, and at once up to 4 segments."""
    from .cases import TrainingCase
    from .plot import plot_training
    from .run import Plot
    from .train import benchmark

    torch_device = device_of(device)
    torch_dtype = dtype_of(dtype, torch_device)
    on_gpu = torch_device.type == "cuda"
    lengths = sorted(set(length or doubling(65536 if on_gpu else 1024, 7 if on_gpu else 5)))
    segment_length = or_default(segment_length, 32768 if on_gpu else 512)
    check_at_least(1, segment_length=segment_length)
    check_at_least(2, length=lengths)
    cases = [TrainingCase(length, segment_length) for length in lengths]
    measured = benchmark(cases, size_of(size, torch_device), torch_device, torch_dtype, compiled=compile)
    run_benchmarks("train", [measured], Plot("train", plot_training), torch_device, torch_dtype, output)


@app.command("speed", cls=Command)
def speed(
    output: Output = OUTPUT,
    size: Annotated[
        list[str] | None,
        Option(help="Size, as in train; repeat for more. By default 385M, 1B and 3B on a GPU, demo on a CPU."),
    ] = None,
    length: Annotated[
        list[int] | None,
        Option(
            help="Tokens of a sequence; repeat for more. By default doubling from 1024 to 131072 for the first size "
            "and 4096 for others on a GPU, 256 to 4096 on a CPU."
        ),
    ] = None,
    tokens: Annotated[
        int | None, Option(help="Tokens of a step, at least one sequence. By default as many as fit: 65536 for 385M.")
    ] = None,
    attention: Annotated[
        list[str] | None,
        Option(help="Another attention in our model, as train --attention takes it; repeat for more."),
    ] = None,
    fp8: Annotated[bool, Option("--fp8", help="Also our model with products in float8, by torchao.")] = False,
    steps: Annotated[int, Option(help="Steps to measure.")] = 5,
    dtype: Dtype = None,
    device: Device = None,
    compile: Compile = None,
) -> None:
    """Training steps of models, beside a LLaMA of equal size, at several lengths."""
    from lightning_attention.models.float8 import float8_error
    from lightning_attention.models.mixers import attention_options

    from .speed import SpeedCase, benchmark, default_tokens

    attentions = list(dict.fromkeys(attention or ()))
    for name in attentions:
        attention_options(name)  # raises for an unknown one
        if name == "lightning":
            raise ValueError("lightning attention is measured in any case: --attention adds others")
    torch_device = device_of(device)
    torch_dtype = dtype_of(dtype, torch_device)
    on_gpu = torch_device.type == "cuda"
    check_at_least(1, steps=steps, tokens=tokens)
    check_at_least(2, length=length)
    sizes = [size_of(name, torch_device) for name in size or (["385M", "1B", "3B"] if on_gpu else ["demo"])]
    cases = []
    for name in sizes:
        default = doubling(1024, 8) if on_gpu and name == sizes[0] else [4096] if on_gpu else [256, 1024, 4096]
        for T in sorted(set(length or default)):
            cases.append(SpeedCase(name, T, max(T, tokens or default_tokens(name))))
    compiled = on_gpu if compile is None else compile
    if fp8 and (error := float8_error(torch_device)) is not None:
        raise ValueError(f"--fp8 is not possible on this machine: {error}")
    options = {"attentions": attentions, "fp8": fp8, "compiled": compiled, "steps": steps}
    measured = benchmark(cases, torch_device, torch_dtype, **options)
    run_benchmarks("speed", [measured], None, torch_device, torch_dtype, output)


@app.command("mixers", cls=Command)
def mixers(
    output: Output = OUTPUT,
    only: Annotated[
        str | None,
        Option(
            help="training: steps against the sequence length; decoding: a token against the context; loss: what is "
            "learned from the same text. By default all of them."
        ),
    ] = None,
    attention: Annotated[
        list[str] | None,
        Option(
            help="Attention to measure, as train --attention takes it; repeat for more. By default every one, softmax "
            "and the hybrid 3:1."
        ),
    ] = None,
    size: Size = None,
    length: Annotated[
        list[int] | None,
        Option(
            help="Tokens of a sequence and of a context; repeat for more. By default 1024, 8192 and 65536 on a GPU, "
            "256, 1024 and 4096 on a CPU."
        ),
    ] = None,
    tokens: Annotated[
        int | None, Option(help="Tokens of a training step, at least one sequence. By default as many as fit.")
    ] = None,
    trained_size: Annotated[
        str | None, Option(help="Size of the model whose loss is measured. By default 45M on a GPU, demo on a CPU.")
    ] = None,
    steps: Annotated[
        int | None, Option(help="Steps to train it, of 8192 bytes. By default 1000 on a GPU, 50 on a CPU.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    compile: Compile = None,
    seconds: Annotated[
        float | None, Option(help="Approximate time to decode. By default 0.2 on a GPU, 0.5 on a CPU.")
    ] = None,
) -> None:
    """Every attention in the same model: training, decoding, and the loss after the same text."""
    from lightning_attention.models.mixers import ATTENTIONS, SOFTMAX, attention_options

    from .mixers import (
        DECODING,
        KINDS,
        LOSS,
        TRAINING,
        LossCase,
        StepCase,
        decoding_benchmark,
        loss_benchmark,
        plot_mixers,
        training_benchmark,
    )
    from .run import Plot
    from .speed import default_tokens

    torch_device = device_of(device)
    torch_dtype = dtype_of(dtype, torch_device)
    on_gpu = torch_device.type == "cuda"
    check_only(only, ("training", "decoding", "loss"))
    check_belongs(only, ("training", "decoding"), size=size, length=length, dtype=dtype)
    check_belongs(only, ("training",), tokens=tokens, compile=compile)
    check_belongs(only, ("decoding",), seconds=seconds)
    check_belongs(only, ("loss",), trained_size=trained_size, steps=steps)
    names = tuple(dict.fromkeys(attention or [*ATTENTIONS, SOFTMAX, "3:1"]))
    for name in names:
        attention_options(name)  # raises for an unknown one
    size, trained = size_of(size, torch_device), size_of(trained_size or ("45M" if on_gpu else "demo"), torch_device)
    lengths = sorted(set(length or ((1024, 8192, 65536) if on_gpu else (256, 1024, 4096))))
    steps, seconds = or_default(steps, 1000 if on_gpu else 50), or_default(seconds, 0.2 if on_gpu else 0.5)
    check_at_least(2, length=lengths)
    check_at_least(1, tokens=tokens, steps=steps)
    check_at_least(0, seconds=seconds)
    cases = [StepCase(names, size, length, tokens or default_tokens(size)) for length in lengths]
    losses = [LossCase(name, trained, steps) for name in names]
    measured = {
        TRAINING: training_benchmark(cases, torch_device, torch_dtype, compiled=on_gpu if compile is None else compile),
        DECODING: decoding_benchmark(cases, torch_device, torch_dtype, seconds=seconds),
        LOSS: loss_benchmark(losses, torch_device),
    }
    kinds = [f"mixers-{only}"] if only else KINDS
    plot = Plot(kinds[0], plot_mixers)
    run_benchmarks("mixers", [measured[kind] for kind in kinds], plot, torch_device, torch_dtype, output)


@app.command("parallel", cls=Command)
def parallel(
    output: Annotated[Path, Option(help="Folder for parallel.json.")] = OUTPUT,
    processes: Annotated[int | None, Option(help="Processes, by default one a GPU, or 2 on a CPU.")] = None,
    size: Size = None,
    sharded_size: Annotated[
        str | None, Option(help="Size of the sharded model. By default 3B on a GPU, demo on a CPU.")
    ] = None,
    length: Annotated[
        int | None, Option(help="Tokens of a sequence that is not shared. By default 4096 on a GPU, 256 on a CPU.")
    ] = None,
    tokens: Annotated[
        int | None, Option(help="Tokens of a process. By default as many as fit: 65536 for 385M, 8192 for 3B.")
    ] = None,
    sequence_tokens: Annotated[
        int | None,
        Option(help="Tokens of a process of a shared sequence. By default 131072 on a GPU, 1024 on a CPU."),
    ] = None,
    steps: Annotated[int, Option(help="Steps to measure.")] = 5,
    device: Device = None,
    compile: Compile = None,
) -> None:
    """Training steps on several GPUs beside one: data parallel, sharded, and sequence parallel."""
    from .parallel import cases, measure
    from .speed import default_tokens

    torch_device = device_of(device)
    on_gpu = torch_device.type == "cuda"
    processes = or_default(processes, torch.cuda.device_count() if on_gpu else 2)
    length, shared = (
        or_default(length, 4096 if on_gpu else 256),
        or_default(sequence_tokens, 1 << 17 if on_gpu else 1024),
    )
    check_at_least(2, processes=processes, length=length, sequence_tokens=shared)
    check_at_least(length, tokens=tokens)
    check_at_least(1, steps=steps)
    if on_gpu and processes > torch.cuda.device_count():
        raise ValueError(f"--processes must be at most the number of GPUs, {torch.cuda.device_count()}")
    whole = size_of(size, torch_device)
    sharded = size_of(sharded_size or ("3B" if on_gpu else None), torch_device)
    of_whole, of_sharded = (max(length, tokens or default_tokens(name)) for name in (whole, sharded))
    compiled = on_gpu if compile is None else compile
    chosen = list(cases(whole, sharded, of_whole, of_sharded, shared, length))
    write_results(
        "parallel", measure(chosen, torch_device.type, processes, compiled=compiled, steps=steps), torch_device, output
    )


@app.command("scaling", cls=Command)
def scaling(
    context: typer.Context,
    size: Annotated[str, Option(help="Size of the model, as in train.")] = "1B",
    tokens: Annotated[
        list[int] | None, Option(help="Tokens per GPU; repeat for more. By default 8192, 32768 and 131072.")
    ] = None,
    gpus: Annotated[
        list[int] | None,
        Option(help="GPUs, at most 100000; repeat for more. By default 8, 32, 128, 256 and 1024."),
    ] = None,
    batch_size: Annotated[int, Option(help="Sequences that the tokens of a GPU are slices of.")] = 1,
    blocks: Annotated[
        int | None, Option(help="Blocks that a ring splits a state into. By default as in the library.")
    ] = None,
    node_size: Annotated[int, Option(help="GPUs per node.")] = 8,
    network_gigabits: Annotated[float, Option(help="Gigabits per second from every GPU to other nodes.")] = 400.0,
    speed: Annotated[
        float | None,
        Option(help="Tokens per second and GPU without exchange. By default scaled from a published 1B model."),
    ] = None,
    published: Annotated[bool, Option("--check", help="Print predictions next to published figures instead.")] = False,
) -> None:
    """Tokens per second and GPU of sequence parallelism, by a cost model. Nothing is measured."""
    from lightning_attention.models import LightningConfig

    from .scaling import BLOCKS, Cluster, Compute, Link, Model, check, predictions, scaled_tokens_per_second

    if published:
        if extra := given_options(context) - {"published"}:
            raise ValueError(f"--check has options of its own: leave out {option_names(extra)}")
        print(*check(), sep="\n")
        return
    tokens, gpus = tokens or [8192, 32768, 131072], gpus or [8, 32, 128, 256, 1024]
    blocks = or_default(blocks, BLOCKS)
    check_at_least(1, tokens=tokens, gpus=gpus, batch_size=batch_size, blocks=blocks, node_size=node_size)
    if max(gpus) > MAX_GPUS:
        raise ValueError(f"--gpus must be at most {MAX_GPUS}, got {max(gpus)}")
    for name, value in (("--network-gigabits", network_gigabits), ("--speed", speed)):
        if value is not None and not 1e-6 <= value <= 1e12:
            raise ValueError(f"{name} must be between 1e-6 and 1e12, got {value}")
    config = LightningConfig.from_size(size_of(size, torch.device("cpu")))
    model = Model([config.layer_state_shape(i) for i in range(config.num_hidden_layers)], batch_size)
    cluster = Cluster(node_size, network=Link(network_gigabits * 1e9 / 8, Cluster.network.latency))
    compute = Compute(speed or scaled_tokens_per_second(config))
    print(*predictions(model, compute, cluster, blocks, tokens, gpus), sep="\n")


@app.command("step", cls=Command)
def step(
    output: Annotated[Path, Option(help="Folder for step.json.")] = OUTPUT,
    size: Size = None,
    length: Annotated[int, Option(help="Tokens of the sequence.")] = 8192,
) -> None:
    """A training step of a model with the kernels for Hopper and with the portable ones, on a Hopper GPU."""
    from .step import measure

    check_at_least(2, length=length)
    device = hopper_device()
    write_results("step", measure(size_of(size, device), length, device), device, output)


@app.command("segments", cls=Command)
def segments(output: Annotated[Path, Option(help="Folder for segments.json.")] = OUTPUT) -> None:
    """The kernels for Hopper in every number of segments, with few heads, on a Hopper GPU."""
    device, results = hopper_device(), []
    from .segments import cases, measure

    for case, counts in cases():
        results.append(measure(case, counts, device))
        write_results("segments", results, device, output)


@app.command("heads", cls=Command)
def heads(output: Annotated[Path, Option(help="Folder for heads.json.")] = OUTPUT) -> None:
    """The kernels for Hopper with as many heads as multiprocessors and with more, as chosen and not cut."""
    device, results = hopper_device(), []
    from .segments import cases_of_many_heads, measure

    for case in cases_of_many_heads():
        results.append(measure(case, [1], device))
        write_results("heads", results, device, output)


@app.command("host", cls=Command)
def host(output: Annotated[Path, Option(help="Folder for host.json.")] = OUTPUT, device: Device = None) -> None:
    """Time that calls on small inputs keep the host."""
    from .host import measure

    torch_device = device_of(device)
    write_results("host", measure(torch_device), torch_device, output)


@app.command("tables", cls=Command)
def tables() -> None:
    """Write docs/benchmarks.md and docs/paper.md from the files in benchmarks/results."""
    from .pages import PAGES, ROOT, text_of

    for page in PAGES:
        (ROOT / page).write_text(text_of(page), encoding="utf-8")
        console().print(f"wrote {page}")


@app.command("counters", cls=Command)
def counters(output: Annotated[Path, Option(help="Folder for counters.json.")] = OUTPUT) -> None:
    """Hardware counters of the kernels for Hopper, by Nsight Compute (ncu), on a Hopper GPU."""
    from .counters import SHAPES, measure

    device, results = hopper_device(), []
    for shape in SHAPES:
        results.append(measure(*shape))
        write_results("counters", results, device, output)
