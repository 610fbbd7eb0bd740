"""LoRA adapters on a model, by PEFT: added for training, saved and loaded in PEFT's format, merged.

Adapters stay inside the model they are added to, so that its class and its methods remain.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ..extras import require
from ..files import complete_or_empty
from ..paths import PathLike, to_path
from .base import share_mode
from .card import write_card
from .checkpoint import ADAPTER_CONFIG, UNUSABLE, last_checkpoint, load_model
from .heads import LightningForCausalLM
from .tokenization import begin_with_bos

if TYPE_CHECKING:
    from peft import LoraConfig  # pyright: ignore[reportMissingImports]

PROJECTIONS = ("out_proj", "qkvu_proj", "vu_proj")  # the linear layers of mixers and GLU
ADAPTER_WEIGHTS = "adapter_model.safetensors"
NAME = "default"  # PEFT's name of the only adapter, which is not in files
PREFIX = "base_model.model."  # PEFT's, of all names in files


def require_peft() -> None:
    """Raise an ImportError that names the extra if PEFT is not installed."""
    require("finetune", "peft")


def lora_config(base: Path, rank: int, alpha: float, dropout: float) -> "LoraConfig":
    """PEFT's configuration of adapters on the projections of all layers.

    Args:
        base: checkpoint of the model that the adapters are for.
        rank: rank of the update of a weight.
        alpha: the update is scaled by `alpha / rank`.
        dropout: probability of dropping an input of an adapter.
    """
    require_peft()
    from peft import LoraConfig  # pyright: ignore[reportMissingImports]  takes a second

    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        target_modules=list(PROJECTIONS),
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  whole numbers are not needed
        lora_dropout=dropout,
    )


def add_adapters(model: LightningForCausalLM, config: "LoraConfig") -> None:
    """Add untrained adapters in place and freeze all other weights.

    Raises:
        ValueError: a decoder layer lacks one of the projections.
    """
    _tuner(model, config)


def _tuner(model: LightningForCausalLM, config: Any) -> Any:
    from peft import LoraModel  # pyright: ignore[reportMissingImports]  takes a second

    check_projections(model)
    return LoraModel(model, config, NAME)


def check_projections(model: LightningForCausalLM) -> None:
    """Check that every decoder layer has the linear layers that adapters are for.

    Raises:
        ValueError: a layer lacks one of them.
    """
    for index, layer in enumerate(model.model.layers):
        found = {name.rpartition(".")[2] for name, part in layer.named_modules() if isinstance(part, nn.Linear)}
        if missing := sorted(set(PROJECTIONS) - found):
            raise ValueError(f"LoRA needs the linear layers {', '.join(missing)}, which layer {index} does not have")


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are not frozen, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapters(
    folder: Path, model: LightningForCausalLM, config: "LoraConfig", weights: Mapping[str, Tensor]
) -> None:
    """Save adapters as PEFT does, and the configuration of the model.

    Args:
        folder: an existing folder.
        model: the model with its adapters.
        config: configuration of the adapters.
        weights: weights of the adapters, by their names in the model.
    """
    saved = {PREFIX + name.replace(f".{NAME}.", "."): x.contiguous() for name, x in weights.items()}
    save_file(saved, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    model.config.save_pretrained(folder)
    assert model.generation_config is not None
    model.generation_config.save_pretrained(folder)
    share_mode(folder)


def load_adapted(folder: PathLike) -> LightningForCausalLM:
    """Load a model and its adapters, in float32 on the CPU, with all other weights frozen.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the base model is missing, or the adapters are damaged, of another kind or of another model.
    """
    return _load(to_path(folder, "folder")).model


def load_merged(folder: PathLike) -> LightningForCausalLM:
    """Load a model and merge its adapters into its weights, in float32 on the CPU.

    Raises:
        ImportError, ValueError: see `load_adapted`.
    """
    return _load(to_path(folder, "folder")).merge_and_unload().requires_grad_(True)


def read_adapter_config(folder: Path) -> Any:
    """Read PEFT's configuration of the adapters in a folder.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the file is damaged, or of adapters other than LoRA.
    """
    require_peft()
    from peft import LoraConfig  # pyright: ignore[reportMissingImports]  takes a second

    try:
        kind = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("peft_type")
        if kind != "LORA":
            raise ValueError(f"its peft_type is {kind!r}, not 'LORA'")
        config = LoraConfig.from_pretrained(str(folder))
        if not isinstance(config.base_model_name_or_path, str):
            raise ValueError("it names no base model")
        return config
    except UNUSABLE as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG} cannot be used: {error}") from error


def _load(folder: Path) -> Any:
    """PEFT's tuner of a model with the adapters of a folder."""
    config = read_adapter_config(folder)
    base = Path(config.base_model_name_or_path)
    if not base.is_dir():
        raise ValueError(
            f"the base model of {folder} is missing: there is no folder {base}; put it back, or a link to it"
        )
    if (base / ADAPTER_CONFIG).is_file():
        raise ValueError(f"the base model of {folder} consists of adapters itself: merge {base} first")
    model = load_model(base)
    tuner = _tuner(model, config)
    try:
        weights = load_file(folder / ADAPTER_WEIGHTS)
    except UNUSABLE as error:
        raise ValueError(f"{folder} is not a checkpoint: {error}") from error
    expected = trained_weights(model)
    found = {_name_in_model(name): x for name, x in weights.items()}
    wrong = sorted(expected.keys() ^ found.keys()) or [n for n, x in found.items() if x.shape != expected[n].shape]
    if wrong:
        raise ValueError(f"the adapters in {folder} do not fit their base model {base}: {wrong[0]}")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(found[name])
    return tuner


def _name_in_model(name: str) -> str:
    start, dot, last = name.removeprefix(PREFIX).rpartition(".")
    return f"{start}.{NAME}{dot}{last}"


def merge_checkpoint(checkpoint: PathLike, output: PathLike) -> Path:
    """Write a checkpoint whose weights are those of a model with its LoRA adapters merged, in float32.

    Args:
        checkpoint: checkpoint with adapters, or output folder of a run, for its last checkpoint.
        output: folder of the new checkpoint; it must be empty or not exist.

    Returns:
        The folder, which `from_pretrained` loads without PEFT; it has a model card.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: an argument is not a path.
        ValueError: there are no adapters, they cannot be loaded, or `output` has content.
        OSError: `output` cannot be written.

    Example:
        >>> from lightning_attention.models.adapters import merge_checkpoint
        >>> merge_checkpoint("tuned", "merged")  # doctest: +SKIP
    """
    folder, output = last_checkpoint(checkpoint), to_path(output, "output")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{folder} has no adapters to merge: it is a plain checkpoint")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists: choose another output")
    with complete_or_empty(output):
        model = load_merged(folder)
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ValueError(f"{folder} holds no tokenizer: {error}") from error
        begin_with_bos(tokenizer)
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
        write_card(output, trained=folder)
    return output
