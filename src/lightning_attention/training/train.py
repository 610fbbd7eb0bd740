"""Training run: from text to a checkpoint."""

import json
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from rich.console import Console
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..distributed.parallel import SequenceParallel
from ..models import LightningConfig, LightningForCausalLM, compile_layers, use_float8
from ..models.chat import ChatTemplate, read_template
from ..models.checkpoint import UNUSABLE, checkpoint_step, checkpoints, last_checkpoint
from ..models.mixers import ATTENTIONS, attention_options, check_is_linear
from ..models.tokenization import vocab_size
from .arguments import training_arguments
from .best import best_checkpoint, held_out_loss
from .checkpoint import check_checkpoint, read_record
from .corpus import Corpus, PackedDataset
from .data import NOT_EVALUATED, datasets, describe_corpora, prepare_corpora
from .execution import Execution, choose_execution
from .finetune import adapters_of, load_base, prepare_adapters, resumed_model, with_base_checkpoint
from .folder import BEST, CORPUS, METRICS, PLOT, VALIDATION, RunFolder, last_intact
from .metrics import MetricsCallback, describe_losses, plot_loss
from .options import TrainingOptions, resumed_options
from .processes import (
    check_equal,
    explain_lost_processes,
    is_restarted,
    join_processes,
    local_device,
    on_first,
    rank,
    sequence_parallel_group,
    shard,
    together,
    world_size,
)
from .schedule import learning_rate
from .signals import Interrupted, StopRequest, stop_requests
from .text_bytes import bits_per_nat, token_bytes
from .tokenizer import CHAT_TEMPLATE, load_tokenizer
from .trainer import PackedTrainer


def train(options: TrainingOptions, *, resume: bool = False, console: Console | None = None) -> Path:
    """Train a language model on text, or resume a run.

    Writes to `options.output`: `corpus/` the tokens, `checkpoint-N/` models that `from_pretrained` loads,
    `metrics.jsonl`, `loss.png`, and after the first step `run.json`; a failure before that leaves nothing behind.
    Several processes, started by torchrun, share every step.

    SIGINT, SIGTERM and SIGHUP save a checkpoint after the current step; a second signal ends the process at once.

    Args:
        options: options of the run.
        resume: continue from the last intact checkpoint, with its model, tokenizer and tokens, in the same order;
            from the start if there is no checkpoint. Processes that torchrun has restarted always resume.
        console: where to report.

    Returns:
        The last checkpoint.

    Raises:
        ValueError: an option or the data is invalid, the output folder holds a run and `resume` is not set, or
            another process trains in it.
        OSError: a file could not be written, or another process was lost; earlier checkpoints are intact.
        FloatingPointError: the loss, its gradient or a weight is not finite; neither stepped nor saved.
        KeyboardInterrupt: a signal has stopped the run; it is an `Interrupted`, which knows the signal.

    Example:
        >>> from lightning_attention.training import TrainingOptions, train
        >>> checkpoint = train(TrainingOptions("run", data="texts", steps=100))  # doctest: +SKIP
    """
    with _open(options, resume, console) as run:
        trainer, corpus = _build(run)
        return _run(run, trainer, corpus)


@dataclass
class _OpenRun:
    """An open run.

    Attributes:
        folder: the output folder, locked by the first process.
        sequence_parallel: the processes that share sequences with this one, if any.
        execution: precision and compilation.
        checkpoint: the checkpoint to resume from.
        has_corpus: True if the run resumes, with the tokens in its folder.
    """

    options: TrainingOptions
    arguments: TrainingArguments
    execution: Execution
    folder: RunFolder
    sequence_parallel: SequenceParallel | None
    checkpoint: Path | None
    has_corpus: bool
    stop: StopRequest
    console: Console

    @property
    def sequences_per_step(self) -> int:
        data_size = self.arguments.world_size // self.options.sequence_parallel
        return self.options.batch_size * data_size * self.options.accumulate


@contextmanager
def _open(options: TrainingOptions, resume: bool, console: Console | None) -> Iterator[_OpenRun]:
    """Join the processes, lock the output folder, and choose the checkpoint to resume from."""
    join_processes(options.timeout)
    console = Console(quiet=True) if rank() > 0 else console or Console(markup=False, emoji=False)
    folder, checkpoint = RunFolder(options.output), None
    with ExitStack() as stack:
        stop = stack.enter_context(stop_requests())
        stack.enter_context(explain_lost_processes())
        check_equal({"resume": resume} | json.loads(options.to_json()))
        sequence_parallel = together(lambda: _sequence_parallel(options))
        on_first(lambda: stack.enter_context(folder.locked()))
        resumes = resume or on_first(lambda: is_restarted() and folder.has_run)
        if not resumes:
            on_first(folder.check_free)
            options = on_first(lambda: with_base_checkpoint(options, may_be_missing=False))
        elif checkpoint := on_first(lambda: last_intact(folder.path, check_checkpoint, console.print)):
            console.print(f"resuming from {checkpoint}")
            options = on_first(lambda: with_base_checkpoint(options, may_be_missing=True))
            options, changes = together(lambda: _resumed(options, checkpoint))
            for change in changes:
                console.print(change, markup=False)
        else:
            options = on_first(lambda: with_base_checkpoint(options, may_be_missing=False))
        execution = together(lambda: choose_execution(options, local_device()))
        check_equal({"dtype": "bfloat16" if execution.bf16 else "float32", "compile": execution.compiled})
        arguments = training_arguments(options, execution)
        yield _OpenRun(options, arguments, execution, folder, sequence_parallel, checkpoint, resumes, stop, console)


