"""Atomic checkpoints of training runs."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_map
from transformers import TrainerState

from ..files import flush
from ..models.adapters import save_adapters, trained_weights
from ..models.card import write_card
from ..models.checkpoint import PREFIX, TRAINER_STATE, checkpoint_step, checkpoints, load_model
from .best import best_checkpoint, find_best, link_best
from .folder import write_checksums
from .guard import GuardedTrainer
from .options import FILE
from .processes import together
from .schedule import set_learning_rates
from .tokenizer import load_tokenizer

UNFINISHED = "unfinished"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
UNSHARDED = StateDictOptions(full_state_dict=True)
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)


class CheckpointingTrainer(GuardedTrainer):
    """Trainer with atomic checkpoints, written by a thread: a folder `checkpoint-N` is complete.

    A step waits only until its weights and optimizer state are copied to memory of the host; the next save and the end
    of training wait until the files are written. An error of the thread is raised before the next step.
    A checkpoint is written to another folder, flushed and renamed; a signal or a full disk during a save leaves the
    earlier checkpoints unchanged. Its files do not depend on the number of processes: one process writes unsharded
    tensors by name. Checksums of the files show later damage.

    Args:
        record: options of the run, and what its model card says of data and size; kept in each checkpoint.
        adapters: configuration of the adapters that alone are trained and saved; None for all weights.
        keep_best: keep the checkpoint with the lowest held-out loss, see `best`.
        options: see `GuardedTrainer`; to resume, the model holds the weights of the checkpoint.
    """

    def __init__(
        self, *args: Any, record: dict[str, Any], adapters: Any = None, keep_best: bool = False, **options: Any
    ):
        use_cache = options["model"].config.use_cache
        super().__init__(*args, **options)
        cast(Any, self.model).config.use_cache = use_cache  # which Trainer has replaced
        self.record, self.adapters, self.keep_best = record, adapters, keep_best
        self._best_step, self._best_loss = -1, math.inf
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None  # of the checkpoint that the thread writes
        self._writes: list[Callable[[], Any]] | None = None  # of large files, during a save: the thread's

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Take the intervals of logs, evaluations and checkpoints from the options, not from the checkpoint."""
        state = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return state

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and return when the last checkpoint is complete."""
        if self.keep_best and (found := find_best(Path(str(self.args.output_dir)))):
            checkpoint, self._best_loss = found
            if self.args.should_save and best_checkpoint(checkpoint.parent) != checkpoint:
                link_best(checkpoint)
        try:
            result = super().train(*args, **kwargs)
        except BaseException:
            with suppress(OSError):  # of the two errors, the one that ended the training
                self._finish_saving()
            raise
        together(self._finish_saving)
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._written is not None and self._written.done():
            self._finish_saving()
        return super().training_step(*args, **kwargs)

    def _consider(self, held_out_loss: float) -> None:
        """Save a checkpoint after an evaluation with the lowest loss."""
        if self.keep_best and held_out_loss < self._best_loss:
            self._best_step, self._best_loss = self.state.global_step, held_out_loss
            self.control.should_save = True

    def _finish_saving(self) -> None:
        """Wait for the thread.

        Raises:
            OSError: it could not write the checkpoint.
        """
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def _get_output_dir(self, trial: Any = None) -> str:
        folder = super()._get_output_dir(trial)
        return folder if self._writes is None else os.path.join(folder, UNFINISHED)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        checkpoint = Path(str(self.args.output_dir), f"{PREFIX}{self.state.global_step}")
        unfinished = checkpoint.with_name(UNFINISHED)
        self.check_weights()
        together(self._finish_saving)
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
            (unfinished / checkpoint.name).mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._writes = writes = []
        try:
            with _removed_after_error(unfinished, checkpoint):
                super()._save_checkpoint(*args, **kwargs)
        finally:
            self._writes = None
        self.accelerator.wait_for_everyone()  # every process has written its random state
        if self.args.should_save:
            is_best = self._best_step == self.state.global_step
            self._written = self._writer.submit(self._write, unfinished, checkpoint, writes, is_best)

    def _write(self, unfinished: Path, checkpoint: Path, writes: list[Callable[[], Any]], is_best: bool) -> None:
        """Write what is large, complete the checkpoint and remove the oldest, in the thread."""
        with _removed_after_error(unfinished, checkpoint):
            for write in writes:
                write()
            folder = unfinished / checkpoint.name
            (folder / FILE).write_text(json.dumps(self.record, indent=1), encoding="utf-8")
            write_card(folder)
            write_checksums(folder)
            for path in [*unfinished.rglob("*"), unfinished]:
                flush(path)
        os.replace(folder, checkpoint)
        flush(checkpoint.parent)
        if is_best:
            link_best(checkpoint)
        kept, best = self.args.save_total_limit, best_checkpoint(checkpoint.parent)
        for old in checkpoints(checkpoint.parent)[:-kept] if kept else []:
            if old != best:
                os.replace(old, unfinished / old.name)
        shutil.rmtree(unfinished)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        weights = self._copied(self._saved_weights, cast(nn.Module, self.model))
        if self.args.should_save:
            save = self._save if self.adapters is None else self._save_adapters
            self._later(partial(save, output_dir, weights))

    def _saved_weights(self, model: nn.Module, options: StateDictOptions) -> dict[str, Any]:
        """All weights of the model, or its adapters."""
        if self.adapters is None:
            return get_model_state_dict(model, options=options)
        state = get_model_state_dict(model, options=replace(options, ignore_frozen_params=True))
        return {name: x for name, x in state.items() if name in trained_weights(model)}  # a tied head was not ignored

    def _save_adapters(self, output_dir: str, weights: dict[str, Any]) -> None:
        save_adapters(Path(output_dir), cast(Any, self.model), self.adapters, weights)
        cast(Any, self.processing_class).save_pretrained(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        model, optimizer, scheduler = self._unprepared()
        state = self._copied(get_optimizer_state_dict, model, optimizer)
        if self.args.should_save:
            self._later(partial(torch.save, state, Path(output_dir, OPTIMIZER)))
            torch.save(scheduler.state_dict(), Path(output_dir, SCHEDULER))

    def _later(self, write: Callable[[], Any]) -> None:
        """Leave a write to the thread, or write at once if no checkpoint is being saved."""
        if self._writes is None:
            write()
        else:
            self._writes.append(write)

    def _copied(self, get_state: Callable[..., dict[str, Any]], *of: Any) -> dict[str, Any]:
        """Unsharded state in memory of the host that no step changes; empty on a process that does not write it."""
        is_sharded, is_on_host = isinstance(self.model, FSDPModule), self.args.device.type == "cpu"
        state = get_state(*of, options=GATHERED if is_sharded else UNSHARDED)
        if is_sharded and not is_on_host:
            return state  # each tensor was gathered on the device and copied
        if not self.args.should_save:
            return {}

        def copy(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return torch.empty_like(x, device="cpu", pin_memory=not x.is_cpu).copy_(x, non_blocking=True)

        state = tree_map(copy, state)
        if not is_on_host:
            torch.accelerator.synchronize()
        return state

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        pass  # the model holds the weights of the checkpoint

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            model, optimizer, scheduler = self._unprepared()
            highest = [group["initial_lr"] for group in optimizer.param_groups]
            state = torch.load(Path(checkpoint, OPTIMIZER), map_location="cpu", mmap=True, weights_only=True)
            set_optimizer_state_dict(model, optimizer, state, options=GATHERED)
            scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER), weights_only=True))
            set_learning_rates(optimizer, scheduler, highest)

    def _unprepared(self) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Model, optimizer and scheduler without the wrappers of accelerate."""
        prepared: Any = self
        return prepared.model, prepared.optimizer.optimizer, prepared.lr_scheduler

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Exclude frequencies of LRPE-d and scales of random features from weight decay, besides biases and norms."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith(("theta", "sigma"))]


