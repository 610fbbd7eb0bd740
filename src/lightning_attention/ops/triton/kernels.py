"""The kernels of sequences, in Triton: one scan for outputs and all gradients, and states between their pieces.

Every scan keeps the transposed state `Sᵀ` `[BV, BK]` in registers, where it is the left operand of `Sᵀ Qᵀ` without a
trip through shared memory. Chunks are cut off where their sequence ends: nothing outside it is read.

Names: `i_` index, `o_` offsets, `p_` pointer to the current chunk, `b_` block, `m_` mask. B rows, T tokens, H heads,
N sequences, K and V head sizes, C tokens in a chunk, BK and BV tile sizes; BK covers K.
"""

from typing import Any

import triton
import triton.language as tl
from triton.language.extra import cuda

# To a type checker, a kernel that calls another raises.
jit: Any = triton.jit

# -log of the weight with which a token is left out of the state that a segment starts from. In 16 bits it is 2^-28, of
# which float32, where states are summed, rounds off 16 times as much, and results 100,000 times; in float32 it is 0.
FORGOTTEN: Any = tl.constexpr(19.4)
FORGOTTEN_IN_FLOAT32: Any = tl.constexpr(104.0)


@jit(do_not_specialize=["scale", "T", "H", "N", "M", "segment_length", "interval", "summed"])
def scan_kernel(
    q,
    k,
    v,
    o,
    log_decay,
    initial_state,
    interval_states,
    final_state,
    states,
    state_positions,
    cu_seqlens,
    scale,
    T,
    H,
    N,
    M,
    segment_length,
    interval,
    summed,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    TRANSPOSED_STATES: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """`o = scale (λ^(i+1) q S + ((q kᵀ) ⊙ λ^(i-j)) v)` for one segment of one row and head, and BV of the columns.

    It starts from what the intervals among the last `summed` tokens add to the state. In reverse, time runs backwards
    and the state decays after it is read rather than before. A segment may hold any number of packed sequences, and
    parts of them. Forwards, the states after `state_positions` tokens are kept too.
    """
    num_segments = tl.maximum(1, tl.cdiv(T, segment_length))
    i_v, i_h, i_s, i_b = program_ids(H, num_segments, V, BV)
    q += i_b * stride_qb + i_h * stride_qh
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    o += (i_b * T * H + i_h) * V
    stride_ot = H * V
    if REVERSE:
        q, stride_qt = _backwards(q, stride_qt, T)
        k, stride_kt = _backwards(k, stride_kt, T)
        v, stride_vt = _backwards(v, stride_vt, T)
        o, stride_ot = _backwards(o, stride_ot, T)

    dtype: tl.constexpr = q.dtype.element_ty
    rate = load_rate(log_decay, i_h)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    distance = o_c[None, :] - o_c[:, None]  # from key j, in rows, to query i, in columns
    b_inside = tl.where(distance >= 0, decay_over(rate, distance) * scale, 0.0)  # [C, C]
    b_read = decay_over(rate, o_c + 1 - REVERSE)
    state_scale = 1.0 / scale if REVERSE else 1.0

    first = i_s * segment_length
    last = tl.minimum(first + segment_length, T)
    if cu_seqlens is None:
        n_first, n_last = i_b.to(tl.int32), i_b.to(tl.int32) + 1
    else:
        n_first, n_last = _sequences_in(cu_seqlens, first, last, N, T, REVERSE)
    for n in range(n_first, n_last):
        start, end, i_n = _sequence(cu_seqlens, n, N, T, REVERSE)
        lo, hi = tl.maximum(start, first), tl.minimum(end, last)

        b_S = tl.zeros([BV, BK], tl.float32)
        if interval_states is not None:
            num_intervals = (num_segments - 1) * (segment_length // interval)
            reach = tl.minimum(reach_of(rate, T, dtype == tl.float32), summed)
            for i in range(tl.maximum(start, first - reach) // interval, first // interval):
                p_S = interval_states + ((i_b * num_intervals + i) * H + i_h) * (K * V)
                b_S = b_S * decay_over(rate, interval) + _load_state(p_S, o_k, o_v, K, V, TRANSPOSED_STATES)
        if initial_state is not None:
            p_S = initial_state + (i_n * H + i_h) * (K * V)
            b_S += _load_state(p_S, o_k, o_v, K, V, TRANSPOSED_STATES) * (decay_over(rate, lo - start) * state_scale)

        # A single piece, unless states are to be kept on the way.
        m_first, m_last = 0, 0
        if states is not None:
            m_first, m_last = _positions_in(state_positions, lo, hi, M)
        for m in range(m_first, m_last + 1):
            stop = hi
            if states is not None:
                stop = _stop(state_positions, m, m_last, lo, hi)
            p_q = q + lo.to(tl.int64) * stride_qt
            p_k = k + lo.to(tl.int64) * stride_kt
            p_v = v + lo.to(tl.int64) * stride_vt
            p_o = o + lo.to(tl.int64) * stride_ot
            for t in tl.range(lo, stop, C, num_stages=NUM_STAGES):
                m_c = o_c < stop - t
                b_q = _load_rows(p_q, stride_qt, o_c, o_k, m_c, K, BK)  # [C, BK]
                b_k = _load_rows(p_k, stride_kt, o_c, o_k, m_c, K, BK)  # [C, BK]
                b_v = _load_rows(p_v, stride_vt, o_c, o_v, m_c, V, BV)  # [C, BV]

                b_A = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * b_inside  # [C, C]
                if dtype == tl.float16:  # whose range a long sum may leave, where its output does not
                    b_o = tl.dot((b_S * scale).to(dtype), tl.trans(b_q)) * b_read[None, :]  # [BV, C]
                else:
                    b_o = tl.dot(b_S.to(dtype), tl.trans(b_q), input_precision=PRECISION) * (b_read * scale)[None, :]
                b_o = tl.dot(tl.trans(b_v), b_A.to(dtype), b_o, input_precision=PRECISION)
                b_S = _add_chunk(b_S, b_k, b_v, rate, tl.minimum(C, stop - t), o_c, REVERSE, PRECISION)

                m_o = m_c[:, None] & (o_v < V)[None, :]
                tl.store(p_o + o_c[:, None] * stride_ot + o_v[None, :], tl.trans(b_o).to(dtype), mask=m_o)
                p_q += C * stride_qt
                p_k += C * stride_kt
                p_v += C * stride_vt
                p_o += C * stride_ot
            lo = stop
            if states is not None:
                p_S = states + ((i_b * M + m) * H + i_h) * (K * V)
                _store_state(p_S, b_S, o_k, o_v, m < m_last, K, V, TRANSPOSED_STATES)

        if final_state is not None:
            p_S = final_state + (i_n * H + i_h) * (K * V)
            _store_state(p_S, b_S / state_scale, o_k, o_v, hi == end, K, V, TRANSPOSED_STATES)


@jit(do_not_specialize=["T", "H", "N", "segment_length", "interval", "num_intervals"])
def interval_state_kernel(
    k,
    v,
    log_decay,
    interval_states,
    factors,
    cu_seqlens,
    T,
    H,
    N,
    segment_length,
    interval,
    num_intervals,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """What an interval adds to the state of the sequence that goes on after it: `Σ_j λ^(end-1-j) k_j v_jᵀ`.

    Of the state before the interval a factor is left, 0 where that sequence begins later. Only tokens that are not
    forgotten when the next segment starts are read: few, where the head decays.
    """
    i_v, i_h, i_i, i_b = program_ids(H, num_intervals, V, BV)
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    if REVERSE:
        k, stride_kt = _backwards(k, stride_kt, T)
        v, stride_vt = _backwards(v, stride_vt, T)

    rate = load_rate(log_decay, i_h)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    is_float32: tl.constexpr = k.dtype.element_ty == tl.float32
    lo, hi, factor = interval_bounds(i_i, rate, cu_seqlens, N, T, segment_length, interval, REVERSE, is_float32)

    b_S = tl.zeros([BV, BK], tl.float32)
    p_k = k + lo.to(tl.int64) * stride_kt
    p_v = v + lo.to(tl.int64) * stride_vt
    for t in tl.range(lo, hi, C, num_stages=NUM_STAGES):
        m_c = o_c < hi - t
        b_k = _load_rows(p_k, stride_kt, o_c, o_k, m_c, K, BK)  # [C, BK]
        b_v = _load_rows(p_v, stride_vt, o_c, o_v, m_c, V, BV)  # [C, BV]
        b_S = _add_chunk(b_S, b_k, b_v, rate, tl.minimum(C, hi - t), o_c, REVERSE, PRECISION)
        p_k += C * stride_kt
        p_v += C * stride_vt
    i_state = (i_b * num_intervals + i_i) * H + i_h
    tl.store(factors + i_state, factor)  # every tile of V the same
    _store_state(interval_states + i_state * (K * V), b_S, o_k, o_v, True, K, V, False)


@jit(do_not_specialize=["H", "num_intervals", "interval"])
def accumulate_kernel(
    interval_states,
    factors,
    log_decay,
    H,
    num_intervals,
    interval,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    LET_NEXT_BEGIN: tl.constexpr,
    BESIDE: tl.constexpr,
):
    """From what every interval of a row adds to the state, in its place, the state after it.

    Where a head remembers no more than an interval, that is the same; only the last one may be shorter. On Hopper GPUs
    it may let the next kernel begin, and run BESIDE the kernel launched before it, and end after it.
    """
    if LET_NEXT_BEGIN:
        cuda.gdc_launch_dependents()
    i_x, i_h, _, i_b = program_ids(H, 1, SIZE, BLOCK)
    begin = 0
    if reach_of(load_rate(log_decay, i_h), interval + 1, IN_FLOAT32) <= interval:
        begin = tl.maximum(num_intervals - 2, 0)
    o_x = i_x * BLOCK + tl.arange(0, BLOCK)
    p_S = interval_states + ((i_b * num_intervals + begin) * H + i_h) * SIZE + o_x
    p_factor = factors + i_b * num_intervals * H + i_h
    b_S = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(begin, num_intervals, num_stages=NUM_STAGES):
        factor = tl.load(p_factor + i * H)
        b_added = tl.load(p_S, mask=o_x < SIZE)
        b_S = b_added + tl.where(factor > 0, factor * b_S, 0.0)
        tl.store(p_S, b_S, mask=o_x < SIZE)
        p_S += H.to(tl.int64) * SIZE
    if BESIDE:
        cuda.gdc_wait()


@jit(do_not_specialize=["T", "H", "piece_length"])
def read_kernel(
    q,
    o,
    log_decay,
    state,
    T,
    H,
    piece_length,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_ob,
    stride_ot,
    stride_oh,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """`o = λ^(i+1) q S`, added to what is there or in its place, for one piece of one row and head, and BV columns.

    In reverse it is `λ^(T-1-i)`. Tokens whose weight is 0 in float32 are not read, nor added to.
    """
    i_v, i_h, i_p, i_b = program_ids(H, tl.cdiv(T, piece_length), V, BV)
    q += i_b * stride_qb + i_h * stride_qh
    o += i_b * stride_ob + i_h * stride_oh

    dtype: tl.constexpr = q.dtype.element_ty
    rate = load_rate(log_decay, i_h)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    b_S = _load_state(state + (i_b * H + i_h) * (K * V), o_k, o_v, K, V, False).to(dtype)  # [BV, BK]
    lo = i_p * piece_length
    hi = tl.minimum(lo + piece_length, T)
    p_q = q + lo.to(tl.int64) * stride_qt
    p_o = o + lo.to(tl.int64) * stride_ot
    for t in tl.range(lo, hi, C, num_stages=NUM_STAGES):
        m_c = o_c < hi - t
        b_read = decay_over(rate, T - 1 - t - o_c if REVERSE else t + 1 + o_c)
        m_q = m_c & (b_read > 0.0)
        b_q = _load_rows(p_q, stride_qt, o_c, o_k, m_q, K, BK)  # [C, BK]
        b_o = tl.trans(tl.dot(b_S, tl.trans(b_q), input_precision=PRECISION) * b_read[None, :])  # [C, BV]
        if ADD:
            m_c = m_q
            b_o += _load_rows(p_o, stride_ot, o_c, o_v, m_c, V, BV)
        tl.store(p_o + o_c[:, None] * stride_ot + o_v[None, :], b_o.to(dtype), mask=m_c[:, None] & (o_v < V)[None, :])
        p_q += C * stride_qt
        p_o += C * stride_ot


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
def _backwards(p, stride, T):
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
def _add_chunk(b_S, b_k, b_v, rate, m, o_c, REVERSE: tl.constexpr, PRECISION: tl.constexpr):
    """`λ^m Sᵀ + Σ_j λ^(m-1-j) v_j k_jᵀ` over the m rows of a chunk."""
    b_write = decay_over(rate, m - 1 - o_c + REVERSE)
    b_v = (tl.trans(b_v) * b_write[None, :]).to(b_k.dtype)
    return tl.dot(b_v, b_k, b_S * decay_over(rate, m), input_precision=PRECISION)


@jit
def _load_rows(p, stride, o_c, o_d, m_c, D: tl.constexpr, BD: tl.constexpr):
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
def _load_state(p, o_k, o_v, K: tl.constexpr, V: tl.constexpr, TRANSPOSED: tl.constexpr):
    o_S, m_S = _state_offsets(o_k, o_v, K, V, TRANSPOSED)
    return tl.load(p + o_S, mask=m_S, other=0.0)


@jit
def _store_state(p, b_S, o_k, o_v, condition, K: tl.constexpr, V: tl.constexpr, TRANSPOSED: tl.constexpr):
    o_S, m_S = _state_offsets(o_k, o_v, K, V, TRANSPOSED)
    tl.store(p + o_S, b_S, mask=m_S & condition)


@jit
def _start(cu_seqlens, n, N, T, REVERSE: tl.constexpr):
    """Where sequence n starts, counted in the direction of the scan; for n = N, where the last one ends."""
    return T - tl.load(cu_seqlens + N - n).to(tl.int32) if REVERSE else tl.load(cu_seqlens + n).to(tl.int32)


@jit
def _sequence(cu_seqlens, n, N, T, REVERSE: tl.constexpr):
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
def _positions_in(state_positions, lo, hi, M):
    """Which of them lie after `lo` and at most at `hi`: they end pieces of it, as sequences end in a row."""
    p_ends = state_positions - 1
    return _num_ended(p_ends, lo, M, 0, False), _num_ended(p_ends, hi, M, 0, False)


@jit
def _stop(state_positions, m, m_last, lo, hi):
    """Where piece m ends; the last one, which no position ends, goes on to `hi`."""
    stop = tl.load(state_positions + m, mask=m < m_last, other=hi).to(tl.int32)
    return tl.minimum(tl.maximum(stop, lo), hi)


@jit
def _sequences_in(cu_seqlens, first, last, N, T, REVERSE: tl.constexpr):
    """Those with tokens in a segment, perhaps one more. An empty one belongs to the segment that ends with it."""
    n_first = 0
    if first > 0:
        n_first = _num_ended(cu_seqlens, first, N, T, REVERSE)
    return n_first, tl.minimum(_num_ended(cu_seqlens, last, N, T, REVERSE) + 1, N)
