"""`lightning-attention train`: train a language model on text files."""

import errno
import os
import sys
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import Option

from .imports import quick_imports
from .options import given_options, option_names

# Options in the panels of the help.
DATA, MODEL, RUN, HUB = (
    partial(Option, rich_help_panel=panel) for panel in ("Data", "Model", "Run", "Hugging Face Hub")
)


class _Console(Console):
    """Console whose output is discarded once the reader of standard output has left, or its terminal is closed."""

    def __exit__(self, *raised: Any) -> None:
        try:
            super().__exit__(*raised)
        except OSError as error:
            if error.errno != errno.EIO:  # of a terminal that was closed
                raise
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def train(
    context: typer.Context,
    output: Annotated[Path, RUN(help="Folder for checkpoints, metrics and plot.")] = Path("run"),
    data: Annotated[
        list[Path] | None,
        DATA(
            help="File or folder: text, code, .jsonl, .parquet, also .gz or .zst; conversations are lines with "
            "messages. Repeat for more. By default Python's standard library."
        ),
    ] = None,
    validation: Annotated[
        list[Path] | None,
        DATA(help="File or folder, as --data, to evaluate on; then nothing of --data is held out. Repeat for more."),
    ] = None,
    text_field: Annotated[
        str | None,
        DATA(
            help="Field of a .jsonl line, or column of a .parquet file, with the text or the messages. By default "
            "text, or messages."
        ),
    ] = None,
    tokenizer: Annotated[
        str, DATA(help="'bytes', a tokenizer.json or its folder, or a name on the Hugging Face Hub.")
    ] = "bytes",
    chat_template: Annotated[
        Path | None,
        DATA(
            help="File with a Jinja template for conversations, saved with the tokenizer. By default the tokenizer's, "
            "or ChatML."
        ),
    ] = None,
    eos_token: Annotated[
        str | None, DATA(help="Token of the vocabulary that ends a document. By default the tokenizer's own.")
    ] = None,
    sequence_length: Annotated[int, DATA(help="Tokens per sequence.")] = 1024,
    segment_length: Annotated[
        int | None, RUN(help="Tokens per training segment; gradients stay exact. By default no segments.")
    ] = None,
    held_out: Annotated[float, DATA(help="Fraction of the tokens kept for evaluation; 0 for none.")] = 0.05,
    eval_tokens: Annotated[int, DATA(help="Held-out tokens to evaluate on, at most.")] = 1 << 18,
    size: Annotated[
        str, MODEL(help="demo, 45M, 385M, 1B, 3B, 7B or 15B, as the papers name them; with bytes a model is smaller.")
    ] = "demo",
    config: Annotated[Path | None, MODEL(help="JSON file of a model configuration, instead of a size.")] = None,
    attention: Annotated[
        str | None,
        MODEL(
            help="lightning, lightning-1, elu, cosformer, rfa, performer or softmax; or a pattern of layers: 3:1 for "
            "three of lightning and one of softmax attention. By default that of the configuration: lightning."
        ),
    ] = None,
    decay_preset: Annotated[
        str | None, MODEL(help="Name of the decays. By default the preset of the configuration.")
    ] = None,
    init_from: Annotated[
        Path | None,
        MODEL(
            help="Checkpoint, or output folder of a run, to fine-tune: the run starts from its weights, with its model "
            "and its tokenizer."
        ),
    ] = None,
    lora_rank: Annotated[
        int | None,
        MODEL(help="With --init-from: train LoRA adapters of this rank, by PEFT. By default all weights are trained."),
    ] = None,
    lora_alpha: Annotated[
        float | None, MODEL(help="Adapters are scaled by this over the rank. By default twice the rank.")
    ] = None,
    lora_dropout: Annotated[float, MODEL(help="Probability of dropping an input of an adapter.")] = 0.0,
    steps: Annotated[int, RUN(help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, RUN(help="Sequences per forward pass of a process.")] = 8,
    sequence_parallel: Annotated[int, RUN(help="Number of processes, started by torchrun, that share a sequence.")] = 1,
    sequence_parallel_strategy: Annotated[
        str, RUN(help="How they exchange states: all-gather or ring.")
    ] = "all-gather",
    fsdp: Annotated[bool, RUN(help="Shard the model over all processes.")] = False,
    accumulate: Annotated[int, RUN(help="Batches accumulated per step.")] = 1,
    learning_rate: Annotated[float, RUN(help="Highest learning rate.")] = 2e-3,
    warmup: Annotated[float, RUN(help="Fraction of the steps for warm-up.")] = 0.05,
    schedule: Annotated[
        str, RUN(help="Learning rates after the warm-up: cosine, wsd (stable, then decay) or constant.")
    ] = "cosine",
    decay_steps: Annotated[
        float | None, RUN(help="Steps of the decay of wsd, or a fraction of the steps. By default 0.2.")
    ] = None,
    min_lr: Annotated[float | None, RUN(help="Lowest learning rate. By default a tenth of the highest.")] = None,
    weight_decay: Annotated[float, RUN(help="Weight decay of AdamW.")] = 0.1,
    log_every: Annotated[int, RUN(help="Steps between logs.")] = 10,
    eval_every: Annotated[int, RUN(help="Steps between evaluations.")] = 200,
    save_every: Annotated[int, RUN(help="Steps between checkpoints.")] = 200,
    keep_best: Annotated[
        bool, RUN(help="Keep the checkpoint with the lowest held-out loss too, as the link best in --output.")
    ] = False,
    report_to: Annotated[
        list[str] | None,
        RUN(
            help="Tracker to log to: tensorboard, wandb, mlflow, trackio or another that transformers knows. Repeat "
            "for more. With --resume, none ends it."
        ),
    ] = None,
    dtype: Annotated[
        str,
        RUN(
            help="float32, or bfloat16 for autocast. auto is bfloat16 on a GPU that computes it natively and on a CPU "
            "with AMX, float32 elsewhere."
        ),
    ] = "auto",
    bf16: Annotated[bool, RUN("--bf16", help="Short for --dtype bfloat16.")] = False,
    fp8: Annotated[
        bool, RUN(help="Compute products in float8, by torchao, and all else in bfloat16; on recent GPUs.")
    ] = False,
    compile: Annotated[
        bool | None, RUN(help="Compile the layers. By default on a GPU where that works, not on a CPU.")
    ] = None,
    gradient_checkpointing: Annotated[bool, RUN("--gradient-checkpointing", help="Recompute activations.")] = False,
    timeout: Annotated[float, RUN(help="Seconds to wait for a process that does not answer.")] = 1800.0,
    seed: Annotated[int, RUN(help="Seed of weights and data order.")] = 0,
    push_to_hub: Annotated[
        str | None,
        HUB(help="Push the last checkpoint to this repository, namespace/name, at the end; created if there is none."),
    ] = None,
    hub_private: Annotated[bool, HUB("--hub-private", help="Create it as a private one.")] = False,
    hub_base_model: Annotated[
        str | None, HUB(help="Name on the Hub of the model of --init-from; needed to push LoRA adapters.")
    ] = None,
    license: Annotated[
        str | None, HUB(help="License of the model, for its card: an id of the Hub, such as apache-2.0.")
    ] = None,
    resume: Annotated[
        bool,
        RUN(
            "--resume",
            help="Resume the run in --output with its options; --steps, those on learning rates but --warmup, on "
            "processes, precision, memory, intervals and the Hub may change.",
        ),
    ] = False,
) -> None:
    """Train a language model on text; by default a small model on Python's standard library.

    Start the command with torchrun to train on several GPUs or machines.
    """
    values: dict[str, Any] = dict(locals())
    with quick_imports():
        from transformers.utils.logging import disable_progress_bar

        from ..training import Interrupted, TrainingOptions
        from ..training import train as run
        from ..training.options import MAY_CHANGE, OF_THE_MODEL
        from ..training.processes import SharedError, leave_processes, rank

    disable_progress_bar()
    given = given_options(context)
    values["report_to"] = tuple(report_to or ())
    if bf16:
        if "dtype" in given:
            raise ValueError("give --dtype or --bf16, not both")
        values["dtype"], given = "bfloat16", given - {"bf16"} | {"dtype"}
    if resume:
        if extra := given - {"resume", *MAY_CHANGE}:
            raise ValueError(f"--resume uses the options of the run; leave out {option_names(sorted(extra))}")
        options = TrainingOptions.load(output)
        options = replace(options, **{name: values[name] for name in MAY_CHANGE & given - {"output"}})
    else:
        if {"size", "config"} <= given:
            raise ValueError("give --size or --config, not both")
        if init_from is not None and (extra := given.intersection(OF_THE_MODEL)):
            raise ValueError(
                f"--init-from takes model and tokenizer from the checkpoint: leave out {option_names(sorted(extra))}"
            )
        if {"validation", "held_out"} <= given:
            raise ValueError("give --validation or --held-out, not both")
        values["data"], values["validation"] = tuple(data or ()), tuple(validation or ())
        options = TrainingOptions(**{field.name: values[field.name] for field in fields(TrainingOptions)})
    try:
        run(options, resume=resume, console=_Console(soft_wrap=True, markup=False, emoji=False))
    except Interrupted as error:
        if rank() == 0:
            with suppress(OSError):  # the terminal is closed
                print(f"lightning-attention: {error}", file=sys.stderr, flush=True)
        leave_processes()
        sys.exit(128 + error.signal)
    except (SharedError, FloatingPointError):
        is_first = rank() == 0
        leave_processes()
        if is_first:
            raise
        sys.exit(2)
    leave_processes()
