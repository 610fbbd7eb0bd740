"""A run: from text to a checkpoint."""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from rich.console import Console
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainingArguments, set_seed

from ..distributed.exchange import STRATEGIES
from ..models import LightningConfig, LightningForCausalLM
from ..models.checkpoint import checkpoint_step, checkpoints, last_checkpoint, load_model
from ..paths import PathLike, to_path, to_paths
from .checkpoint import CheckpointingTrainer
from .corpus import Corpus, PackedDataset
from .documents import Sources, standard_library
from .metrics import MetricsCallback, plot_loss
from .parallel import Ranks, all_processes, is_restarted, noticing_lost_processes, one_row, shard
from .segments import segmented_loss
from .tokenizer import load_tokenizer


@dataclass(frozen=True)
class TrainingOptions:
    """Everything a run depends on; kept in `run.json` of its output folder.

    Paths are `str` or `os.PathLike`, and kept as `Path`s.

    Attributes:
        output: folder for checkpoints, tokens, metrics and plot; must not hold a run already.
        data: files and folders of text, or one of them; empty for Python's standard library.
        text_field: the field of a `.jsonl` line that holds its text.
        tokenizer: "bytes", or the path of a tokenizer.json.
        size: a name in `models.SIZES`.
        config: a JSON file of `LightningConfig` options, instead of a size.
        decay_preset: see `decay.log_decay`; None is that of the configuration.
        sequence_length: tokens in a row.
        segment_length: tokens of a row that are in memory at a time, see `segmented_loss`; None is all.
        batch_size: rows a process takes at a time; with `sequence_parallel`, a group of processes.
        sequence_parallel: processes that share the tokens of a row; it divides their number.
        sequence_parallel_strategy: how states travel between them: see `distributed.exchange`.
        fsdp: spread the model over all processes, instead of keeping it whole on each.
        accumulate: batches added up in one step.
        steps: optimizer steps.
        learning_rate: highest, after the warm-up; it falls to a tenth along a cosine.
        warmup: part of the steps over which the rate rises.
        weight_decay: of AdamW, on matrices.
        held_out: part of the tokens kept for evaluation.
        eval_tokens: how many of those to evaluate on, at most.
        log_every: steps between logs.
        eval_every: steps between evaluations.
        save_every: steps between checkpoints, of which the last two are kept.
        bf16: train in bfloat16 autocast.
        compile: torch.compile the model.
        gradient_checkpointing: recompute activations in the backward pass.
        seed: of weights and data order.
    """

    output: Path
    data: tuple[Path, ...] = ()
    text_field: str = "text"
    tokenizer: str = "bytes"
    size: str = "demo"
    config: Path | None = None
    decay_preset: str | None = None
    sequence_length: int = 1024
    segment_length: int | None = None
    batch_size: int = 8
    sequence_parallel: int = 1
    sequence_parallel_strategy: str = "all-gather"
    fsdp: bool = False
    accumulate: int = 1
    steps: int = 1000
    learning_rate: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    held_out: float = 0.05
    eval_tokens: int = 1 << 18
    log_every: int = 10
    eval_every: int = 200
    save_every: int = 200
    bf16: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        paths = {"output": to_path(self.output, "output"), "data": to_paths(self.data, "data")}
        if self.tokenizer != "bytes":
            paths["tokenizer"] = str(to_path(self.tokenizer, "tokenizer"))
        if self.config is not None:
            paths["config"] = to_path(self.config, "config")
        for name, path in paths.items():
            object.__setattr__(self, name, path)
        for name in (
            "batch_size",
            "sequence_parallel",
            "accumulate",
            "steps",
            "eval_tokens",
            "log_every",
            "eval_every",
            "save_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got {self.sequence_length}")
        if self.segment_length is not None and self.segment_length < 1:
            raise ValueError(f"segment_length must be at least 1, got {self.segment_length}")
        if self.sequence_parallel_strategy not in STRATEGIES:
            names = ", ".join(map(repr, STRATEGIES))
            raise ValueError(
                f"sequence_parallel_strategy must be one of {names}, got {self.sequence_parallel_strategy!r}"
            )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be between 0 and 1, got {self.warmup}")

    def save(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        _file(self.output).write_text(json.dumps(asdict(self), indent=1, default=str))

    @classmethod
    def load(cls, output: PathLike) -> "TrainingOptions":
        """The options of the run in a folder.

        Raises:
            ValueError: there is no run.
        """
        output = to_path(output, "output")
        try:
            saved = json.loads(_file(output).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"no run to resume in {output}") from error
        known = {field.name for field in fields(cls)}
        if unknown := set(saved) - known:
            raise ValueError(f"{_file(output)} has options this version does not know: {', '.join(sorted(unknown))}")
        return cls(**saved | {"output": output})


def train(options: TrainingOptions, *, resume: bool = False, console: Console | None = None) -> Path:
    """Run it, or go on with it after whatever stopped it.

    Writes to `options.output`: `corpus/` the tokens, `checkpoint-N/` models that `from_pretrained` loads,
    `metrics.jsonl`, `loss.png`, `run.json`. Several processes, started by torchrun, share every step.

    Args:
        options: see there.
        resume: continue from the last complete checkpoint, with its model and tokenizer and the tokens there are, in
            the same order; from the start if there is no checkpoint. Processes that torchrun has restarted do so.
        console: where to report.

    Returns:
        The last checkpoint.

    Raises:
        ValueError: an option or the data is of no use, or the output folder holds a run and `resume` is not set.
        OSError: a checkpoint could not be written, or another process was lost; earlier checkpoints are intact.
    """
    console = console or Console()
    resume = resume or (is_restarted() and _file(options.output).exists())
    found = checkpoints(options.output) if resume else []
    tokenizer = load_tokenizer(str(found[-1]) if found else options.tokenizer)
    config = None if found else _configuration(options, tokenizer)
    arguments = _arguments(options)
    process = PartialState()  # of the process group that the arguments have set up
    ranks = None
    if options.sequence_parallel > 1:
        ranks = Ranks.of(
            arguments.world_size,
            options.sequence_parallel,
            options.sequence_parallel_strategy,
            arguments.device.type,
        )
    mesh = all_processes(arguments.device.type) if options.fsdp else None
    if not process.is_main_process:
        console = Console(quiet=True)
    corpus_folder = options.output / "corpus"
    if process.is_main_process:
        if not resume and _file(options.output).exists():
            raise ValueError(f"{options.output} holds a run already: resume it, or choose another output")
        if not resume:
            try:
                _prepare_corpus(options, corpus_folder, tokenizer, console)
            except BaseException:
                with suppress(OSError):
                    options.output.rmdir()  # unless there was something in it
                raise
    process.wait_for_everyone()
    corpus = Corpus.open(corpus_folder)
    if corpus.num_held_out < options.sequence_length:
        raise ValueError(
            f"the held-out part has {corpus.num_held_out} tokens, fewer than one sequence of "
            f"{options.sequence_length}: give more data, a larger held_out, or a shorter sequence_length"
        )
    rows = PackedDataset(corpus.train_tokens(), options.sequence_length, corpus.eos_token_id)
    held_out = PackedDataset(
        corpus.held_out_tokens(), options.sequence_length, corpus.eos_token_id, options.eval_tokens
    )

    if process.is_main_process:
        options.save()
    rows_at_a_time = options.batch_size * (arguments.world_size // options.sequence_parallel)
    tokens_per_step = options.sequence_length * rows_at_a_time * options.accumulate
    metrics = options.output / "metrics.jsonl"
    set_seed(options.seed)
    model = load_model(found[-1]) if config is None else LightningForCausalLM(config)
    num_parameters = model.num_parameters()
    if mesh is not None:
        shard(model, mesh)
    if ranks is not None:
        model.model.set_sequence_parallel(ranks.sequence_parallel)
    trainer = _Trainer(
        options.segment_length,
        ranks,
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[MetricsCallback(metrics, tokens_per_step, console)],
    )
    trainer.remove_callback(PrinterCallback)
    console.print(
        f"{num_parameters / 1e6:.1f}M parameters on {arguments.world_size} x {arguments.device.type}, "
        f"{corpus.num_train:,} tokens of {corpus.num_documents:,} documents, {tokens_per_step:,} tokens a step"
    )
    if found:
        console.print(f"resuming from {found[-1]}")
    if not found or checkpoint_step(found[-1]) < options.steps:  # the Trainer would take one step more
        with noticing_lost_processes():
            trainer.train(resume_from_checkpoint=str(found[-1]) if found else False)
    checkpoint, picture = last_checkpoint(options.output), options.output / "loss.png"
    if process.is_main_process:
        plot_loss(metrics, picture, {"token frequencies": held_out.loss_of(corpus.unigram())})
    console.print(f"checkpoint  {checkpoint}\nmetrics     {metrics}\nloss plot   {picture}")
    return checkpoint


class _Arguments(TrainingArguments):
    """A process works on one device: for more of them there is torchrun, not DataParallel."""

    @property
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)


class _Trainer(CheckpointingTrainer):
    """One that reads rows by segments, in training and evaluation, or shares them with other processes."""

    def __init__(self, segment_length: int | None, ranks: Ranks | None, **options: Any):
        collate = None
        if ranks is not None:
            collate = ranks.collate if segment_length is None else one_row
        super().__init__(**options, data_collator=collate)
        self.segment_length, self.ranks = segment_length, ranks
        if isinstance(self.model, FSDPModule):  # autocast and compilation, but no DistributedDataParallel
            prepare: Any = self.accelerator.prepare_model
            self.model_wrapped = prepare(self.model, device_placement=False, evaluation_mode=True)

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        return loader if self.ranks is None else self.ranks.share_batches(loader)

    def get_eval_dataloader(self, *args: Any) -> Any:
        loader = super().get_eval_dataloader(*args)
        return loader if self.ranks is None else self.ranks.share_batches(loader)

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        read = model if self.segment_length is None else cast(Any, partial(self._by_segments, model))
        loss = super().compute_loss(read, *args, **kwargs)
        if self.ranks is None or torch.is_grad_enabled():
            return loss
        loss, outputs = loss  # in evaluation, where each process has the loss of its slice
        return self.accelerator.reduce(loss, "mean"), outputs

    def _by_segments(
        self, model: Any, *, attention_mask: Tensor | None = None, num_items_in_batch: Any, **inputs: Any
    ) -> dict[str, Tensor]:
        """Rows are full, so a mask is of ones. Processes that share a row have each counted all of it."""
        if self.ranks is not None:
            num_items_in_batch = num_items_in_batch / self.ranks.sequence_parallel.size
        loss = segmented_loss(
            model, **inputs, segment_length=cast(int, self.segment_length), num_items_in_batch=num_items_in_batch
        )
        return {"loss": loss}


def _file(output: Path) -> Path:
    return output / "run.json"


def _configuration(options: TrainingOptions, tokenizer: PreTrainedTokenizerFast) -> LightningConfig:
    from_tokenizer = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    changed: dict[str, Any] = {} if options.decay_preset is None else {"decay_preset": options.decay_preset}
    if options.config is None:
        return LightningConfig.from_size(options.size, **from_tokenizer | changed)
    try:
        given = json.loads(options.config.read_text())
        if unknown := sorted(set(given) - set(LightningConfig().to_dict())):
            raise ValueError(f"unknown option {', '.join(unknown)}")
        return LightningConfig.from_dict(given | from_tokenizer | changed)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{options.config} is not a model configuration: {error}") from error


def _prepare_corpus(
    options: TrainingOptions, folder: Path, tokenizer: PreTrainedTokenizerFast, console: Console
) -> None:
    if options.data:
        sources = Sources.find(options.data, options.text_field, options.seed)
    else:
        sources = Sources.find([standard_library()], seed=options.seed, without=("test", "tests"))
    with console.status("tokenizing") as status:
        corpus = Corpus.prepare(
            folder,
            sources,
            tokenizer,
            options.held_out,
            progress=lambda characters: status.update(f"tokenizing: {characters / 1e6:,.0f} million characters"),
        )
    if corpus.skipped_files:
        console.print(f"skipped {corpus.skipped_files:,} files that are not UTF-8 text")


def _arguments(options: TrainingOptions) -> TrainingArguments:
    checkpointing: dict[str, Any] = {_CHECKPOINTING: True} if options.gradient_checkpointing else {}
    return _Arguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=round(options.warmup * options.steps),
        weight_decay=options.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=options.log_every,
        eval_strategy="steps",
        eval_steps=options.eval_every,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=2,
        bf16=options.bf16,
        use_cpu=not torch.accelerator.is_available(),  # or bf16 is refused
        torch_compile=options.compile,
        seed=options.seed,
        data_seed=options.seed,
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False if "RANK" in os.environ else None,
        **checkpointing,
    )


# transformers renames it within version 5.
_CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
