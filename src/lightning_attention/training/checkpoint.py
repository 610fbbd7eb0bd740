"""Checkpoints that are complete or not there."""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer

from ..models.checkpoint import PREFIX, checkpoints

UNFINISHED = "unfinished"


class CheckpointingTrainer(Trainer):
    """transformers' Trainer, with checkpoints written aside and renamed, so that a folder `checkpoint-N` is complete.

    Whatever ends a save, a signal or a full disk, leaves the last checkpoint as it was.
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

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Weight decay is for the matrices: a position's rate that shrinks is a position lost."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("theta")]


def _flush(folder: Path) -> None:
    """To the disk, so that not even a power cut can leave a renamed folder with empty files."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
