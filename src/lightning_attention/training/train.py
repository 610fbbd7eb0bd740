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
from ..models.checkpoint import checkpoint_step, checkpoints, last_checkpoint
from ..models.mixers import check_is_linear
from .arguments import training_arguments
from .best import best_checkpoint, held_out_loss
from .checkpoint import check_checkpoint, read_record
from .corpus import Corpus, PackedDataset
from .data import NOT_EVALUATED, datasets, describe_corpora, find_sources, prepare_corpora
from .execution import Execution, choose_execution
from .finetune import adapters_of, load_base, prepare_adapters, resumed_model, with_base_checkpoint
from .folder import BEST, CORPUS, LOG, METRICS, PLOT, VALIDATION, RunFolder, last_intact
from .measurements import Measurements
from .metrics import MetricsCallback, describe_losses, seconds_logged
from .model_config import describe_size, explain_size, in_millions, model_config
from .options import TrainingOptions, resumed_options
from .plots import plot_loss
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
from .pushing import create_repository, push_run, repository_of
from .record import record_of_run
from .reporting import reporters
from .run_log import RunLog
from .schedule import learning_rate
from .signals import Interrupted, StopRequest, stop_requests
from .text_bytes import bits_per_nat, token_bytes
from .tokenizer import CHAT_TEMPLATE, load_tokenizer
from .trainer import PackedTrainer


def train(options: TrainingOptions, *, resume: bool = False, console: Console | None = None) -> Path:
    """Train a language model on text, or resume a run.

    Writes to `options.output`: `corpus/` the tokens, `checkpoint-N/` models that `from_pretrained` loads,
    `metrics.jsonl`, `train.log`, `loss.png`, and after the first step `run.json`; a failure before that leaves nothing
    behind. Several processes, started by torchrun, share every step.

    SIGINT, SIGTERM and SIGHUP save a checkpoint after the current step; a second signal ends the process at once.

    Args:
        options: options of the run.
        resume: continue from the last intact checkpoint, with its model, tokenizer and tokens, in the same order;
            from the start if there is no checkpoint. Processes that torchrun has restarted always resume.
        console: where to report.

    Returns:
        The last checkpoint.

    Raises:
        ValueError: an option or the data is invalid, a tracker cannot be used, the output folder holds a run and
            `resume` is not set, or another process trains in it.
        OSError: a file could not be written, or another process was lost; earlier checkpoints are intact. Or the Hub
            refuses `push_to_hub`, before the first step; a failed upload leaves the complete run.
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
        repository: on the Hub, to push the last checkpoint to, if any.
        has_corpus: True if the run resumes, with the tokens in its folder.
        log: where to say what the run does; silent on other processes than the first.
        reporters: callbacks of the trackers that the run reports to.
    """

    options: TrainingOptions
    arguments: TrainingArguments
    execution: Execution
    folder: RunFolder
    sequence_parallel: SequenceParallel | None
    checkpoint: Path | None
    repository: str | None
    has_corpus: bool
    stop: StopRequest
    log: RunLog
    reporters: list[TrainerCallback]

    @property
    def sequences_per_step(self) -> int:
        data_size = self.arguments.world_size // self.options.sequence_parallel
        return self.options.batch_size * data_size * self.options.accumulate


@contextmanager
def _open(options: TrainingOptions, resume: bool, console: Console | None) -> Iterator[_OpenRun]:
    """Join the processes, lock the output folder, and choose the checkpoint to resume from."""
    join_processes(options.timeout)
    log = RunLog(Console(quiet=True) if rank() > 0 else console or Console())
    folder, checkpoint = RunFolder(options.output), None
    with ExitStack() as stack:
        stop = stack.enter_context(stop_requests())
        stack.enter_context(explain_lost_processes())
        check_equal({"resume": resume} | json.loads(options.to_json()))
        sequence_parallel = together(lambda: _sequence_parallel(options))
        trackers = together(lambda: reporters(options.report_to, log.print))
        on_first(lambda: stack.enter_context(folder.locked()))
        resumes = resume or on_first(lambda: is_restarted() and folder.has_run)
        if not resumes:
            on_first(folder.check_free)
        on_first(lambda: stack.enter_context(log.kept_in(folder.path / LOG)))
        if resumes:
            checkpoint = on_first(lambda: last_intact(folder.path, check_checkpoint, log.print))
        options = on_first(lambda: with_base_checkpoint(options, may_be_missing=checkpoint is not None))
        if checkpoint is not None:
            log.print(f"resuming from {checkpoint}")
            options, changes = together(lambda: _resumed(options, checkpoint))
            for change in changes:
                log.print(change)
        execution = together(lambda: choose_execution(options, local_device()))
        check_equal({"dtype": "bfloat16" if execution.bf16 else "float32", "compile": execution.compiled})
        arguments, repository = training_arguments(options, execution), on_first(lambda: repository_of(options))
        yield _OpenRun(
            options,
            arguments,
            execution,
            folder,
            sequence_parallel,
            checkpoint,
            repository,
            resumes,
            stop,
            log,
            trackers,
        )


