"""Runs that start from a checkpoint: what they take from it, and its LoRA adapters."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerFast

from ..models import LightningForCausalLM
from ..models.adapters import (
    add_adapters,
    check_projections,
    load_adapted,
    lora_config,
    read_adapter_config,
    require_peft,
    trained_weights,
)
from ..models.checkpoint import ADAPTER_CONFIG, last_checkpoint, load_model
from ..models.tokenization import vocab_size
from .options import TrainingOptions

if TYPE_CHECKING:
    from peft import LoraConfig  # pyright: ignore[reportMissingImports]


def with_base_checkpoint(options: TrainingOptions, *, may_be_missing: bool) -> TrainingOptions:
    """Replace `init_from` by the absolute path of one checkpoint, which a later `--resume` compares.

    Args:
        options: options of the run.
        may_be_missing: keep a path without a checkpoint, as for a run that resumes from its own.

    Raises:
        ImportError: adapters are to be trained, and PEFT is not installed.
        ValueError: there is no checkpoint, or it consists of adapters and adapters are to be trained.
    """
    if options.lora_rank is not None:
        require_peft()
    if options.init_from is None:
        return options
    try:
        base = last_checkpoint(options.init_from).absolute()
    except ValueError as error:
        if may_be_missing:
            return options
        raise ValueError(f"init_from: {error}") from error
    if options.lora_rank is not None and (base / ADAPTER_CONFIG).is_file():
        raise ValueError(f"init_from: {base} consists of LoRA adapters: merge them before training others")
    return replace(options, init_from=base)


def load_base(options: TrainingOptions, tokenizer: PreTrainedTokenizerFast) -> LightningForCausalLM:
    """Load the model that a run starts from, in float32 on the CPU.

    Raises:
        ValueError: there is no such model, the tokenizer or the sequence length does not fit it, or it lacks a layer
            that adapters are for.
    """
    assert options.init_from is not None
    model = load_model(options.init_from)
    if (needed := vocab_size(tokenizer)) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {options.init_from} has token ids up to {needed - 1}, and the model a vocabulary of "
            f"{model.config.vocab_size}"
        )
    model.config.check_length(options.sequence_length)
    if options.lora_rank is not None:
        check_projections(model)
    return model


def resumed_model(checkpoint: Path, options: TrainingOptions) -> LightningForCausalLM:
    """Load the model of a run that resumes, with its adapters apart if it trains adapters."""
    return load_model(checkpoint) if options.lora_rank is None else load_adapted(checkpoint)


def adapters_of(options: TrainingOptions, checkpoint: Path | None) -> "LoraConfig | None":
    """Configuration of the adapters that a run trains; None if it trains all weights."""
    if options.lora_rank is None:
        return None
    if checkpoint is not None:
        return read_adapter_config(checkpoint)
    assert options.init_from is not None
    alpha = 2.0 * options.lora_rank if options.lora_alpha is None else options.lora_alpha
    return lora_config(options.init_from, options.lora_rank, alpha, options.lora_dropout)


def prepare_adapters(
    model: LightningForCausalLM, options: TrainingOptions, adapters: "LoraConfig", has_adapters: bool
) -> str:
    """Add adapters to the model of a run, unless it has them; return how many weights are trained, in words."""
    if not has_adapters:
        add_adapters(model, adapters)
    if options.gradient_checkpointing:
        model.enable_input_require_grads()  # or layers after a frozen embedding are not recomputed for gradients
    count = sum(parameter.numel() for parameter in trained_weights(model).values())
    return f", {count / 1e6:.2f}M of them trained: adapters of rank {options.lora_rank}"
