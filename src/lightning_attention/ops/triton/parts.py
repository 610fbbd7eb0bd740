"""Device functions of the Triton kernels: chunks and states. Names as in kernels.py."""

import triton.language as tl

from ..gpu.primitives import decay_over, jit, num_sequences_ended


@jit
def backwards(p, stride, T):
    """Pointer and stride that visit the same tokens from the last to the first."""
    return p + (T - 1).to(tl.int64) * stride, -stride


@jit
def attend_chunk(b_S, b_q, b_k, b_v, b_inside, b_read, scale, PRECISION: tl.constexpr):
    """Outputs `[BV, queries]` of a chunk: what its queries read of the state before it, and of its keys and values.

    `b_inside` has a row for each key and a column for each query, the decay between them times scale; `b_read` has the
    decay from the state to each query.
    """
    dtype: tl.constexpr = b_q.dtype
    b_A = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * b_inside
    if dtype == tl.float16:  # states and scores may leave its range where outputs do not
        b_scaled, b_unit = scale_to_float16(b_S, 1)
        b_o = tl.dot(b_scaled, tl.trans(b_q)) * b_read[None, :] * (b_unit * scale)
        b_scaled, b_unit = scale_to_float16(b_A, 0)
        # An explicit FMA, or the compiler would choose which of two products it rounds.
        b_o = tl.fma(tl.dot(tl.trans(b_v), b_scaled), b_unit, b_o)
    else:
        b_o = tl.dot(b_S.to(dtype), tl.trans(b_q), input_precision=PRECISION) * (b_read * scale)[None, :]
        b_o = tl.dot(tl.trans(b_v), b_A.to(dtype), b_o, input_precision=PRECISION)
    return b_o


@jit
def add_chunk(
    b_S,
    b_k,
    b_v,
    log_decay,
    m,
    o_c,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_KEYS: tl.constexpr = tl.constexpr(False),  # noqa: B008 (a constant)
):
    """`λ^m Sᵀ + Σ_j λ^(m-1-j) v_j k_jᵀ` over the m tokens of a chunk; values are scaled, or as on Hopper keys."""
    b_write = decay_over(log_decay, m - 1 - o_c + REVERSE)
    if SCALE_KEYS:
        b_vT, b_k = tl.trans(b_v), (b_k.to(tl.float32) * b_write[:, None]).to(b_k.dtype)
    else:
        b_vT = (tl.trans(b_v) * b_write[None, :]).to(b_k.dtype)
    return tl.dot(b_vT, b_k, b_S * decay_over(log_decay, m), input_precision=PRECISION)


@jit
def scale_to_float16(b_x, AXIS: tl.constexpr):
    """Scale float32 to float16 by powers of two, one for all elements along AXIS: `b_x = b_scaled * b_unit`.

    The largest magnitude along AXIS comes to lie in [2^14, 2^15), so that no product with float16 overflows, and none
    underflows unless it is 2^-39 of the largest. AXIS is the one that the product contracts: `b_unit` multiplies the
    result. Zeros, infinities and NaN stay what they are.
    """
    b_power, b_unit = float16_scales(tl.max(b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS, keep_dims=True))
    return (b_x * b_power).to(tl.float16), b_unit


@jit
def float16_scales(b_bits):
    """Powers of two that scale float32 to float16, and back, from the bits of the largest magnitude."""
    b_exponent = tl.maximum(b_bits >> 23, 15)  # biased by 127; at least 15, for both powers to be normal numbers
    b_power = ((14 + 2 * 127 - b_exponent) << 23).to(tl.float32, bitcast=True)
    b_unit = ((b_exponent - 14) << 23).to(tl.float32, bitcast=True)
    return b_power, b_unit


@jit
def load_tokens(p, stride, o_c, o_d, m_c, D: tl.constexpr, BD: tl.constexpr):
    """A block of tokens, with zeros where a token or a column is past the end."""
    m = m_c[:, None]
    if D % BD != 0:
        m = m & (o_d < D)[None, :]
    return tl.load(p + o_c[:, None] * stride + o_d[None, :], mask=m, other=0.0)


@jit
def _state_offsets(o_k, o_v, K: tl.constexpr, V: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Offsets and mask of a block `[BV, BK]` in a state `[K, V]`, or `[V, K]` if TRANSPOSED."""
    o_S = o_v[:, None] * K + o_k[None, :] if TRANSPOSED else o_k[None, :] * V + o_v[:, None]
    return o_S, (o_v < V)[:, None] & (o_k < K)[None, :]


@jit
def load_state(p, o_k, o_v, condition, K: tl.constexpr, V: tl.constexpr, TRANSPOSED: tl.constexpr):
    o_S, m_S = _state_offsets(o_k, o_v, K, V, TRANSPOSED)
    return tl.load(p + o_S, mask=m_S & condition, other=0.0)


@jit
def store_state(p, b_S, o_k, o_v, condition, K: tl.constexpr, V: tl.constexpr, TRANSPOSED: tl.constexpr):
    o_S, m_S = _state_offsets(o_k, o_v, K, V, TRANSPOSED)
    tl.store(p + o_S, b_S, mask=m_S & condition)


@jit
def positions_in(state_positions, lo, hi, M):
    """Range of the positions in (lo, hi]: each ends a part of the segment, as `cu_seqlens` ends sequences."""
    p_ends = state_positions - 1
    return num_sequences_ended(p_ends, lo, M, 0, False), num_sequences_ended(p_ends, hi, M, 0, False)


@jit
def next_stop(state_positions, m, m_last, lo, hi):
    """End of part m; the last part, which no position ends, goes on to `hi`."""
    stop = tl.load(state_positions + m, mask=m < m_last, other=hi).to(tl.int32)
    return tl.minimum(tl.maximum(stop, lo), hi)