def _build(run: _OpenRun) -> tuple[PackedTrainer, Corpus]:
    """Load or make tokenizer, corpus and model, and the trainer for them."""
    options, folder = run.options, run.folder.path
    tokenizer = together(lambda: _tokenizer(run))
    adapters = together(lambda: adapters_of(options, run.checkpoint))
    config, model = None, None
    if run.checkpoint is None and options.init_from is None:
        config = together(lambda: model_config(options, tokenizer))
    else:
        model = together(lambda: _loaded_model(run, tokenizer))
    together(lambda: _check_attention(options, cast(LightningConfig, config if model is None else model.config)))
    on_first(lambda: _prepare(run, tokenizer))
    corpus = together(lambda: Corpus.open(folder / CORPUS))
    validation = together(lambda: Corpus.open(folder / VALIDATION)) if options.validation else corpus
    training_set, held_out_set = together(lambda: datasets(corpus, validation, options))
    if corpus.num_context_ranges or validation.num_context_ranges:
        tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    set_seed(options.seed)
    if model is None:
        model = together(lambda: LightningForCausalLM(cast(LightningConfig, config)))
    num_parameters, size, trained = model.num_parameters(), explain_size(model, options), ""
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
    measurements = Measurements(
        tokens_per_step,
        factor,
        options.eval_every if options.evaluates else None,
        seconds_logged(folder / METRICS, checkpoint_step(run.checkpoint)) if run.checkpoint else 0.0,
    )
    metrics = MetricsCallback(folder / METRICS, measurements, run.log)
    trainer = PackedTrainer(
        options.segment_length,
        run.sequence_parallel,
        lengths,
        measurements,
        stop=run.stop,
        adapters=adapters,
        record=record_of_run(options, run.sequences_per_step, model, corpus, validation, held_out_set),
        keep_best=options.keep_best,
        model=model,
        args=run.arguments,
        train_dataset=training_set,
        eval_dataset=held_out_set,
        processing_class=tokenizer,
        callbacks=[*run.reporters, measurements, _SaveOptions(run), metrics],
    )
    trainer.remove_callback(PrinterCallback)
    devices = f"{run.arguments.world_size} x {run.arguments.device.type}"
    run.log.print(
        f"{in_millions(num_parameters)} parameters{trained} on {devices}, "
        f"{corpus.num_train:,} tokens of {corpus.num_documents:,} documents, {tokens_per_step:,} tokens a step"
    )
    run.log.print(size)
    total, epoch = options.steps * tokens_per_step, len(training_set) * options.sequence_length
    run.log.print(
        f"{options.steps:,} steps: {total:,} tokens, {total / epoch:.3g} epochs (passes over the training text)"
        + (f"; {checkpoint_step(run.checkpoint):,} steps are made" if run.checkpoint else "")
    )
    for line in describe_corpora(corpus, validation, training_set, options):
        run.log.print(line)
    if lengths is None:
        run.log.print("no bits per byte: the tokens of this tokenizer are not bytes of the text")
    run.log.print(run.execution.description)
    return trainer, corpus


def _run(run: _OpenRun, trainer: PackedTrainer, corpus: Corpus) -> Path:
    """Make the remaining steps, plot the losses, and return the last checkpoint."""
    folder = run.folder.path
    if not run.checkpoint or checkpoint_step(run.checkpoint) < run.options.steps:  # or the Trainer makes one more
        _make_steps(run, trainer)
    last = last_checkpoint(folder)
    if rank() == 0:
        title = f"{folder.resolve().name}: {describe_size(cast(Any, trainer.model), run.options)}"
        baselines, held_out = {}, cast(PackedDataset | None, trainer.eval_dataset)
        if held_out is not None:
            baselines = {"token frequencies": held_out.loss_of(corpus.unigram())}
        else:
            title += f"\n{NOT_EVALUATED}"
        plot_loss(folder / METRICS, folder / PLOT, baselines, title)
    run.log.print(f"checkpoint  {last}\nmetrics     {folder / METRICS}\nloss plot   {folder / PLOT}")
    if rank() == 0:
        if (best := best_checkpoint(folder)) and (loss := held_out_loss(best)) is not None:
            run.log.print(f"best        {folder / BEST}: {best.name}, held-out loss {loss:.4f}")
        if losses := describe_losses(folder / METRICS):
            run.log.print(losses)
    if (repository := run.repository) is not None:
        run.log.print(f"pushed      {on_first(lambda: push_run(run.options, repository, last))}")
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
    finally:
        cast(MetricsCallback, trainer.pop_callback(MetricsCallback)).stop()
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
    run.log.print(f"starting from {run.options.init_from}")
    return load_base(run.options, tokenizer)


def _prepare(run: _OpenRun, tokenizer: PreTrainedTokenizerFast) -> None:
    """Find and tokenize the data, unless the run has done that; create the repository once the data is found."""
    sources = None if run.has_corpus else find_sources(run.options, run.log)
    create_repository(run.options, run.repository)
    if sources is not None:
        prepare_corpora(sources, run.folder.path, tokenizer, run.options.held_out, run.log)


def _tokenizer(run: _OpenRun) -> PreTrainedTokenizerFast:
    if run.checkpoint is not None:
        return load_tokenizer(run.checkpoint)

    tokenizer = load_tokenizer(run.options.init_from or run.options.tokenizer, run.options.eos_token, run.log.print)
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