def _build(run: _OpenRun) -> tuple[PackedTrainer, Corpus]:
    """Load or make tokenizer, corpus and model, and the trainer for them."""
    options, folder = run.options, run.folder.path
    tokenizer = together(lambda: _tokenizer(run))
    adapters = together(lambda: adapters_of(options, run.checkpoint))
    config, model = None, None
    if run.checkpoint is None and options.init_from is None:
        config = together(lambda: _model_config(options, tokenizer))
    else:
        model = together(lambda: _loaded_model(run, tokenizer))
    together(lambda: _check_attention(options, cast(LightningConfig, config if model is None else model.config)))
    if not run.has_corpus:
        on_first(lambda: prepare_corpora(options, folder, tokenizer, run.console))
    corpus = together(lambda: Corpus.open(folder / CORPUS))
    validation = together(lambda: Corpus.open(folder / VALIDATION)) if options.validation else corpus
    training_set, held_out_set = together(lambda: datasets(corpus, validation, options))
    if corpus.num_context_ranges or validation.num_context_ranges:
        tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    set_seed(options.seed)
    if model is None:
        model = together(lambda: LightningForCausalLM(cast(LightningConfig, config)))
    num_parameters, trained = model.num_parameters(), ""
    if adapters is not None:
        trained = together(lambda: prepare_adapters(model, options, adapters, run.checkpoint is not None))
    if run.sequence_parallel is not None:
        model.model.set_sequence_parallel(run.sequence_parallel)
    if options.fp8:
        use_float8(model)
    if run.execution.compiled:
        compile_layers(model)
    if options.fsdp:
        shard(model, run.arguments.device.type)
    tokens_per_step = run.sequences_per_step * options.sequence_length
    lengths = token_bytes(tokenizer)
    factor = None if lengths is None else bits_per_nat(corpus, lengths)
    trainer = PackedTrainer(
        options.segment_length,
        run.sequence_parallel,
        lengths,
        stop=run.stop,
        adapters=adapters,
        record=json.loads(options.to_json()) | {"sequences_per_step": run.sequences_per_step},
        keep_best=options.keep_best,
        model=model,
        args=run.arguments,
        train_dataset=training_set,
        eval_dataset=held_out_set,
        processing_class=tokenizer,
        callbacks=[_SaveOptions(run), MetricsCallback(folder / METRICS, tokens_per_step, run.console, factor)],
    )
    trainer.remove_callback(PrinterCallback)
    run.console.print(
        f"{num_parameters / 1e6:.1f}M parameters{trained} on {run.arguments.world_size} x {run.arguments.device.type}, "
        f"{corpus.num_train:,} tokens of {corpus.num_documents:,} documents, {tokens_per_step:,} tokens a step"
    )
    for line in describe_corpora(corpus, validation, training_set, options):
        run.console.print(line)
    if lengths is None:
        run.console.print("no bits per byte: the tokens of this tokenizer are not bytes of the text")
    run.console.print(run.execution.description, markup=False, highlight=False)
    return trainer, corpus


def _run(run: _OpenRun, trainer: PackedTrainer, corpus: Corpus) -> Path:
    """Make the remaining steps, plot the losses, and return the last checkpoint."""
    folder = run.folder.path
    if not run.checkpoint or checkpoint_step(run.checkpoint) < run.options.steps:  # or the Trainer makes one more
        _make_steps(run, trainer)
    last = last_checkpoint(folder)
    if rank() == 0:
        held_out = cast(PackedDataset | None, trainer.eval_dataset)
        if held_out is not None:
            baselines = {"token frequencies": held_out.loss_of(corpus.unigram())}
            plot_loss(folder / METRICS, folder / PLOT, baselines)
        else:
            plot_loss(folder / METRICS, folder / PLOT, title=NOT_EVALUATED)
    run.console.print(f"checkpoint  {last}\nmetrics     {folder / METRICS}\nloss plot   {folder / PLOT}")
    if rank() == 0:
        if (best := best_checkpoint(folder)) and (loss := held_out_loss(best)) is not None:
            run.console.print(f"best        {folder / BEST}: {best.name}, held-out loss {loss:.4f}")
        if losses := describe_losses(folder / METRICS):
            run.console.print(losses, highlight=False)
    return last


