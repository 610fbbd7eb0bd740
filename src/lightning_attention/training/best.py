"""Checkpoint with the lowest held-out loss: the link `best` in the folder of a run."""

import json
import math
import os
from pathlib import Path

from ..files import flush
from ..models.checkpoint import TRAINER_STATE, checkpoint_step, checkpoints
from .folder import BEST


def best_checkpoint(folder: Path) -> Path | None:
    """Checkpoint that the link names; None if there is none."""
    link = folder / BEST
    name = os.readlink(link) if link.is_symlink() else ""
    return next((checkpoint for checkpoint in checkpoints(folder) if checkpoint.name == name), None)


def held_out_loss(checkpoint: Path) -> float | None:
    """Held-out loss of a checkpoint; None if the run was not evaluated after its step, or its file is damaged."""
    step = checkpoint_step(checkpoint)
    try:
        history = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))["log_history"]
        found = [float(record["eval_loss"]) for record in history if record["step"] == step and "eval_loss" in record]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found[-1] if found else None


def find_best(folder: Path) -> tuple[Path, float] | None:
    """Find the checkpoint with the lowest held-out loss, and the loss; None if no checkpoint has one."""
    best: tuple[Path, float] | None = None
    for checkpoint in checkpoints(folder):
        loss = held_out_loss(checkpoint)
        if loss is not None and loss < (best[1] if best else math.inf):
            best = checkpoint, loss
    return best


def link_best(checkpoint: Path) -> None:
    """Let the link of a run name a checkpoint, atomically.

    Raises:
        OSError: the link cannot be written; the earlier one is unchanged.
    """
    link = checkpoint.parent / BEST
    temporary = link.with_name(f"{BEST}.{os.getpid()}.unfinished")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.name)
    os.replace(temporary, link)
    flush(link.parent)
