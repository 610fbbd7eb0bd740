"""Checkpoints on disk: finding them, and loading them without trusting them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, logging

from ..paths import PathLike, to_path
from .configuration import LightningConfig
from .heads import LightningForCausalLM

PREFIX = "checkpoint-"
# What transformers and safetensors raise for files that are damaged, or hold something else.
UNUSABLE = OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, SafetensorError


def checkpoints(folder: PathLike) -> list[Path]:
    """Complete checkpoints of a training run, oldest first."""
    found = [
        path for path in to_path(folder, "folder").glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()
    ]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: PathLike) -> int:
    """The optimizer step it was taken at."""
    return int(to_path(checkpoint, "checkpoint").name.removeprefix(PREFIX))


def last_checkpoint(folder: PathLike) -> Path:
    """The checkpoint to load: the folder itself if it holds a model, else the last complete one of a run.

    Raises:
        ValueError: there is none.
    """
    folder = to_path(folder, "folder")
    if (folder / "config.json").is_file():
        return folder
    if found := checkpoints(folder):
        return found[-1]
    raise ValueError(f"no checkpoint in {folder}")


def load_model(folder: PathLike, dtype: torch.dtype = torch.float32) -> LightningForCausalLM:
    """A model with exactly the weights of a checkpoint, on the CPU.

    Weights are read from safetensors, never from pickles, and no code of the folder is run.

    Raises:
        TypeError: the folder is no path.
        ValueError: the folder holds no model of this library, or weights that do not fit its configuration.
    """
    folder = to_path(folder, "folder")
    try:
        model_type = LightningConfig.get_config_dict(folder)[0].get("model_type", LightningConfig.model_type)
        if model_type != LightningConfig.model_type:  # which transformers would only warn of
            raise ValueError(f"its model_type is {model_type!r}, not {LightningConfig.model_type!r}")
        if (folder / GENERATION_CONFIG_NAME).exists():  # which transformers would ignore if it is damaged
            GenerationConfig.from_pretrained(folder)
        with torch.device("cpu"), _errors_only():  # whatever the default device is
            loaded: Any = LightningForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except UNUSABLE as error:
        raise ValueError(f"{folder} is not a checkpoint: {error}") from error
    model, report = loaded
    wrong = [f"{kind.removesuffix('_keys')} {_name(keys)}" for kind, keys in report.items() if keys]
    if wrong:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {'; '.join(wrong)}")
    return model


@contextmanager
def _errors_only() -> Iterator[None]:
    """Silence transformers' report of weights that do not fit: an error says so."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _name(keys: Iterable[str | tuple]) -> str:
    names = sorted(key if isinstance(key, str) else key[0] for key in keys)
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