def _make_steps(run: _OpenRun, trainer: PackedTrainer) -> None:
    """Train to the last step; errors say from which checkpoint the run can be resumed, and how."""
    folder = run.folder.path
    try:
        with run.stop.deferred():
            trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else False)
    except FloatingPointError as error:
        good = checkpoints(folder)
        saved = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint was saved before"
        raise FloatingPointError(f"{error}; {saved}; try a lower learning rate, or check the data") from None
    step = trainer.state.global_step
    if run.stop.answered and step < trainer.state.max_steps:
        command = f"lightning-attention train --resume --output {shlex.quote(str(folder))}"
        raise Interrupted(run.stop.answered, f"after step {step}, which is saved; to resume: {command}")


def _resumed(options: TrainingOptions, checkpoint: Path) -> tuple[TrainingOptions, list[str]]:
    """Options of a run that resumes from a checkpoint, and a line for every change."""
    step, record = checkpoint_step(checkpoint), read_record(checkpoint)
    if options.steps < step:
        raise ValueError(f"{checkpoint} is of a later step than steps: give at least {step}, got {options.steps}")
    options, changes = resumed_options(options, record, world_size() // options.sequence_parallel)
    before, now = (learning_rate(x, step) for x in (options.with_schedule_of(record or {}), options))
    if record and step < options.steps and before != now:
        changes.append(f"the learning rate after step {step} was {before:.3g}, it is now {now:.3g}")
    return options, changes


class _SaveOptions(TrainerCallback):
    """Save `run.json` after the first step: from then on a failure leaves the folder as it is."""

    def __init__(self, run: _OpenRun):
        self.run, self.is_saved = run, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.is_saved:
            if state.is_world_process_zero:
                self.run.options.save()
            self.run.folder.is_started = self.is_saved = True


def _sequence_parallel(options: TrainingOptions) -> SequenceParallel | None:
    if options.fsdp and not dist.is_initialized():
        raise ValueError("fsdp needs the processes that torchrun starts")
    return sequence_parallel_group(options.sequence_parallel, options.sequence_parallel_strategy, options.timeout)


def _loaded_model(run: _OpenRun, tokenizer: PreTrainedTokenizerFast) -> LightningForCausalLM:
    if run.checkpoint is not None:
        return resumed_model(run.checkpoint, run.options)
    run.console.print(f"starting from {run.options.init_from}", markup=False, highlight=False)
    return load_base(run.options, tokenizer)


def _tokenizer(run: _OpenRun) -> PreTrainedTokenizerFast:
    if run.checkpoint is not None:
        return load_tokenizer(run.checkpoint)

    def report(line: str) -> None:
        run.console.print(line, markup=False, emoji=False, highlight=False)

    tokenizer = load_tokenizer(run.options.init_from or run.options.tokenizer, run.options.eos_token, report)
    if (file := run.options.chat_template) is not None:
        if file.exists() and not file.is_file():  # a FIFO would be waited for
            raise ValueError(f"chat_template: {file} is not a file")
        tokenizer.chat_template = ChatTemplate(tokenizer, read_template(file)).source
    return tokenizer


def _check_attention(options: TrainingOptions, config: LightningConfig) -> None:
    if options.segment_length is not None:
        check_is_linear(config, "training segments")
    if options.sequence_parallel > 1:
        check_is_linear(config, "processes that share sequences")


def _model_config(options: TrainingOptions, tokenizer: PreTrainedTokenizerFast) -> LightningConfig:
    changes: dict[str, Any] = {
        "vocab_size": vocab_size(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if options.decay_preset is not None:
        changes |= {"decay_preset": options.decay_preset, "log_decay": None}
    defaults: dict[str, Any] = {}
    if options.attention is not None:
        # In place of all that a file says of it.
        changes |= {"linear_attention": "lightning", "layer_pattern": None, "layer_types": None, "sliding_window": None}
        changes |= attention_options(options.attention)
        if options.attention in ATTENTIONS and not ATTENTIONS[options.attention].has_decay:
            defaults["max_position_embeddings"] = options.sequence_length
    if options.config is None:
        config = LightningConfig.from_size(options.size, **defaults, **changes)
    else:
        config = _config_from_file(options, defaults, changes)
    if options.decay_preset is not None and not config.has_decay:
        raise ValueError(f"decay_preset goes with lightning attention, which this model has not: {config.layer_types}")
    return config


def _config_from_file(options: TrainingOptions, defaults: dict[str, Any], changes: dict[str, Any]) -> LightningConfig:
    assert options.config is not None
    try:
        if options.config.exists() and not options.config.is_file():
            raise ValueError("it is not a file")
        given = json.loads(options.config.read_text(encoding="utf-8"))
        if not isinstance(given, dict):
            raise ValueError("it is not a JSON object")
        if given.get("model_type", LightningConfig.model_type) != LightningConfig.model_type:
            raise ValueError(f"its model_type is {given['model_type']!r}, not {LightningConfig.model_type!r}")
        if unknown := sorted(set(given) - set(LightningConfig().to_dict())):
            raise ValueError(f"unknown option {', '.join(unknown)}")
        config = LightningConfig.from_dict(defaults | given | changes)
        if config.output_attentions:
            raise ValueError("output_attentions must be false: this model computes no attention weights")
        config.check_length(options.sequence_length)
        return config
    except UNUSABLE as error:
        raise ValueError(f"{options.config} is not a model configuration: {error}") from error
