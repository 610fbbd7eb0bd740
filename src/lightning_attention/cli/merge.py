"""`lightning-attention merge`: merge LoRA adapters into the weights of their model."""

from pathlib import Path
from typing import Annotated

from typer import Option

from .imports import quick_imports


def merge(
    checkpoint: Annotated[Path, Option(help="Checkpoint with LoRA adapters, or output folder of a run.")],
    output: Annotated[Path, Option(help="Folder for the merged checkpoint; it must be empty or not exist.")],
) -> None:
    """Merge LoRA adapters into the weights of their model, and save it as a checkpoint without adapters."""
    with quick_imports():
        from transformers.utils.logging import disable_progress_bar

        from ..models.adapters import merge_checkpoint

    disable_progress_bar()
    print(f"checkpoint  {merge_checkpoint(checkpoint, output)}")
