"""Cross-entropy of a chunk of logits, and its gradient in place of the logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.primitives import jit

# Logits that a program reads at once; its warps.
MAX_BLOCK, NUM_WARPS = 4096, 8


def softmax_gradient(logits: Tensor, labels: Tensor, ignore_index: int, losses: Tensor, needs_gradient: bool) -> Tensor:
    """See `ops.cross_entropy.softmax_gradient`; the gradient replaces the logits."""
    C, V = logits.shape
    with torch.accelerator.device_index(logits.device.index):
        softmax_gradient_kernel[(C,)](
            logits=logits,
            labels=labels,
            losses=losses,
            ignore_index=ignore_index,
            V=V,
            BLOCK=min(triton.next_power_of_2(V), MAX_BLOCK),
            NEEDS_GRADIENT=needs_gradient,
            num_warps=NUM_WARPS,
        )
    return logits


@jit(do_not_specialize=["ignore_index"])
def softmax_gradient_kernel(
    logits,
    labels,
    losses,
    ignore_index,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
):
    """Loss of one token of `[C, V]` logits, and `softmax - onehot` in place of its logits; both 0 if it is ignored.

    A label out of range makes both NaN.
    """
    i_t = tl.program_id(0).to(tl.int64)
    p_logits = logits + i_t * V
    label = tl.load(labels + i_t)
    is_ignored = label == ignore_index
    in_range = (label >= 0) & (label < V)
    b_label = tl.load(p_logits + label, mask=in_range, other=float("nan")).to(tl.float32)
    o_v = tl.arange(0, BLOCK)
    # The maximum starts finite: -inf - -inf is NaN where a block of logits is -inf.
    b_max = tl.full((), -3e38, tl.float32)
    b_sum = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        in_vocabulary = start + o_v < V
        b_x = tl.load(p_logits + start + o_v, mask=in_vocabulary, other=float("-inf")).to(tl.float32)
        b_new_max = tl.maximum(b_max, tl.max(b_x, 0))
        b_sum = b_sum * tl.exp(b_max - b_new_max) + tl.sum(tl.exp(b_x - b_new_max), 0)
        b_max = b_new_max
    tl.store(losses + i_t, tl.where(is_ignored, 0.0, b_max + tl.log(b_sum) - b_label))
    if NEEDS_GRADIENT:
        tl.debug_barrier()  # every warp has read the logits, in a small vocabulary the same ones
        factor = tl.where(in_range, 1.0, float("nan"))
        for start in range(0, V, BLOCK):
            in_vocabulary = start + o_v < V
            b_x = tl.load(p_logits + start + o_v, mask=in_vocabulary, other=float("-inf")).to(tl.float32)
            b_dx = tl.exp(b_x - b_max) / b_sum - tl.where(start + o_v == label, 1.0, 0.0)
            b_dx = tl.where(is_ignored, 0.0, b_dx * factor)
            tl.store(p_logits + start + o_v, b_dx.to(logits.dtype.element_ty), mask=in_vocabulary)
