"""Kernel of quadratic attention, see `..quadratic`: tiles of scores, as in FlashAttention but without softmax.

No tile is skipped, however far it has decayed; tiles of other sequences are. Names: `o_` offsets, `p_` pointers, `b_`
blocks, `m_` masks; tiles of BT queries and BS keys, BK and BV cover the head sizes K and V.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.primitives import jit

# Tiles by bytes of an element, and whether K or V is above 128: the largest that fit every GPU without many spills.
TILES = {
    (2, False): {"BT": 128, "BS": 64, "NUM_STAGES": 3, "num_warps": 8},
    (2, True): {"BT": 64, "BS": 32, "NUM_STAGES": 2, "num_warps": 4},
    (4, False): {"BT": 32, "BS": 32, "NUM_STAGES": 1, "num_warps": 8},
    (4, True): {"BT": 32, "BS": 16, "NUM_STAGES": 1, "num_warps": 8},
}

LOG2_E: Any = tl.constexpr(1.4426950408889634)


def tiles(element_size: int, K: int, V: int) -> dict[str, Any]:
    return TILES[element_size, max(K, V) > 128]


def left_product(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, starts: Tensor | None, reverse: bool
) -> Tensor:
    (B, T, H, K), V = q.shape, v.shape[3]
    o = torch.empty_like(v)
    BK, BV = (max(16, triton.next_power_of_2(size)) for size in (K, V))
    constants = tiles(q.element_size(), K, V) | {"K": K, "V": V, "BK": BK, "BV": BV, "REVERSE": reverse}
    grid = triton.cdiv(T, constants["BT"]), B * H
    if o.numel():
        with torch.accelerator.device_index(q.device.index):
            left_product_kernel[grid](q=q, k=k, v=v, o=o, log_decay=log_decay, starts=starts, T=T, H=H, **constants)
    return o


@jit(do_not_specialize=["T", "H"])
def left_product_kernel(
    q,
    k,
    v,
    o,
    log_decay,
    starts,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """`o_i = Σ_j λ^|i-j| (q_i · k_j) v_j` over j <= i, in reverse over j >= i, for BT queries of one head.

    Pairs are of one sequence. `starts` are the first tokens of all tokens' sequences, in the direction of the sum.
    """
    # Longest loops first; neighbouring programs share a head, whose keys and values they read from L2.
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b, i_h = tl.program_id(1) // H, tl.program_id(1) % H
    stride_k, stride_v = (H * K).to(tl.int64), (H * V).to(tl.int64)
    start = i_b.to(tl.int64) * T * H + i_h
    if REVERSE:
        start += (T - 1).to(tl.int64) * H
        stride_k, stride_v = -stride_k, -stride_v

    log2_decay = 0.0
    if log_decay is not None:
        log2_decay = tl.maximum(tl.load(log_decay + i_h), -1e30) * LOG2_E  # finite, because -inf times 0 is NaN
    lo, hi = i_t * BT, tl.minimum((i_t + 1) * BT, T)
    o_i, o_j, o_k, o_v = tl.arange(0, BT), tl.arange(0, BS), tl.arange(0, BK), tl.arange(0, BV)
    m_i = (o_i < T - lo)[:, None]
    b_q = _load_tokens(q + start * K + lo * stride_k, o_i, o_k, stride_k, m_i, K, BK)  # [BT, BK]
    b_o = tl.zeros([BT, BV], tl.float32)
    begin = 0
    if starts is not None:
        b_start = tl.load(starts + lo + o_i, mask=o_i < T - lo, other=0)[:, None]
        begin = lo - tl.cdiv(lo - tl.load(starts + lo), BS) * BS
    p_k, p_v = k + start * K + begin * stride_k, v + start * V + begin * stride_v

    # λ^(i-j) = λ^(i-lo) λ^(lo-j), no exponent above 0: a factor per key here, per query after the loop.
    for j in tl.range(begin, lo, BS, num_stages=NUM_STAGES):
        b_k = _load_tokens(p_k, o_j, o_k, stride_k, None, K, BK)  # [BS, BK]
        b_v = _load_tokens(p_v, o_j, o_v, stride_v, None, V, BV)  # [BS, BV]
        b_A = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BT, BS]
        b_A *= tl.exp2(log2_decay * (lo - j - o_j))[None, :]
        if starts is not None:
            b_A = tl.where((j + o_j)[None, :] >= b_start, b_A, 0.0)
        b_o = tl.dot(b_A.to(b_v.dtype), b_v, b_o, input_precision="ieee")
        p_k += BS * stride_k
        p_v += BS * stride_v
    b_o *= tl.exp2(log2_decay * o_i)[:, None]

    for j in tl.range(lo, hi, BS, num_stages=1):
        m_j = (o_j < T - j)[:, None]
        b_k = _load_tokens(p_k, o_j, o_k, stride_k, m_j, K, BK)
        b_v = _load_tokens(p_v, o_j, o_v, stride_v, m_j, V, BV)
        distance = o_i[:, None] - (j - lo + o_j)[None, :]
        is_pair = distance >= 0
        if starts is not None:
            is_pair &= (j + o_j)[None, :] >= b_start
        b_decay = tl.where(is_pair, tl.exp2(log2_decay * tl.maximum(distance, 0)), 0.0)
        b_A = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * b_decay
        b_o = tl.dot(b_A.to(b_v.dtype), b_v, b_o, input_precision="ieee")
        p_k += BS * stride_k
        p_v += BS * stride_v

    if V != BV:
        m_i &= (o_v < V)[None, :]
    p_o = o + start * V + lo * stride_v
    tl.store(p_o + _offsets(o_i, o_v, stride_v), b_o.to(o.dtype.element_ty), mask=m_i)


@jit
def _offsets(o_t, o_d, stride):
    """Offsets in a block from its first token; they fit 32 bits."""
    return o_t[:, None] * stride.to(tl.int32) + o_d[None, :]


@jit
def _load_tokens(p, o_t, o_d, stride, m, D: tl.constexpr, BD: tl.constexpr):
    """Load a block of tokens, with zeros for masked tokens and columns past the end."""
    if D != BD:
        m_d = (o_d < D)[None, :]
        m = m_d if m is None else m & m_d
    p += _offsets(o_t, o_d, stride)
    return tl.load(p) if m is None else tl.load(p, mask=m, other=0.0)
