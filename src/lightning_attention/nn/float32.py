"""Parts that stay float32: parameters of modules under `.to(bfloat16)`, and products under autocast."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..ops.custom_ops import autocast_dtype


class Float32Module(nn.Module):
    """Module that keeps the dtype of its own parameters and buffers when a model is cast; they still move.

    For constants that are multiplied by a position: in bfloat16 a slow decay rounds to 1, and an angle is off by
    radians after a thousand tokens.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Module":
        def move(x: Tensor) -> Tensor:
            y = fn(x)
            return y if y.dtype == x.dtype else x.to(y.device)

        return super()._apply(move, recurse)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Context in which products on the device of x keep the dtype of their inputs."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)
