"""Cross-entropy of a linear layer, with its gradients, in the memory of one chunk of logits.

The gradients are computed in the forward pass, while the logits of a chunk exist: `G = softmax(X Wᵀ) - onehot` is the
gradient of the logits, `dX = G W` and `dW = Gᵀ X`. Source: Liger Kernel (arXiv 2410.10989), section 3.2.
"""

from typing import Any

import torch
from torch import Tensor

from .gpu import triton_reasons

# Logits of a chunk. On a GPU large products are efficient: 8192 tokens of 64K symbols. On a CPU a chunk should fit the
# cache: measured best of 2^18 to 2^25 on a Xeon with 36 MiB, by up to 40%.
MAX_LOGITS_ON_ACCELERATOR, MAX_LOGITS_ON_CPU = 1 << 29, 1 << 23


def chunk_length(num_tokens: int, vocab_size: int, max_logits: int) -> int:
    """Tokens of each of the fewest equal chunks with at most `max_logits` logits, or one token."""
    max_tokens = max(max_logits // vocab_size, 1)
    num_chunks = max(-(-num_tokens // max_tokens), 1)
    return max(-(-num_tokens // num_chunks), 1)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and sums: float32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def loss_and_gradients(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, needs_dx: bool, needs_dweight: bool
) -> list[Tensor]:
    """`[loss, dx, dweight]` of the summed loss, without the gradients that are not needed.

    Args:
        x: `[N, W]`.
        weight: `[V, W]`.
        labels: `[N]` int64.

    Returns:
        The loss and dweight in float32 (float64 for float64): a sum of many tokens may exceed the range of float16.
    """
    _check_range(labels, len(weight), ignore_index)
    dtype = accumulation_dtype(x.dtype)
    losses = x.new_empty(len(x), dtype=dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    dweight = weight.new_zeros(weight.shape, dtype=dtype) if needs_dweight else None
    max_logits = MAX_LOGITS_ON_CPU if x.device.type == "cpu" else MAX_LOGITS_ON_ACCELERATOR
    length = chunk_length(len(x), len(weight), max_logits)
    for start in range(0, len(x), length):
        chunk = slice(start, start + length)
        logits = x[chunk] @ weight.mT
        needs_gradient = needs_dx or needs_dweight
        gradient = softmax_gradient(logits, labels[chunk], ignore_index, losses[chunk], needs_gradient)
        if dx is not None:
            torch.mm(gradient.to(x.dtype), weight, out=dx[chunk])
        if dweight is not None:
            _add_product(dweight, gradient.mT, x[chunk])
        del logits, gradient  # before those of the next chunk are made
    return [losses.sum(), *(gradient for gradient in (dx, dweight) if gradient is not None)]


def save_gradients(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    """Save the gradients that the operator has computed, as its outputs: a gradient of them is a second derivative."""
    x, *_, ctx.needs_dx, ctx.needs_dweight = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def scale_gradients(ctx: Any, d_outputs: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments of the operator."""
    d_loss, *d_gradients = d_outputs
    if any(gradient is not None for gradient in d_gradients):
        raise NotImplementedError("linear_cross_entropy has no second derivative")
    gradients = [None if d_loss is None else (y * d_loss).to(ctx.dtype) for y in ctx.saved_tensors]
    dx = gradients[0] if ctx.needs_dx else None
    dweight = gradients[-1] if ctx.needs_dweight else None
    return dx, dweight, None, None, None, None


def softmax_gradient(logits: Tensor, labels: Tensor, ignore_index: int, losses: Tensor, needs_gradient: bool) -> Tensor:
    """Fill `losses` `[C]` of `logits` `[C, V]`, and return the gradient `[C, V]` of their sum, perhaps in their memory.

    Both are 0 for ignored labels, and NaN for labels out of range.
    """
    if logits.dtype != torch.float64 and not triton_reasons(logits.device):
        from .triton import softmax_gradient as kernels

        return kernels.softmax_gradient(logits, labels, ignore_index, losses, needs_gradient)
    log_p = logits.to(losses.dtype).log_softmax(dim=1)
    is_ignored = labels == ignore_index
    at = labels.clamp(0, logits.shape[1] - 1)
    is_wrong = (at != labels) & ~is_ignored
    torch.neg(log_p.gather(1, at[:, None])[:, 0], out=losses)
    losses.masked_fill_(is_ignored, 0).masked_fill_(is_wrong, torch.nan)
    if not needs_gradient:
        return log_p
    gradient = log_p.exp_()
    gradient.scatter_add_(1, at[:, None], gradient.new_full((len(at), 1), -1))
    return gradient.masked_fill_(is_ignored[:, None], 0).masked_fill_(is_wrong[:, None], torch.nan)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a b`, in the dtype of `total`."""
    if total.is_cuda and a.dtype != total.dtype and torch.version.hip is None:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _check_range(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise where values are at hand: reading those of an accelerator would make the host wait."""
    if labels.device.type != "cpu":
        return
    wrong = labels[((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)]
    if len(wrong):
        raise IndexError(f"labels must be in [0, {vocab_size}) or ignore_index = {ignore_index}, got {wrong[0].item()}")
