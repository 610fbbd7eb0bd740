"""Lightning Attention-1 (TransNormerLLM, arXiv 2307.14995): quadratic, like FlashAttention without softmax.

`o_i = Σ_{j <= i} λ^(i-j) (q_i · k_j) v_j` from tiles of scores, without a state. No tile is skipped, however far it has
decayed. One kernel computes the output and, from other inputs, each gradient, with two products each.

Names: `o_` offsets, `p_` pointers, `b_` blocks, `m_` masks; tiles of BT queries and BS keys, BD covers the head size D.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles by bytes of an element. In bfloat16 at D = 128: 189 registers, 128 KiB of shared memory, no spills on sm_90.
TILES = {
    2: {"BT": 128, "BS": 64, "NUM_STAGES": 3, "num_warps": 8},
    4: {"BT": 64, "BS": 32, "NUM_STAGES": 1, "num_warps": 8},
}

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


def lightning1(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Compute `o_i = Σ_{j <= i} λ^(i-j) (q_i · k_j) v_j`, differentiable in q, k and v.

    Args:
        q, k, v: `[B, T, H, D]` of one dtype, contiguous.
        log_decay: `[H]` float32, natural logarithm of the decay per token, <= 0.

    Returns:
        `[B, T, H, D]`.
    """
    return _Lightning1.apply(q, k, v, log_decay)


class _Lightning1(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay):
        ctx.save_for_backward(q, k, v, log_decay)
        return _left_product(q, k, v, log_decay)

    @staticmethod
    def backward(ctx, do):
        q, k, v, log_decay = ctx.saved_tensors
        do = do.contiguous()
        dq = _left_product(do, v, k, log_decay)
        dk = _left_product(v, do, q, log_decay, reverse=True)
        dv = _left_product(k, q, do, log_decay, reverse=True)
        return dq, dk, dv, None


def _left_product(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, reverse: bool = False) -> Tensor:
    B, T, H, D = q.shape
    o = torch.empty_like(v)
    constants: dict[str, Any] = {"D": D, "BD": max(16, triton.next_power_of_2(D)), "REVERSE": reverse}
    constants |= TILES[q.element_size()]
    grid = triton.cdiv(T, constants["BT"]), B * H
    left_product_kernel[grid](q, k, v, o, log_decay, T, H, **constants)
    return o


@triton.jit(do_not_specialize=["T", "H"])
def left_product_kernel(
    q,
    k,
    v,
    o,
    log_decay,
    T,
    H,
    D: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    REVERSE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Compute `o_i = Σ_j λ^|i-j| (q_i · k_j) v_j` over j <= i, in reverse over j >= i, for BT queries of one head."""
    # Longest loops first; neighbouring programs share a head, whose keys and values they read from L2.
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b, i_h = tl.program_id(1) // H, tl.program_id(1) % H
    stride = (H * D).to(tl.int64)
    start = (i_b.to(tl.int64) * T * H + i_h) * D
    if REVERSE:
        start += (T - 1) * stride
        stride = -stride

    log2_decay = tl.maximum(tl.load(log_decay + i_h), -1e30) * LOG2_E  # finite, because -inf times 0 is NaN
    lo, hi = i_t * BT, tl.minimum((i_t + 1) * BT, T)
    o_i, o_j, o_d = tl.arange(0, BT), tl.arange(0, BS), tl.arange(0, BD)
    m_i = (o_i < T - lo)[:, None]
    p_k, p_v = k + start, v + start
    b_q = _load_tokens(q + start + lo * stride, o_i, o_d, stride, m_i, D, BD)  # [BT, BD]
    b_o = tl.zeros([BT, BD], tl.float32)

    # λ^(i-j) = λ^(i-lo) λ^(lo-j), no exponent above 0: a factor per key here, per query after the loop.
    for j in tl.range(0, lo, BS, num_stages=NUM_STAGES):
        b_k = _load_tokens(p_k, o_j, o_d, stride, None, D, BD)  # [BS, BD]
        b_v = _load_tokens(p_v, o_j, o_d, stride, None, D, BD)  # [BS, BD]
        b_A = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BT, BS]
        b_A *= tl.exp2(log2_decay * (lo - j - o_j))[None, :]
        b_o = tl.dot(b_A.to(b_v.dtype), b_v, b_o, input_precision="ieee")
        p_k += BS * stride
        p_v += BS * stride
    b_o *= tl.exp2(log2_decay * o_i)[:, None]

    for j in tl.range(lo, hi, BS, num_stages=1):
        m_j = (o_j < T - j)[:, None]
        b_k = _load_tokens(p_k, o_j, o_d, stride, m_j, D, BD)
        b_v = _load_tokens(p_v, o_j, o_d, stride, m_j, D, BD)
        distance = o_i[:, None] - (j - lo + o_j)[None, :]
        b_decay = tl.where(distance >= 0, tl.exp2(log2_decay * tl.maximum(distance, 0)), 0.0)
        b_A = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * b_decay
        b_o = tl.dot(b_A.to(b_v.dtype), b_v, b_o, input_precision="ieee")
        p_k += BS * stride
        p_v += BS * stride

    p_o = o + start + lo * stride
    if D != BD:
        m_i &= (o_d < D)[None, :]
    tl.store(p_o + _offsets(o_i, o_d, stride), b_o.to(o.dtype.element_ty), mask=m_i)


@triton.jit
def _offsets(o_t, o_d, stride):
    """Offsets in a block from its first token; they fit 32 bits."""
    return o_t[:, None] * stride.to(tl.int32) + o_d[None, :]


@triton.jit
def _load_tokens(p, o_t, o_d, stride, m, D: tl.constexpr, BD: tl.constexpr):
    """Load a block of tokens, with zeros for masked tokens and columns past the end."""
    if D != BD:
        m_d = (o_d < D)[None, :]
        m = m_d if m is None else m & m_d
    p += _offsets(o_t, o_d, stride)
    return tl.load(p) if m is None else tl.load(p, mask=m, other=0.0)
