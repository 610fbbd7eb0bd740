"""Products of decoder layers in float8, by torchao."""

from importlib.util import find_spec

import torch
from torch import nn

from ..extras import require
from .model import LightningDecoderLayer

# Scales of rows, and gradients of weights in the dtype of the inputs: the recipe of torchao that loses least.
RECIPE = "rowwise_with_gw_hp"
MULTIPLE = 16  # sizes that are multiplied in float8


def use_float8(model: nn.Module) -> None:
    """Compute products with the weights of all decoder layers in float8, in place, for training in bfloat16 autocast.

    Every plain linear layer whose sizes are multiples of 16 becomes torchao's, with its weight and its name: save, load
    and generate as before. Each row of the inputs, of the weights and of the gradients of the outputs is rounded to
    e4m3, 3 bits of mantissa, with a scale of its own. Gradients of the weights, embedding, head and attention are
    computed as before.

    It pays on GPUs of compute capability 8.9 and higher, with compiled layers. Call it before `compile_layers`,
    `fully_shard` and `DistributedDataParallel`, and after PEFT has added its layers.

    Args:
        model: any model of this library, or a module that holds one.

    Raises:
        ImportError: torchao is not installed.
        TypeError: the model has no decoder layer of this library.
        ValueError: no plain linear layer has sizes that are multiples of 16.

    Source: FP8 Formats for Deep Learning (arXiv 2209.05433).

    Example:
        >>> from lightning_attention.models import LightningConfig, LightningForCausalLM, compile_layers, use_float8
        >>> model = LightningForCausalLM(LightningConfig.from_size("demo", vocab_size=256))
        >>> use_float8(model)  # doctest: +SKIP
        >>> compile_layers(model)
    """
    require("float8", "torchao")
    layers = [module for module in model.modules() if isinstance(module, LightningDecoderLayer)]
    if not layers:
        raise TypeError(f"use_float8 takes a model with lightning attention layers, got {type(model).__name__}")
    if not any(_has_sizes(module) for layer in layers for module in layer.modules()):
        raise ValueError(f"no plain linear layer has sizes that are multiples of {MULTIPLE}")
    for layer in layers:
        _convert(layer)


def float8_error(device: torch.device) -> str | None:
    """Compute a small product on a device, and its gradient; return why that failed, in a line, or None."""
    if find_spec("torchao") is None:
        return "torchao is not installed: run pip install 'lightning-attention[float8]'"
    try:
        small = nn.Sequential(nn.Linear(MULTIPLE, MULTIPLE, bias=False, device=device, dtype=torch.bfloat16))
        _convert(small)
        small(torch.ones(MULTIPLE, MULTIPLE, device=device, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    except Exception as error:  # of many types, by what is missing
        return f"products in float8 fail: {' '.join(str(error).split())[:200]}"
    return None


def _convert(module: nn.Module) -> None:
    from torchao.float8 import (  # pyright: ignore[reportMissingImports]  takes a second
        Float8LinearConfig,
        convert_to_float8_training,
    )

    config = Float8LinearConfig.from_recipe_name(RECIPE)
    convert_to_float8_training(module, config=config, module_filter_fn=lambda linear, _: _has_sizes(linear))


def _has_sizes(module: nn.Module) -> bool:
    """True for a plain linear layer that can be multiplied in float8; quantised ones are classes of their own."""
    return type(module) is nn.Linear and module.in_features % MULTIPLE == module.out_features % MULTIPLE == 0
