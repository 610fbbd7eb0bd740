"""`lightning-attention train`: a language model from the user's own text."""

import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import Option

from .options import given_options, option_names

DATA, MODEL, RUN = "Data", "Model", "Run"
# What may differ from machine to machine on which a run goes on.
SHARING = "sequence_parallel", "sequence_parallel_strategy", "fsdp", "timeout"


class _Console(Console):
    """A console whose reader may leave while the run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def train(
    context: typer.Context,
    output: Annotated[Path, Option(help="Folder for checkpoints, metrics and plot.", rich_help_panel=RUN)] = Path(
        "run"
    ),
    data: Annotated[
        list[Path] | None,
        Option(
            help="File or folder: text, code, .jsonl, .parquet, also .gz or .zst. Repeat for more. By default Python's "
            "standard library.",
            rich_help_panel=DATA,
        ),
    ] = None,
    text_field: Annotated[
        str, Option(help="Field of a .jsonl line, or column of a .parquet, that holds the text.", rich_help_panel=DATA)
    ] = "text",
    tokenizer: Annotated[str, Option(help="'bytes', or the path of a tokenizer.json.", rich_help_panel=DATA)] = "bytes",
    eos_token: Annotated[
        str | None,
        Option(help="Token of its vocabulary that ends a document. By default its own.", rich_help_panel=DATA),
    ] = None,
    sequence_length: Annotated[int, Option(help="Tokens in a row.", rich_help_panel=DATA)] = 1024,
    segment_length: Annotated[
        int | None,
        Option(help="Tokens of a row in memory at a time; gradients stay exact. By default all.", rich_help_panel=RUN),
    ] = None,
    held_out: Annotated[float, Option(help="Part of the tokens kept for evaluation.", rich_help_panel=DATA)] = 0.05,
    eval_tokens: Annotated[int, Option(help="Held-out tokens to evaluate on, at most.", rich_help_panel=DATA)] = 1
    << 18,
    size: Annotated[str, Option(help="demo, 45M, 385M, 1B, 3B, 7B or 15B.", rich_help_panel=MODEL)] = "demo",
    config: Annotated[
        Path | None, Option(help="JSON file of a model configuration, instead of a size.", rich_help_panel=MODEL)
    ] = None,
    decay_preset: Annotated[
        str | None, Option(help="Decays by name. By default those of the configuration.", rich_help_panel=MODEL)
    ] = None,
    steps: Annotated[int, Option(help="Optimizer steps.", rich_help_panel=RUN)] = 1000,
    batch_size: Annotated[int, Option(help="Rows a process takes at a time.", rich_help_panel=RUN)] = 8,
    sequence_parallel: Annotated[
        int,
        Option(help="Processes, of those that torchrun starts, that share the tokens of a row.", rich_help_panel=RUN),
    ] = 1,
    sequence_parallel_strategy: Annotated[
        str, Option(help="How states travel between them: all-gather or ring.", rich_help_panel=RUN)
    ] = "all-gather",
    fsdp: Annotated[
        bool,
        Option(help="Spread the model over all processes, instead of keeping it whole on each.", rich_help_panel=RUN),
    ] = False,
    accumulate: Annotated[int, Option(help="Batches added up in a step.", rich_help_panel=RUN)] = 1,
    learning_rate: Annotated[float, Option(help="Highest learning rate.", rich_help_panel=RUN)] = 2e-3,
    warmup: Annotated[float, Option(help="Part of the steps over which it rises.", rich_help_panel=RUN)] = 0.05,
    weight_decay: Annotated[float, Option(help="Of AdamW.", rich_help_panel=RUN)] = 0.1,
    log_every: Annotated[int, Option(help="Steps between logs.", rich_help_panel=RUN)] = 10,
    eval_every: Annotated[int, Option(help="Steps between evaluations.", rich_help_panel=RUN)] = 200,
    save_every: Annotated[int, Option(help="Steps between checkpoints.", rich_help_panel=RUN)] = 200,
    bf16: Annotated[bool, Option("--bf16", help="Train in bfloat16 autocast.", rich_help_panel=RUN)] = False,
    compile: Annotated[bool, Option("--compile", help="torch.compile the model.", rich_help_panel=RUN)] = False,
    gradient_checkpointing: Annotated[
        bool, Option("--gradient-checkpointing", help="Recompute activations.", rich_help_panel=RUN)
    ] = False,
    timeout: Annotated[
        float, Option(help="Seconds that processes wait for one of them that does not answer.", rich_help_panel=RUN)
    ] = 1800.0,
    seed: Annotated[int, Option(help="Of weights and data order.", rich_help_panel=RUN)] = 0,
    resume: Annotated[
        bool,
        Option(
            "--resume",
            help="Go on with the run in --output, with the options it has; how processes share it may be given anew.",
            rich_help_panel=RUN,
        ),
    ] = False,
) -> None:
    """Train a language model on text; by default a small one on Python's standard library.

    Start it with torchrun to train on several GPUs or machines.
    """
    values: dict[str, Any] = dict(locals())
    from transformers.utils.logging import disable_progress_bar

    from ..training import Interrupted, TrainingOptions
    from ..training import train as run
    from ..training.processes import SharedError, leave_processes, rank

    disable_progress_bar()
    given = given_options(context)
    if resume:
        if extra := given - {"resume", "output", *SHARING}:
            raise ValueError(f"--resume goes on with the options the run has; leave out {option_names(sorted(extra))}")
        options = TrainingOptions.load(output)
        options = replace(options, **{name: values[name] for name in SHARING if name in given})
    else:
        if {"size", "config"} <= given:
            raise ValueError("give --size or --config, not both")
        values["data"] = tuple(data or ())
        options = TrainingOptions(**{field.name: values[field.name] for field in fields(TrainingOptions)})
    try:
        run(options, resume=resume, console=_Console(soft_wrap=True, markup=False, emoji=False))
    except Interrupted as error:
        if rank() == 0:
            print(f"lightning-attention: {error}", file=sys.stderr)
        leave_processes()
        sys.exit(128 + error.signal)
    except (SharedError, FloatingPointError):
        is_first = rank() == 0
        leave_processes()
        if is_first:
            raise
        sys.exit(2)
    leave_processes()
