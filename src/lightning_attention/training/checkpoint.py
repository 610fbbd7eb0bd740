"""Checkpoints that are complete or not there."""

import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import Trainer

from ..models.checkpoint import PREFIX, checkpoints

UNFINISHED = "unfinished"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"


class CheckpointingTrainer(Trainer):
    """transformers' Trainer, with checkpoints written aside and renamed, so that a folder `checkpoint-N` is complete.

    Whatever ends a save, a signal or a full disk, leaves the last checkpoint as it was. What is in one does not depend
    on how processes share the work: together they gather whole tensors, by name, which one of them writes.

    The model given is that of the checkpoint to go on from, if there is one.
    """

    _is_saving = False

    def _get_output_dir(self, trial: Any = None) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._is_saving else folder

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(str(self.args.output_dir))
        name, unfinished = f"{PREFIX}{self.state.global_step}", folder / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        except Exception as error:  # what a full disk raises depends on the writer: OSError, RuntimeError, Rust's own
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(f"could not save {folder / name}: {error}") from error
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            _flush(unfinished)
            os.replace(unfinished / name, folder / name)
            kept = self.args.save_total_limit
            for old in checkpoints(folder)[:-kept] if kept else []:
                os.replace(old, unfinished / old.name)
            shutil.rmtree(unfinished)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        weights = get_model_state_dict(cast(nn.Module, self.model), options=_WHOLE)
        if self.args.should_save:
            self._save(output_dir, weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        model, optimizer, scheduler = self._trained()
        state = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER))
            torch.save(scheduler.state_dict(), Path(output_dir, SCHEDULER))

    def _load_from_checkpoint(self, *_: Any) -> None:
        pass

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            model, optimizer, scheduler = self._trained()
            state = torch.load(Path(checkpoint, OPTIMIZER), map_location="cpu", mmap=True, weights_only=True)
            set_optimizer_state_dict(model, optimizer, state, options=_WHOLE)
            scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER), weights_only=True))

    def _trained(self) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Model, optimizer and scheduler, without what accelerate has put around them."""
        prepared: Any = self
        return prepared.model, prepared.optimizer.optimizer, prepared.lr_scheduler

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Weight decay is for the matrices: a position's rate that shrinks is a position lost."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("theta")]


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _flush(folder: Path) -> None:
    """To the disk, so that not even a power cut can leave a renamed folder with empty files."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
