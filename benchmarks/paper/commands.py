"""Commands of `python -m benchmarks paper`: the papers' tables and figures."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from typer import Option

from lightning_attention.cli.options import Command, check_at_least, show_help_without_command

from ..options import (
    DTYPES,
    OUTPUT,
    Compile,
    Device,
    Dtype,
    Output,
    console,
    device_of,
    doubling,
    dtype_of,
    or_default,
    run_benchmarks,
    size_of,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

CORPUS = Path("corpus")
CorpusFolder = Annotated[Path, Option(help="Folder that `paper corpus` has written.")]
Lengths = Annotated[list[int] | None, Option(help="Tokens of a sequence; repeat for more.")]
# Sizes of a model that a CPU trains in minutes, with eight layers as 7:1 needs.
SMALL = {"num_hidden_layers": 8, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}


@app.callback(invoke_without_command=True)
def paper(context: typer.Context) -> None:
    """Redo the tables and figures of the papers: 2401.04658 (LA-2) and 2405.17381 (TNL)."""
    show_help_without_command(context)


@app.command("corpus", cls=Command)
def corpus(
    output: Annotated[Path, Option(help="Folder for the corpus.")] = CORPUS,
    package: Annotated[
        list[str] | None, Option(help="Debian package; repeat for more. By default a list of documentation.")
    ] = None,
) -> None:
    """Text of Debian's documentation: the corpus of `learn` and `length`. Needs Debian's apt-get."""
    from .corpus import PACKAGES, build

    printer = console()
    build(output, list(dict.fromkeys(package or PACKAGES)), printer.print)
    printer.print(f"wrote {output}")


@app.command("training", cls=Command)
def training(
    output: Output = OUTPUT,
    size: Annotated[
        list[str] | None,
        Option(help="Size, as in train; repeat for more. By default 385M, 1B and 3B on a GPU, demo on a CPU."),
    ] = None,
    length: Lengths = None,
    tokens: Annotated[
        int | None, Option(help="Tokens of a step, at least one sequence. By default as many as fit: 65536 for 385M.")
    ] = None,
    steps: Annotated[int, Option(help="Steps to measure.")] = 5,
    dtype: Dtype = None,
    device: Device = None,
    compile: Compile = None,
) -> None:
    """Tokens a second of training (LA-2, Table 1): Lightning-2, Lightning-1 and a LLaMA."""
    from ..speed import SpeedCase, default_tokens
    from .training import LENGTHS, benchmark

    torch_device = device_of(device)
    torch_dtype, on_gpu = dtype_of(dtype, torch_device), torch_device.type == "cuda"
    check_at_least(1, steps=steps, tokens=tokens)
    check_at_least(2, length=length)
    sizes = [size_of(name, torch_device) for name in size or (["385M", "1B", "3B"] if on_gpu else ["demo"])]
    lengths = sorted(set(length or (LENGTHS if on_gpu else (256, 1024, 4096))))
    cases = [SpeedCase(name, T, max(T, tokens or default_tokens(name))) for name in sizes for T in lengths]
    compiled = on_gpu if compile is None else compile
    measured = benchmark(cases, torch_device, torch_dtype, compiled=compiled, steps=steps)
    run_benchmarks("paper", [measured], None, torch_device, torch_dtype, output)


@app.command("operator", cls=Command)
def operator(
    output: Output = OUTPUT,
    length: Lengths = None,
    batch_size: Annotated[int | None, Option(help="Sequences. By default 4 on a GPU, 1 on a CPU.")] = None,
    heads: Annotated[int | None, Option(help="Heads. By default 32 on a GPU, 8 on a CPU.")] = None,
    head_dim: Annotated[int | None, Option(help="Head size. By default 128 on a GPU, 64 on a CPU.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    softmax_up_to: Annotated[
        int | None, Option(help="Longest sequence in quadratic time. By default 131072 on a GPU, 4096 on a CPU.")
    ] = None,
    seconds: Annotated[float, Option(help="Approximate time of each measurement, 0 for the fewest runs.")] = 0.2,
) -> None:
    """Time and memory of the operator (LA-2, Figure 3): Lightning-2, Lightning-1, FlashAttention-2, plain PyTorch."""
    from ..cases import OpCase
    from .operator import benchmark

    torch_device = device_of(device)
    torch_dtype, on_gpu = dtype_of(dtype, torch_device), torch_device.type == "cuda"
    lengths = sorted(set(length or doubling(1024, 8 if on_gpu else 3)), reverse=True)
    batch_size, heads = or_default(batch_size, 4 if on_gpu else 1), or_default(heads, 32 if on_gpu else 8)
    head_dim = or_default(head_dim, 128 if on_gpu else 64)
    check_at_least(1, length=lengths, batch_size=batch_size, heads=heads, head_dim=head_dim)
    check_at_least(0, softmax_up_to=softmax_up_to, seconds=seconds)
    up_to = or_default(softmax_up_to, 1 << 17 if on_gpu else 1 << 12)
    cases = [OpCase(batch_size, T, heads, head_dim, torch_dtype) for T in lengths]
    measured = benchmark(cases, torch_device, softmax_up_to=up_to, seconds=seconds)
    run_benchmarks("paper", [measured], None, torch_device, torch_dtype, output)


@app.command("generation", cls=Command)
def generation(
    output: Output = OUTPUT,
    size: Annotated[
        list[str] | None,
        Option(help="Size, as in train; repeat for more. By default 1B and 7B on a GPU, demo on a CPU."),
    ] = None,
    prompt: Annotated[int | None, Option(help="Tokens of a prompt. By default 512 on a GPU, 32 on a CPU.")] = None,
    new: Annotated[int | None, Option(help="New tokens. By default 1024 on a GPU, 32 on a CPU.")] = None,
    batch_size: Annotated[
        list[int] | None,
        Option(help="Sequences; repeat for more. By default doubling from 64 to 2048 on a GPU, 1 and 8 on a CPU."),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """New tokens a second in the largest batch (TNL, Figure 5), of models of random weights: ours and a LLaMA."""
    from .generation import GenerationCase, benchmark

    torch_device = device_of(device)
    torch_dtype, on_gpu = dtype_of(dtype, torch_device), torch_device.type == "cuda"
    sizes = [size_of(name, torch_device) for name in size or (["1B", "7B"] if on_gpu else ["demo"])]
    prompt, new = or_default(prompt, 512 if on_gpu else 32), or_default(new, 1024 if on_gpu else 32)
    batch_sizes = sorted(set(batch_size or (doubling(64, 6) if on_gpu else (1, 8))))
    check_at_least(1, prompt=prompt, new=new, batch_size=batch_sizes)
    cases = [GenerationCase(name, prompt, new, tuple(batch_sizes)) for name in sizes]
    run_benchmarks("paper", [benchmark(cases, torch_device, torch_dtype)], None, torch_device, torch_dtype, output)


@app.command("learn", cls=Command)
def learn(
    table: Annotated[
        str,
        Option(help="quality: TNL, Table 1; exactness: LA-2, Table 2; ablations: TNL, Tables 4 to 9."),
    ],
    output: Output = OUTPUT,
    corpus: CorpusFolder = CORPUS,
    model: Annotated[
        list[str] | None, Option(help="Model of the table by its name; repeat for more. By default all.")
    ] = None,
    length: Annotated[
        int | None, Option(help="Tokens of a sequence. By default 1024 (exactness 2048) on a GPU, 256 on a CPU.")
    ] = None,
    batch_size: Annotated[
        int | None, Option(help="Sequences of a step. By default 65536 tokens on a GPU, 2048 on a CPU.")
    ] = None,
    steps: Annotated[int | None, Option(help="Steps. By default 1000 on a GPU, 50 on a CPU.")] = None,
    learning_rate: Annotated[float, Option(help="Highest learning rate.")] = 1e-3,
    seed: Annotated[int, Option(help="Seed of weights and of the order of the text.")] = 0,
    test_tokens: Annotated[
        int | None, Option(help="Tokens of test text to read, at most. By default all on a GPU, 65536 on a CPU.")
    ] = None,
    keep: Annotated[Path | None, Option(help="Folder to keep the runs in, for `length`.")] = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """What models learn from the same text (TNL, Table 1): perplexity of a word, bits of a byte, tokens a second."""
    from .learning import Recipe, benchmark
    from .models import SIZE, TABLES

    if table not in TABLES:
        raise ValueError(f"--table must be one of {', '.join(TABLES)}, got {table!r}")
    names = _chosen(model, [row.name for row in TABLES[table]])
    torch_device = device_of(device)
    dtype, on_gpu = _training_dtype(dtype, torch_device), torch_device.type == "cuda"
    length = or_default(length, (2048 if table == "exactness" else 1024) if on_gpu else 256)
    batch_size = or_default(batch_size, max((1 << 16 if on_gpu else 1 << 11) // length, 1))
    steps = or_default(steps, 1000 if on_gpu else 50)
    check_at_least(1, batch_size=batch_size, steps=steps, test_tokens=test_tokens)
    check_at_least(2, length=length)
    recipe = Recipe(
        corpus,
        sizes=SIZE if on_gpu else SMALL,
        vocab_size=1 << 15 if on_gpu else 1 << 12,
        length=length,
        batch_size=batch_size,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        dtype=dtype,
        test_tokens=test_tokens or (None if on_gpu else 1 << 16),
    )
    _hide_progress_bars()
    rows = [row for row in TABLES[table] if row.name in names]
    measured = benchmark(f"paper-{table}", rows, recipe, torch_device, keep=keep)
    run_benchmarks("paper", [measured], None, torch_device, DTYPES[dtype], output)


@app.command("length", cls=Command)
def length(
    runs: Annotated[Path, Option(help="Folder with the runs of `learn --table quality --keep`.")],
    output: Output = OUTPUT,
    corpus: CorpusFolder = CORPUS,
    length: Annotated[
        int | None, Option(help="Tokens of a document. By default 16384 on a GPU, 1024 on a CPU.")
    ] = None,
    documents: Annotated[int, Option(help="Documents, of validation and test text.")] = 16,
    tuning_steps: Annotated[int, Option(help="Steps after Position Interpolation.")] = 200,
    tuning_tokens: Annotated[int, Option(help="Tokens of such a step, at least one document.")] = 1 << 16,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Loss by position beyond the trained length: ours, a LLaMA, with Position Interpolation, with StreamingLLM."""
    from .length import LengthCase, benchmark

    torch_device = device_of(device)
    dtype, on_gpu = _training_dtype(dtype, torch_device), torch_device.type == "cuda"
    length = or_default(length, 1 << 14 if on_gpu else 1 << 10)
    check_at_least(1, documents=documents, tuning_steps=tuning_steps, tuning_tokens=tuning_tokens)
    check_at_least(2, length=length)
    _hide_progress_bars()
    case = LengthCase(runs, corpus, length, documents, tuning_steps, tuning_tokens, dtype)
    run_benchmarks("paper", [benchmark(case, torch_device)], None, torch_device, DTYPES[dtype], output)


