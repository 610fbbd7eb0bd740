"""Functions with decorators of torch.compiler.

Import this module where a function is called: the decorators import torch._dynamo, which takes as long as PyTorch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import autograd, transforms
from .gpu import cached_reasons
from .problem import AttentionInputs


@torch.compiler.assume_constant_result
def constant_reasons(reasons: Callable[[torch.device], list[str]], device: torch.device) -> list[str]:
    """`gpu.cached_reasons` as a constant: the capability of a device cannot be traced."""
    return cached_reasons(reasons, device)


@torch.compiler.disable(reason="lightning_attention under torch.func is not traced: it runs outside of the graph")
def transformed_attention(x: AttentionInputs[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    """`autograd.attention` under the transforms of torch.func, or in forward mode."""
    if not transforms.is_functional():  # torch.func finds `jvp` by itself, at any level
        transforms.refuse_tangents(autograd.NAME, x._asdict())
    return autograd.TransformedAttention.apply(*x, *rest)
