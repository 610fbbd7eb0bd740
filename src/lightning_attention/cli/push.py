"""`lightning-attention push`: push a checkpoint to the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from .imports import quick_imports


def push(
    checkpoint: Annotated[Path, Argument(help="Checkpoint, or output folder of a run, for its last checkpoint.")],
    name: Annotated[str, Argument(help="Repository, namespace/name; created if it does not exist.")],
    private: Annotated[bool, Option("--private", help="Create it as a private one.")] = False,
    license: Annotated[
        str | None, Option(help="License for the model card: an id of the Hub, such as apache-2.0.")
    ] = None,
    base_model: Annotated[
        str | None, Option(help="Name on the Hub of the model that was fine-tuned, or that LoRA adapters are for.")
    ] = None,
) -> None:
    """Push a model to the Hugging Face Hub: weights, configuration, tokenizer and model card.

    The token is that of hf auth login, or HF_TOKEN in the environment.
    """
    with quick_imports():
        from transformers.utils.logging import disable_progress_bar

        from ..models.hub import push as run

    disable_progress_bar()
    print(f"pushed  {run(checkpoint, name, private=private, license=license, base_model=base_model)}")
