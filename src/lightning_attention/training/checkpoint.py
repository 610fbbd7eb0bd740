"""Atomic checkpoints of training runs."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
from transformers import TrainerState

from ..files import flush
from ..models.checkpoint import PREFIX, checkpoint_step, checkpoints, load_model
from .folder import write_checksums
from .guard import GuardedTrainer
from .options import FILE
from .tokenizer import load_tokenizer

UNFINISHED = "unfinished"
OPTIMIZER, SCHEDULER, TRAINER_STATE = "optimizer.pt", "scheduler.pt", "trainer_state.json"
UNSHARDED = StateDictOptions(full_state_dict=True, cpu_offload=True)


class CheckpointingTrainer(GuardedTrainer):
    """Trainer with atomic checkpoints: a folder `checkpoint-N` is complete.

    A checkpoint is written to another folder, flushed and renamed; a signal or a full disk during a save leaves the
    earlier checkpoints unchanged. Its files do not depend on the number of processes: one process writes unsharded
    tensors by name. Checksums of the files show later damage.

    Args:
        record: options of the run, kept in each checkpoint.
        options: see `GuardedTrainer`; to resume, the model holds the weights of the checkpoint.
    """

    _is_saving = False

    def __init__(self, *args: Any, record: dict[str, Any], **options: Any):
        use_cache = options["model"].config.use_cache
        super().__init__(*args, **options)
        cast(Any, self.model).config.use_cache = use_cache  # which Trainer has replaced
        self.record = record

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Take the intervals of logs, evaluations and checkpoints from the options, not from the checkpoint."""
        state = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return state

    def _get_output_dir(self, trial: Any = None) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._is_saving else folder

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(str(self.args.output_dir))
        name, unfinished = f"{PREFIX}{self.state.global_step}", folder / UNFINISHED
        self.check_weights()
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            with _removed_after_error(unfinished, folder / name):
                super()._save_checkpoint(*args, **kwargs)
                if self.args.should_save:
                    (unfinished / name / FILE).write_text(json.dumps(self.record, indent=1), encoding="utf-8")
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()  # every process has written its random state
        if self.args.should_save:
            with _removed_after_error(unfinished, folder / name):
                write_checksums(unfinished / name)
                for path in [*unfinished.rglob("*"), unfinished]:
                    flush(path)
            os.replace(unfinished / name, folder / name)
            flush(folder)
            kept = self.args.save_total_limit
            for old in checkpoints(folder)[:-kept] if kept else []:
                os.replace(old, unfinished / old.name)
            shutil.rmtree(unfinished)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        weights = get_model_state_dict(cast(nn.Module, self.model), options=UNSHARDED)
        if self.args.should_save:
            self._save(output_dir, weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        model, optimizer, scheduler = self._unprepared()
        state = get_optimizer_state_dict(model, optimizer, options=UNSHARDED)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER))
            torch.save(scheduler.state_dict(), Path(output_dir, SCHEDULER))

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        pass  # the model holds the weights of the checkpoint

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            model, optimizer, scheduler = self._unprepared()
            state = torch.load(Path(checkpoint, OPTIMIZER), map_location="cpu", mmap=True, weights_only=True)
            set_optimizer_state_dict(model, optimizer, state, options=UNSHARDED)
            scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER), weights_only=True))

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
