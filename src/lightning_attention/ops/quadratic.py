"""Lightning Attention-1: the products of all pairs of tokens, in tiles, without a state; time grows quadratically.

It computes what the operator computes, in the memory of its inputs and outputs, as FlashAttention does with softmax.
Every gradient is the same sum of other inputs. Source: TransNormerLLM (arXiv 2307.14995), section 3.3.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autograd import distinct, refuse_gradient
from .custom_ops import autocast, register
from .gpu import triton_reasons
from .inputs import AttentionInputs
from .problem import Problem, check_tensors
from .transforms import refuse_transforms, register_vmap
from .triton.config import MAX_HEAD_DIM
from .values import check_attention_values

# Queries of a block, where PyTorch computes; it also computes heads that the kernel has no tiles for.
BLOCK = 256


def quadratic_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """`o_i = Σ_{j <= i} λ^(i-j) (q_i · k_j) v_j`, differentiable once in q, k and v.

    float16 is computed in float32, since scores may exceed its range. A value that is not finite also reaches other
    tokens of its tile, earlier ones and those of other sequences.

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        log_decay: `[H]` float32, natural logarithm of the decay λ per token, <= 0; None is no decay.
        cu_seqlens: `[N + 1]` bounds of sequences packed into one batch row (B = 1).

    Returns:
        `[B, T, H, V]`.

    Raises:
        ValueError: shapes do not fit; `cu_seqlens` does not rise from 0 to T; log_decay is above 0 or NaN, or requires
            a gradient. Values are checked on the CPU alone.
        TypeError: a dtype is wrong, or an argument is not a dense tensor.
        NotImplementedError: under forward mode or another transform of torch.func, and at a second derivative.

    Example:
        >>> import torch
        >>> from lightning_attention import lightning_attention
        >>> from lightning_attention.ops.quadratic import quadratic_attention
        >>> q, k, v = torch.randn(3, 1, 100, 2, 16, dtype=torch.float64)
        >>> torch.allclose(quadratic_attention(q, k, v), lightning_attention(q, k, v).output)
        True
    """
    inputs = {"q": q, "k": k, "v": v}
    check_tensors(inputs, {"log_decay": log_decay, "cu_seqlens": cu_seqlens})
    refuse_transforms("quadratic_attention", inputs | {"log_decay": log_decay})
    refuse_gradient(log_decay)
    q, k, v = distinct(*autocast(q, k, v))
    Problem.of_attention(AttentionInputs(q, k, v, log_decay, None, cu_seqlens))
    return _QuadraticAttention.apply(q, k, v, log_decay, cu_seqlens)


class _QuadraticAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay, cu_seqlens):
        ctx.save_for_backward(q, k, v, log_decay, cu_seqlens)
        return left_product(q, k, v, log_decay, cu_seqlens, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, *rest = ctx.saved_tensors
        dq = left_product(do, v, k, *rest, False) if ctx.needs_input_grad[0] else None
        dk = left_product(v, do, q, *rest, True) if ctx.needs_input_grad[1] else None
        dv = left_product(k, q, do, *rest, True) if ctx.needs_input_grad[2] else None
        return dq, dk, dv, None, None


@register(
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? cu_seqlens, bool reverse) -> Tensor",
    lambda q, k, v, *_: torch.empty_like(v, memory_format=torch.contiguous_format),
    num_factors=3,
)
def left_product(q, k, v, log_decay, cu_seqlens, reverse):
    """`Σ_j λ^|i-j| (q_i · k_j) v_j` over j <= i of the sequence of i; in reverse over j >= i."""
    check_attention_values(AttentionInputs(q, k, v, log_decay, None, cu_seqlens))
    if q.dtype == torch.float16:
        return left_product(q.float(), k.float(), v.float(), log_decay, cu_seqlens, reverse).half()
    q, k, v = (x.contiguous() for x in (q, k, v))
    starts = None if cu_seqlens is None else _starts(cu_seqlens, q.shape[1], reverse).to(q.device)
    is_small = max(q.shape[3], v.shape[3]) <= MAX_HEAD_DIM
    if is_small and q.dtype != torch.float64 and not triton_reasons(q.device):
        from .triton import quadratic

        return quadratic.left_product(q, k, v, log_decay, starts, reverse)
    if reverse:
        q, k, v = (x.flip(1) for x in (q, k, v))
    o = _left_product_in_blocks(q, k, v, log_decay, starts)
    return o.flip(1) if reverse else o


register_vmap(left_product, (-2,))


def _starts(cu_seqlens: Tensor, length: int, reverse: bool) -> Tensor:
    """`[T]` int32, first token of the sequence of every token; in reverse tokens count from the last."""
    token = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, token, right=True)
    starts = (length - cu_seqlens[sequence]).flip(0) if reverse else cu_seqlens[sequence - 1]
    return starts.int()


def _left_product_in_blocks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, starts: Tensor | None) -> Tensor:
    """The sum over j <= i, for a block of queries at a time, in float32 at least."""
    o, dtype = torch.empty_like(v), torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # [B, H, T, ...]
    for lo in range(0, q.shape[2], BLOCK):
        hi = min(lo + BLOCK, q.shape[2])
        first = 0 if starts is None else int(starts[lo])
        i, j = (torch.arange(*bounds, device=q.device) for bounds in ((lo, hi), (first, hi)))
        distance = i[:, None] - j
        is_pair = distance >= 0
        if starts is not None:
            is_pair &= j >= starts[lo:hi, None]
        scores = q[:, :, lo:hi] @ k[:, :, first:hi].mT
        if log_decay is not None:
            exponents = log_decay.to(dtype).clamp_min(-1e30)[:, None, None] * distance.clamp_min(0)
            scores = scores * exponents.exp()
        scores = scores.masked_fill(~is_pair, 0)
        o[:, lo:hi] = (scores @ v[:, :, first:hi]).transpose(1, 2)
    return o
