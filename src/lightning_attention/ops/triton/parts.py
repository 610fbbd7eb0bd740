"""What the Triton kernels are made of: programs, decays, rows, states, sequences. Names as in kernels.py."""

from typing import Any

import triton
import triton.language as tl

# To a type checker, a kernel that calls another raises.
jit: Any = triton.jit

# -log of the weight with which a token is left out of the state that a segment starts from. In 16 bits it is 2^-28, of
# which float32, where states are summed, rounds off 16 times as much, and results 100,000 times; in float32 it is 0.
FORGOTTEN: Any = tl.constexpr(19.4)
FORGOTTEN_IN_FLOAT32: Any = tl.constexpr(104.0)


@jit
def program_ids(H, num_segments, V: tl.constexpr, BV: tl.constexpr):
    """Tile of V, head, segment and row of this program. The tiles of a head run side by side: they share q and k."""
    i = tl.program_id(0)
    num_tiles: tl.constexpr = (V + BV - 1) // BV
    i_v = i % num_tiles
    i = i // num_tiles
    i_h = i % H
    i = i // H
    return i_v, i_h.to(tl.int64), i % num_segments, (i // num_segments).to(tl.int64)


@jit
def backwards(p, stride, T):
    """The same rows, last one first."""
    return p + (T - 1).to(tl.int64) * stride, -stride


@jit
def load_rate(log_decay, i_h):
    """log λ of a head; finite, because -inf times 0 is NaN."""
    return 0.0 if log_decay is None else tl.maximum(tl.load(log_decay + i_h), -1e20)


@jit
def decay_over(rate, distance):
    """`λ^distance`. Negative distances stand in rows that are masked; no exponent is ever above 0.

    `tl.exp` rounds `x log2(e)` and so errs by a part in 10^6 at e^-20; here only a rest near 0 is rounded.
    """
    LOG2_E: tl.constexpr = tl.constexpr(1.44269504)
    # log(2) in two parts; the first has 9 bits, so that a whole number times it is exact.
    LOG_2: tl.constexpr = tl.constexpr(0.693359375)
    LOG_2_REST: tl.constexpr = tl.constexpr(-2.12194440e-4)
    x = tl.maximum(rate * tl.maximum(distance, 0).to(tl.float32), -104.0)  # exp(-104) is 0
    n = tl.floor(x * LOG2_E + 0.5)
    return tl.exp2(n) * tl.exp2((x - n * LOG_2 - n * LOG_2_REST) * LOG2_E)


@jit
def interval_bounds(
    i_i, rate, cu_seqlens, N, T, segment_length, interval, REVERSE: tl.constexpr, IN_FLOAT32: tl.constexpr
):
    """Which tokens of interval i the next segment needs, and what stays of the state before it until its end."""
    begin, hi = i_i * interval, tl.minimum((i_i + 1) * interval, T)
    next_begin = tl.minimum(tl.cdiv(hi, segment_length) * segment_length, T)
    lo = tl.maximum(begin, next_begin - reach_of(rate, T, IN_FLOAT32))
    factor = decay_over(rate, hi - begin)
    if cu_seqlens is not None:
        start = _start(cu_seqlens, _num_ended(cu_seqlens, hi, N, T, REVERSE), N, T, REVERSE)
        lo = tl.maximum(lo, start)
        factor = tl.where(start < begin, factor, 0.0)
    return lo, hi, factor


@jit
def reach_of(rate, T, IN_FLOAT32: tl.constexpr):
    """How many tokens back, at most T, one is not forgotten."""
    nats: tl.constexpr = FORGOTTEN_IN_FLOAT32 if IN_FLOAT32 else FORGOTTEN
    tokens = (1.0 / tl.maximum(-rate, 1e-30)) * nats + 1.0
    return tl.minimum(tokens, T.to(tl.float32)).to(tl.int32)


@jit
def add_chunk(b_S, b_k, b_v, rate, m, o_c, REVERSE: tl.constexpr, PRECISION: tl.constexpr):
    """`λ^m Sᵀ + Σ_j λ^(m-1-j) v_j k_jᵀ` over the m rows of a chunk."""
    b_write = decay_over(rate, m - 1 - o_c + REVERSE)
    b_v = (tl.trans(b_v) * b_write[None, :]).to(b_k.dtype)
    return tl.dot(b_v, b_k, b_S * decay_over(rate, m), input_precision=PRECISION)


@jit
def scale_to_float16(b_x, AXIS: tl.constexpr):
    """Scale float32 to float16 by powers of two, one for all elements along AXIS: `b_x = b_scaled * b_unit`.

    The largest magnitude along AXIS comes to lie in [2^14, 2^15), so that no product with float16 overflows, and none
    underflows unless it is 2^-39 of the largest. AXIS is the one that the product contracts: `b_unit` multiplies the
    result. Zeros, infinities and NaN stay what they are.
    """
    b_bits = tl.max(b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS, keep_dims=True)
    b_exponent = tl.maximum(b_bits >> 23, 15)  # biased by 127; at least 15, for both powers to be normal numbers
    b_power = ((14 + 2 * 127 - b_exponent) << 23).to(tl.float32, bitcast=True)
    b_unit = ((b_exponent - 14) << 23).to(tl.float32, bitcast=True)
    return (b_x * b_power).to(tl.float16), b_unit


@jit
def load_rows(p, stride, o_c, o_d, m_c, D: tl.constexpr, BD: tl.constexpr):
    """A block of rows, with zeros where a row or a column is past the end."""
    m = m_c[:, None]
    if D % BD != 0:
        m = m & (o_d < D)[None, :]
    return tl.load(p + o_c[:, None] * stride + o_d[None, :], mask=m, other=0.0)


@jit
def _state_offsets(o_k, o_v, K: tl.constexpr, V: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Of a state `[K, V]`, or `[V, K]` where it is transposed, in a block `[BV, BK]`."""
    o_S = o_v[:, None] * K + o_k[None, :] if TRANSPOSED else o_k[None, :] * V + o_v[:, None]
    return o_S, (o_v < V)[:, None] & (o_k < K)[None, :]


@jit
def load_state(p, o_k, o_v, K: tl.constexpr, V: tl.constexpr, TRANSPOSED: tl.constexpr):
    o_S, m_S = _state_offsets(o_k, o_v, K, V, TRANSPOSED)
    return tl.load(p + o_S, mask=m_S, other=0.0)


@jit
def store_state(p, b_S, o_k, o_v, condition, K: tl.constexpr, V: tl.constexpr, TRANSPOSED: tl.constexpr):
    o_S, m_S = _state_offsets(o_k, o_v, K, V, TRANSPOSED)
    tl.store(p + o_S, b_S, mask=m_S & condition)


@jit
def _start(cu_seqlens, n, N, T, REVERSE: tl.constexpr):
    """Where sequence n starts, counted in the direction of the scan; for n = N, where the last one ends."""
    return T - tl.load(cu_seqlens + N - n).to(tl.int32) if REVERSE else tl.load(cu_seqlens + n).to(tl.int32)


@jit
def sequence_of(cu_seqlens, n, N, T, REVERSE: tl.constexpr):
    """Start and end of sequence n in the direction of the scan, and the index of its states."""
    if cu_seqlens is None:
        start, end, i_n = 0, T, n
    else:
        start, end = _start(cu_seqlens, n, N, T, REVERSE), _start(cu_seqlens, n + 1, N, T, REVERSE)
        i_n = N - 1 - n if REVERSE else n
    return start, end, i_n


@jit
def _num_ended(cu_seqlens, position, N, T, REVERSE: tl.constexpr):
    """How many sequences end at a position or before it."""
    low, high = 0, N
    while low < high:
        middle = (low + high) // 2
        if _start(cu_seqlens, middle + 1, N, T, REVERSE) <= position:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def positions_in(state_positions, lo, hi, M):
    """Which of them lie after `lo` and at most at `hi`: they end pieces of it, as sequences end in a row."""
    p_ends = state_positions - 1
    return _num_ended(p_ends, lo, M, 0, False), _num_ended(p_ends, hi, M, 0, False)


@jit
def next_stop(state_positions, m, m_last, lo, hi):
    """Where piece m ends; the last one, which no position ends, goes on to `hi`."""
    stop = tl.load(state_positions + m, mask=m < m_last, other=hi).to(tl.int32)
    return tl.minimum(tl.maximum(stop, lo), hi)


@jit
def sequences_in(cu_seqlens, first, last, N, T, REVERSE: tl.constexpr):
    """Those with tokens in a segment, perhaps one more. An empty one belongs to the segment that ends with it."""
    n_first = 0
    if first > 0:
        n_first = _num_ended(cu_seqlens, first, N, T, REVERSE)
    return n_first, tl.minimum(_num_ended(cu_seqlens, last, N, T, REVERSE) + 1, N)
