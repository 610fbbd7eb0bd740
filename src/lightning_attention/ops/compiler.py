"""Functions with decorators of torch.compiler.

Import this module where a function is called: the decorators import torch._dynamo, which takes as long as PyTorch.
"""

from typing import Any

import torch
from torch import Tensor

from . import autograd, transforms


@torch.compiler.disable(reason="lightning_attention under torch.func is not traced: it runs outside of the graph")
def transformed_attention(*arguments: Any) -> tuple[Tensor, ...]:
    """`autograd.attention` under the transforms of torch.func, or in forward mode."""
    if not transforms.is_functional():  # torch.func finds `jvp` by itself, at any level
        transforms.refuse_tangents(autograd.NAME, dict(zip(autograd.FORWARD, arguments, strict=True)))
    return autograd.TransformedAttention.apply(*arguments)
