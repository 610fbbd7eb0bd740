"""A run: from text to a checkpoint."""

import json
import os
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
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

from ..models import LightningConfig, LightningForCausalLM
from ..models.checkpoint import checkpoint_step, checkpoints, last_checkpoint, load_model
from ..models.tokenization import vocab_size
from .batches import has_labels
from .checkpoint import check_checkpoint, read_record
from .corpus import Corpus, PackedDataset
from .documents import Sources, standard_library
from .folder import CORPUS, METRICS, PICTURE, RunFolder, last_intact
from .metrics import MetricsCallback, plot_loss
from .options import TrainingOptions, continued
from .parallel import Ranks, all_processes, shard
from .processes import check_equal, explaining_lost_processes, is_restarted, join_processes, on_first, rank, together
from .signals import Interrupted, StopRequest, stop_requests
from .tokenizer import load_tokenizer
from .trainer import PackedTrainer


def train(options: TrainingOptions, *, resume: bool = False, console: Console | None = None) -> Path:
    """Run it, or go on with it after whatever stopped it.

    Writes to `options.output`: `corpus/` the tokens, `checkpoint-N/` models that `from_pretrained` loads,
    `metrics.jsonl`, `loss.png`, and after the first step `run.json`; a failure before that leaves nothing behind.
    Several processes, started by torchrun, share every step.

    SIGINT, SIGTERM and SIGHUP save a checkpoint after the current step; a second one ends the process at once.

    Args:
        options: see there.
        resume: continue from the last intact checkpoint, with its model and tokenizer and the tokens there are, in
            the same order; from the start if there is no checkpoint. Processes that torchrun has restarted do so.
        console: where to report.

    Returns:
        The last checkpoint.

    Raises:
        ValueError: an option or the data is of no use, the output folder holds a run and `resume` is not set, or
            another process trains in it.
        OSError: a file could not be written, or another process was lost; earlier checkpoints are intact.
        FloatingPointError: the loss, its gradient or a weight is not finite; neither stepped nor saved.
        KeyboardInterrupt: a signal has stopped the run; it is an `Interrupted`, which knows the signal.
    """
    join_processes(options.timeout)
    arguments = _arguments(options)
    console = Console(quiet=True) if rank() > 0 else console or Console(markup=False, emoji=False)
    folder = RunFolder(options.output)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_requests())
        stack.enter_context(explaining_lost_processes())
        check_equal({"resume": resume} | json.loads(options.to_json()))
        ranks = together(lambda: _ranks(options, arguments))
        on_first(lambda: stack.enter_context(folder.held()))
        checkpoint, is_new = None, not (resume or on_first(lambda: is_restarted() and folder.has_run))
        if is_new:
            on_first(folder.check_free)
        elif checkpoint := on_first(lambda: last_intact(folder.path, check_checkpoint, console.print)):
            console.print(f"resuming from {checkpoint}")
            options = together(lambda: _continued(options, checkpoint, arguments, console))
            arguments = _arguments(options)
        tokenizer = together(lambda: _tokenizer(options, checkpoint, console))
        config = None if checkpoint else together(lambda: _configuration(options, tokenizer))
        if is_new:
            on_first(lambda: _prepare_corpus(options, folder.path / CORPUS, tokenizer, console))
        corpus = together(lambda: Corpus.open(folder.path / CORPUS))
        rows, held_out = together(lambda: _datasets(corpus, options))
        set_seed(options.seed)
        model = together(lambda: LightningForCausalLM(config) if config else load_model(cast(Path, checkpoint)))
        num_parameters = model.num_parameters()
        if options.fsdp:
            shard(model, all_processes(arguments.device.type))
        if ranks is not None:
            model.model.set_sequence_parallel(ranks.sequence_parallel)
        per_step = options.batch_size * _data_processes(options, arguments) * options.accumulate
        tokens_per_step = options.sequence_length * per_step
        metrics = folder.path / METRICS
        trainer = PackedTrainer(
            options.segment_length,
            ranks,
            stop=stop,
            record=json.loads(options.to_json()) | {"sequences_per_step": per_step},
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[_Start(folder, options), MetricsCallback(metrics, tokens_per_step, console)],
        )
        trainer.remove_callback(PrinterCallback)
        console.print(
            f"{num_parameters / 1e6:.1f}M parameters on {arguments.world_size} x {arguments.device.type}, "
            f"{corpus.num_train:,} tokens of {corpus.num_documents:,} documents, {tokens_per_step:,} tokens a step"
        )
        if not checkpoint or checkpoint_step(checkpoint) < options.steps:  # the Trainer would take one step more
            _run(trainer, checkpoint, folder.path, stop)
        last = last_checkpoint(folder.path)
        if rank() == 0:
            plot_loss(metrics, folder.path / PICTURE, {"token frequencies": held_out.loss_of(corpus.unigram())})
        console.print(f"checkpoint  {last}\nmetrics     {metrics}\nloss plot   {folder.path / PICTURE}")
        return last


