"""Modules whose parameters stay float32 under `.to(bfloat16)`."""

from collections.abc import Callable

from torch import Tensor, nn


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
