"""Exact results in float64, to check an implementation before it is measured."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_attention import lightning_attention

from .implementations import Calls, Inputs

# Largest relative error of a head's output and gradients. Products of float32 may be TF32.
TOLERANCES = {torch.float32: 3e-3, torch.float16: 3e-3, torch.bfloat16: 1e-2}


class Oracles:
    """Exact results for the first and last head of the last batch row, over the full length, computed on first use.

    The last batch row and head have the largest offsets; the first head decays fastest, the last one slowest.
    """

    def __init__(self, inputs: Inputs):
        num_heads = inputs.do.shape[2]
        self._heads, self._tolerance = sorted({0, num_heads - 1}), TOLERANCES[inputs.do.dtype]
        self._qkvdo = tuple(self._slice(x.detach()) for x in (*inputs.qkv, inputs.do))
        self._log_decay, self._cu_seqlens = inputs.log_decay[self._heads], inputs.cu_seqlens
        self._exact: dict[bool, tuple[Tensor, ...]] = {}

    def error(self, calls: Calls) -> float:
        """Largest relative error `|x - exact| / |exact|` of output, dq, dk and dv.

        Raises:
            ArithmeticError: the error is above the tolerance, or NaN.
        """
        exact = self._exact_results(calls.implementation.is_softmax)
        return max(
            checked_error(name, self._slice(x), y, self._tolerance)
            for name, x, y in zip(("o", "dq", "dk", "dv"), calls.results(), exact, strict=True)
        )

    def _slice(self, x: Tensor) -> Tensor:
        return x[-1:, :, self._heads]

    def _exact_results(self, is_softmax: bool) -> tuple[Tensor, ...]:
        if is_softmax not in self._exact:
            q, k, v, do = (x.double() for x in self._qkvdo)
            if is_softmax:
                self._exact[True] = _softmax(q, k, v, do)
            else:
                self._exact[False] = _linear(q, k, v, do, self._log_decay, self._cu_seqlens)
        return self._exact[is_softmax]


def checked_error(name: str, x: Tensor, exact: Tensor, tolerance: float) -> float:
    """Largest relative error of a head of `[B, T, H, D]`.

    Raises:
        ArithmeticError: the error is above the tolerance, or NaN.
    """
    error = float(((x.double() - exact).norm(dim=(1, 3)) / exact.norm(dim=(1, 3))).max())
    if not error <= tolerance:
        raise ArithmeticError(f"wrong: relative error of {name} is {error:.1e}, above {tolerance:.0e}")
    return error


def _linear(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, ...]:
    for x in (q, k, v):
        x.requires_grad_()
    o = lightning_attention(q, k, v, log_decay, cu_seqlens=cu_seqlens, backend="chunked").output
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do)


def _softmax(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, ...]:
    """Compute softmax attention in blocks of queries, since all scores of a long sequence do not fit in memory."""
    q, k, v, do = (x.transpose(1, 2) for x in (q, k, v, do))
    o, gradients = torch.empty_like(q), tuple(torch.zeros_like(x) for x in (q, k, v))
    for start in range(0, q.shape[2], 512):
        block = slice(start, start + 512)
        qkv = tuple(x.detach().requires_grad_() for x in (q[:, :, block], k[:, :, : block.stop], v[:, :, : block.stop]))
        mask = qkv[0].new_ones(qkv[0].shape[2], qkv[1].shape[2], dtype=torch.bool).tril(start)
        with sdpa_kernel(SDPBackend.MATH):
            output = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
        o[:, :, block] = output.detach()
        dq, dk, dv = torch.autograd.grad(output, qkv, do[:, :, block])
        gradients[0][:, :, block] = dq
        gradients[1][:, :, : block.stop] += dk
        gradients[2][:, :, : block.stop] += dv
    return tuple(x.transpose(1, 2) for x in (o, *gradients))