def _run(trainer: PackedTrainer, checkpoint: Path | None, folder: Path, stop: StopRequest) -> None:
    """Make the steps that are left; say how to go on if something ends them."""
    go_on = f"lightning-attention train --resume --output {shlex.quote(str(folder))}"
    try:
        with stop.deferred():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else False)
    except FloatingPointError as error:
        good = checkpoints(folder)
        saved = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint was saved before"
        raise FloatingPointError(f"{error}; {saved}; try a lower learning rate, or look for damaged data") from None
    step = trainer.state.global_step
    if stop.answered and step < trainer.state.max_steps:
        raise Interrupted(stop.answered, f"after step {step}, which is saved; to go on: {go_on}")


class _Start(TrainerCallback):
    """Makes the folder that of a run, once its first step is done."""

    def __init__(self, folder: RunFolder, options: TrainingOptions):
        self.folder, self.options, self.is_saved = folder, options, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.is_saved:
            if state.is_world_process_zero:
                self.options.save()
            self.folder.is_started = self.is_saved = True


class _Arguments(TrainingArguments):
    """A process works on one device: for more of them there is torchrun, not DataParallel."""

    @property
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)


def _ranks(options: TrainingOptions, arguments: TrainingArguments) -> Ranks | None:
    if options.fsdp and not dist.is_initialized():
        raise ValueError("fsdp needs the processes that torchrun starts")
    if options.sequence_parallel == 1:
        return None
    return Ranks.of(
        arguments.world_size, options.sequence_parallel, options.sequence_parallel_strategy, options.timeout
    )


def _data_processes(options: TrainingOptions, arguments: TrainingArguments) -> int:
    """How many processes, or groups of them, read sequences of their own."""
    return arguments.world_size // options.sequence_parallel


def _continued(
    options: TrainingOptions, checkpoint: Path, arguments: TrainingArguments, console: Console
) -> TrainingOptions:
    record = read_record(checkpoint)
    if record is None:
        return options
    options, changes = continued(options, record, _data_processes(options, arguments))
    for change in changes:
        console.print(change, markup=False)
    return options


def _tokenizer(options: TrainingOptions, checkpoint: Path | None, console: Console) -> PreTrainedTokenizerFast:
    if checkpoint is not None:
        return load_tokenizer(checkpoint)

    def report(line: str) -> None:
        console.print(line, markup=False, emoji=False, highlight=False)

    return load_tokenizer(options.tokenizer, options.eos_token, report)


def _datasets(corpus: Corpus, options: TrainingOptions) -> tuple[PackedDataset, PackedDataset]:
    if corpus.num_held_out < options.sequence_length:
        raise ValueError(
            f"the held-out part has {corpus.num_held_out} tokens, fewer than one sequence of "
            f"{options.sequence_length}: give more data, a larger held_out, or a shorter sequence_length"
        )
    rows = corpus.training_set(options.sequence_length)
    held_out = corpus.held_out_set(options.sequence_length, options.eval_tokens)
    for part, dataset in (("training", rows), ("held-out", held_out)):
        if not has_labels(dataset):
            raise ValueError(f"the {part} part has no token to predict: its documents hold one token each")
    return rows, held_out


def _configuration(options: TrainingOptions, tokenizer: PreTrainedTokenizerFast) -> LightningConfig:
    from_tokenizer = {
        "vocab_size": vocab_size(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    changed: dict[str, Any] = {} if options.decay_preset is None else {"decay_preset": options.decay_preset}
    if options.config is None:
        return LightningConfig.from_size(options.size, **from_tokenizer | changed)
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
        return LightningConfig.from_dict(given | from_tokenizer | changed)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{options.config} is not a model configuration: {error}") from error


def _prepare_corpus(
    options: TrainingOptions, folder: Path, tokenizer: PreTrainedTokenizerFast, console: Console
) -> None:
    if options.data:
        sources = Sources.find(options.data, options.text_field, options.seed)
    else:
        sources = Sources.find([standard_library()], seed=options.seed, without=("test", "tests"))
    with console.status("tokenizing") as status:
        Corpus.prepare(
            folder,
            sources,
            tokenizer,
            options.held_out,
            progress=lambda characters: status.update(f"tokenizing: {characters / 1e6:,.0f} million characters"),
        )
    if skipped := sources.describe_skipped():
        console.print(skipped, highlight=False)


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