@app.command("recall", cls=Command)
def recall(
    output: Output = OUTPUT,
    model: Annotated[list[str] | None, Option(help="Model by its name; repeat for more. By default all.")] = None,
    needles: Annotated[int, Option(help="Keys with a value in a sequence.")] = 8,
    length: Annotated[
        int | None, Option(help="Tokens of a training sequence. By default 256 on a GPU, 64 on a CPU.")
    ] = None,
    tested: Annotated[
        list[int] | None,
        Option(help="Tokens of a tested sequence; repeat for more. By default doubling from that of training."),
    ] = None,
    batch_size: Annotated[int | None, Option(help="Sequences of a step. By default 128 on a GPU, 16 on a CPU.")] = None,
    steps: Annotated[int | None, Option(help="Steps. By default 6000 on a GPU, 50 on a CPU.")] = None,
    learning_rate: Annotated[float, Option(help="Highest learning rate.")] = 1e-3,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Needles in a haystack (share found, by length): lightning attention, the hybrid 7:1 and softmax attention."""
    from .recall import KEYS, QUESTIONS, SYSTEMS, RecallCase, benchmark

    names = _chosen(model, list(SYSTEMS))
    torch_device = device_of(device)
    dtype, on_gpu = _training_dtype(dtype, torch_device), torch_device.type == "cuda"
    length = or_default(length, 256 if on_gpu else 64)
    lengths = tuple(sorted(set(tested or doubling(length, 6 if on_gpu else 3))))
    batch_size, steps = or_default(batch_size, 128 if on_gpu else 16), or_default(steps, 6000 if on_gpu else 50)
    check_at_least(1, needles=needles, batch_size=batch_size, steps=steps)
    check_at_least(2 * needles * (1 + QUESTIONS), length=length, tested=lengths)
    if needles > KEYS:
        raise ValueError(f"--needles must be at most {KEYS}, got {needles}")
    sizes = {"num_hidden_layers": 8, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}
    case = RecallCase(
        sizes if on_gpu else SMALL,
        needles,
        length,
        lengths,
        batch_size,
        steps,
        learning_rate,
        dtype,
    )
    run_benchmarks("paper", [benchmark(case, names, torch_device)], None, torch_device, DTYPES[dtype], output)


def _chosen(models: list[str] | None, names: list[str]) -> list[str]:
    """The models of a table that are measured, in its order."""
    for name in models or ():
        if name not in names:
            raise ValueError(f"--model must be one of {', '.join(names)}, got {name!r}")
    return [name for name in names if not models or name in models]


def _hide_progress_bars() -> None:
    """Hide those of loaded and saved weights."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _training_dtype(name: str | None, device: torch.device) -> str:
    name = name or ("bfloat16" if device.type == "cuda" else "float32")
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype must be float32 or bfloat16 to train, got {name!r}")
    return name
