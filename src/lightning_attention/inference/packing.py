"""Weights of linear layers, arranged once for the products of decoding on a CPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import TokenMixer
from ..nn.gates import is_plain_linear

# Tokens of the products that the arrangement is chosen for. Measured on a core of an AMD EPYC, 45M in float32: a step
# of 1, 4, 16 and 64 sequences takes 26, 43, 64 and 142 ms without packing, 22, 22, 36 and 98 ms for 16 tokens, as long
# for 64, and 22, 36, 53 and 110 ms for 1.
TOKENS = 16
DTYPES = torch.float32, torch.bfloat16


def reason_against(model: nn.Module) -> str | None:
    """The reason why the weights of a model cannot be packed; None if they can."""
    if any(isinstance(module, TokenMixer) and module.invariant for module in model.modules()):
        return "it is invariant, and packed products have bits that depend on the number of sequences"
    weights = [linear.weight for linear in _linears(model)]
    if any(weight.device.type != "cpu" or weight.dtype not in DTYPES for weight in weights):
        return "weights are packed on a CPU, in float32 or bfloat16"
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return "this build of PyTorch has no oneDNN, which packs weights"
    return None


def can_pack(model: nn.Module) -> bool:
    """True if weights can be packed, and there is free memory for twice the packed ones."""
    needed = 2 * sum(linear.weight.nbytes for linear in _linears(model))
    return reason_against(model) is None and needed < _free_bytes()


class PackedWeights:
    """Packed copies of the weights of a model's linear layers.

    PyTorch arranges a weight anew for every product with it, which takes longer than a product of few tokens.

    Args:
        model: layers with a hook, a bias or a weight of another class are left as they are.
    """

    def __init__(self, model: nn.Module):
        self._linears = _linears(model)
        self._products: list[partial[Tensor]] = []
        self._version: int | None = None

    @contextmanager
    def in_use(self, version: int) -> Iterator[None]:
        """Let the layers compute with packed weights, which are packed again if the version of the weights differs."""
        replaced = any(
            product.args[0] is not x.weight for product, x in zip(self._products, self._linears, strict=False)
        )
        if version != self._version or replaced:
            self._products = [partial(_product, linear.weight, _packed(linear.weight)) for linear in self._linears]
            self._version = version
        pairs = [
            (linear, product)
            for linear, product in zip(self._linears, self._products, strict=True)
            if "forward" not in vars(linear)  # of somebody else
        ]
        try:
            for linear, product in pairs:
                linear.forward = product
            yield
        finally:
            for linear, _ in pairs:
                del linear.forward


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if is_plain_linear(module)]


def _packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TOKENS)


def _product(weight: Tensor, packed: Tensor, x: Tensor) -> Tensor:
    # Gradients are needed if the model is called in another thread meanwhile.
    if torch.is_grad_enabled() or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _free_bytes() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not known on this system
        return 0
