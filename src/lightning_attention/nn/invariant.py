"""Products and activations whose bits for a token do not depend on the other tokens, on a CPU.

MKL chooses the order of sums by the number of rows and of threads. Here every product with a weight has one shape:
blocks of 16 rows, the last padded with zeros.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# On an AMD EPYC blocks of 16 take 1.4 to 2.2 times as long as one product of 512 rows, and 4 to 7 times as long as one
# row. Rows of other numbers of columns than multiples of 8 have other bits at other places of a block.
ROWS, COLUMNS = 16, 8
DTYPES = torch.float32, torch.float64


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by blocks of rows, as is the gradient of x."""
    outputs, inputs = weight.shape
    rows = x.reshape(-1, inputs)
    columns = round_up(inputs, COLUMNS)
    y = _Linear.apply(_padded(rows, round_up(len(rows), ROWS), columns), _padded(weight, outputs, columns))
    y = y[: len(rows)].reshape(*x.shape[:-1], outputs)
    return y if bias is None else y + bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _by_blocks(x, weight.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = gradients[0].contiguous()
        needs_dx, needs_dweight = ctx.needs_input_grad
        return _by_blocks(dy, weight) if needs_dx else None, dy.mT @ x if needs_dweight else None


def _by_blocks(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.cat([block @ matrix for block in x.split(ROWS)])


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    missing = 0, columns - x.shape[1], 0, rows - len(x)
    return F.pad(x, missing) if any(missing) else x.contiguous()


def invariant_silu(x: Tensor, inplace: bool = False) -> Tensor:
    """`F.silu` by functions whose vectorised loop rounds as their scalar one; that of `F.silu` does not."""
    decayed = torch.exp(-x.abs())  # of a number that is not positive: no overflow
    y = x * torch.where(x >= 0, 1, decayed) / (1 + decayed)
    return x.copy_(y) if inplace else y


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor]] = {F.linear: invariant_linear, F.silu: invariant_silu}


class _Invariant(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


def invariant_functions(x: Tensor, invariant: bool = True) -> AbstractContextManager[object]:
    """Context in which linear layers and SiLU have the same bits for a token whatever the other tokens are.

    Forward, and backward for gradients of activations; a gradient of a weight is a sum over tokens, whose order is that
    of the batch. On other devices than a CPU the context changes nothing.

    Args:
        x: input of the layers in the context.
        invariant: False is a context that changes nothing.

    Raises:
        ValueError: x is on a CPU and not float32 or float64, in autocast, or traced by a compiler; or this build of
            PyTorch computes products without MKL.

    Example:
        >>> import torch
        >>> from lightning_attention.nn.invariant import invariant_functions
        >>> linear, x = torch.nn.Linear(192, 768), torch.randn(64, 192)
        >>> with invariant_functions(x):
        ...     torch.equal(linear(x[:1]), linear(x)[:1])
        True
    """
    if not invariant or x.device.type != "cpu":
        return nullcontext()
    if torch.compiler.is_compiling():
        raise ValueError("invariant needs an eager model on a CPU: a compiled one has kernels by shape")
    if x.dtype not in DTYPES or torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        raise ValueError(f"invariant needs float32 or float64 on a CPU, got {dtype}")
    if not torch.backends.mkl.is_available():
        raise ValueError("invariant needs MKL on a CPU, which this build of PyTorch lacks")
    return _Invariant()
