"""What must not be rounded when a model is."""

from collections.abc import Callable

from torch import Tensor, nn


class Float32Module(nn.Module):
    """Keeps its own parameters and buffers as they are when a model is cast: `model.bfloat16()` only moves them.

    For rates that are multiplied by a position or raised to a power: in bfloat16 a slow decay is exactly 1, and an
    angle is wrong by radians after a thousand tokens.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Module":
        def move(x: Tensor) -> Tensor:
            y = fn(x)
            return y if y.dtype == x.dtype else x.to(y.device)

        return super()._apply(move, recurse)
