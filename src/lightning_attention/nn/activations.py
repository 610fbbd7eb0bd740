"""Elementwise activations, by their names in a configuration."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def one_plus_elu(x: Tensor) -> Tensor:
    """`1 + elu(x)`: `x + 1` above 0, `exp(x)` elsewhere, which rounds no small value to 0."""
    return torch.where(x > 0, x + 1, x.clamp_max(0).exp())


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "1+elu": one_plus_elu, "none": lambda x: x}
