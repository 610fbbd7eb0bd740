"""Find checkpoints on disk, and load their weights without running code from the folder."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, logging

from ..paths import PathLike, to_path
from .configuration import LightningConfig
from .heads import LightningForCausalLM

PREFIX = "checkpoint-"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, in checkpoints of LoRA
RUN, TRAINER_STATE = "run.json", "trainer_state.json"  # options and logs of a run, in its checkpoints
# Errors of transformers and safetensors for files that are damaged or of another kind.
UNUSABLE = (
    OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, SafetensorError,
    StrictDataclassError,
)  # fmt: skip


def checkpoints(folder: PathLike) -> list[Path]:
    """List the complete checkpoints of a training run, oldest first."""
    paths = to_path(folder, "folder").glob(f"{PREFIX}*")
    return sorted((path for path in paths if path.name.removeprefix(PREFIX).isdecimal()), key=checkpoint_step)


def checkpoint_step(checkpoint: PathLike) -> int:
    """Optimizer step of a checkpoint, from its name."""
    return int(to_path(checkpoint, "checkpoint").name.removeprefix(PREFIX))


def last_checkpoint(folder: PathLike) -> Path:
    """Find the checkpoint to load: the folder itself if it contains a model or adapters, else the last one of a run.

    Raises:
        ValueError: the folder contains no checkpoint.
    """
    folder = to_path(folder, "folder")
    if any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        return folder
    if found := checkpoints(folder):
        return found[-1]
    raise ValueError(f"no checkpoint in {folder}")


def load_model(folder: PathLike, dtype: torch.dtype = torch.float32) -> LightningForCausalLM:
    """Load a model with exactly the weights of a checkpoint, on the CPU.

    Weights are read from safetensors, never from pickles, and no code from the folder is run. LoRA adapters are merged
    into the weights of their base model in float32, before the weights are rounded to `dtype`.

    Raises:
        TypeError: the folder is not a path.
        ValueError: the folder contains no model of this library, or weights that do not fit its configuration; or
            adapters whose base model is missing, see `adapters.load_adapted`.
        ImportError: the folder contains adapters, and PEFT is not installed.
    """
    folder = to_path(folder, "folder")
    if (folder / ADAPTER_CONFIG).is_file():
        from .adapters import load_merged

        merged = load_merged(folder).to(dtype)
        merged.config.dtype = dtype
        return merged
    try:
        model_type = LightningConfig.get_config_dict(folder)[0].get("model_type", LightningConfig.model_type)
        if model_type != LightningConfig.model_type:  # transformers would only warn
            raise ValueError(f"its model_type is {model_type!r}, not {LightningConfig.model_type!r}")
        if (folder / GENERATION_CONFIG_NAME).exists():  # transformers would ignore a damaged file
            GenerationConfig.from_pretrained(folder)
        with torch.device("cpu"), _errors_only():
            loaded: Any = LightningForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except UNUSABLE as error:
        raise ValueError(f"{folder} is not a checkpoint: {error}") from error
    model, report = loaded
    if wrong := [f"{kind.removesuffix('_keys')} {_describe(keys)}" for kind, keys in report.items() if keys]:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {'; '.join(wrong)}")
    return model


@contextmanager
def _errors_only() -> Iterator[None]:
    """Silence transformers' warning about weights that do not fit, since `load_model` raises an error."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _describe(keys: Iterable[str | tuple]) -> str:
    names = sorted(key if isinstance(key, str) else key[0] for key in keys)
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