def check_checkpoint(checkpoint: Path) -> None:
    """Read all files that a resumed run needs.

    Raises:
        ValueError, OSError: a file is missing or damaged.
    """
    model = load_model(checkpoint)
    if bad := [name for name, x in model.named_parameters() if not x.isfinite().all()]:
        raise ValueError(f"its weights are not finite: {bad[0]}")
    load_tokenizer(str(checkpoint))
    read_record(checkpoint)
    try:
        for name in (OPTIMIZER, SCHEDULER):
            torch.load(checkpoint / name, map_location="cpu", mmap=True, weights_only=True)
        step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE)).global_step
    except Exception as error:  # torch.load raises any kind for damaged files
        raise ValueError(f"its state is damaged: {error}") from error
    if step != checkpoint_step(checkpoint):
        raise ValueError(f"{TRAINER_STATE} is of step {step}")


def read_record(checkpoint: Path) -> dict[str, Any] | None:
    """Read the options that a checkpoint was trained with; None if an older version wrote the checkpoint.

    Raises:
        ValueError: the file is damaged.
    """
    file = checkpoint / FILE
    if not file.exists():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not isinstance(record.get("sequences_per_step"), int):
        raise ValueError(f"{FILE} is damaged")
    return record


@contextmanager
def _removed_after_error(unfinished: Path, checkpoint: Path) -> Iterator[None]:
    """Remove an unfinished checkpoint after an error, and name the checkpoint in it."""
    try:
        yield
    except Exception as error:  # a full disk raises OSError, RuntimeError or an exception of a Rust library
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"could not save {checkpoint}: {error}") from error
