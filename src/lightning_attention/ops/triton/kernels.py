"""Kernels of sequences, in Triton: a scan for outputs and all gradients, and the states that segments start from.

Every scan keeps the transposed state `Sᵀ` `[BV, BK]` in registers, where it is the left operand of `Sᵀ Qᵀ` without a
trip through shared memory. Chunks end where their sequence ends: nothing outside it is read.

Names: `i_` index, `o_` offsets, `p_` pointer to the current chunk, `b_` block, `m_` mask. B batch rows, T tokens, H
heads, N sequences, K and V head sizes, C tokens of a chunk, BK and BV tile sizes; BK covers K.
"""

import triton.language as tl

from ..gpu.primitives import (
    decay_over,
    interval_bounds,
    jit,
    load_log_decay,
    load_slot,
    memory_length,
    program_ids,
    sequence_bounds,
    sequences_in,
)
from .parts import (
    add_chunk,
    attend_chunk,
    backwards,
    load_state,
    load_tokens,
    next_stop,
    positions_in,
    scale_to_float16,
    store_state,
)


@jit(do_not_specialize=["scale", "T", "H", "N", "M", "segment_length", "interval", "max_reach"])
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
    final_indices,
    saved_indices,
    scale,
    T,
    H,
    N,
    M,
    segment_length,
    interval,
    max_reach,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_slot,
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
    """`o = scale (λ^(i+1) q S + ((q kᵀ) ⊙ λ^(i-j)) v)` for one segment of one head, and BV columns.

    The scan starts from the sum of the interval states among the last `max_reach` tokens. In reverse, time runs
    backwards and the state decays after it is read, not before. A segment may hold any number of packed sequences, and
    parts of them. Forwards, the states after `state_positions` tokens are stored too. With `stride_slot`, states are
    stored in slots of a pool.
    """
    num_segments = tl.maximum(1, tl.cdiv(T, segment_length))
    i_v, i_h, i_s, i_b = program_ids(H, num_segments, V, BV)
    q += i_b * stride_qb + i_h * stride_qh
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    o += (i_b * T * H + i_h) * V
    stride_ot = H * V
    if REVERSE:
        q, stride_qt = backwards(q, stride_qt, T)
        k, stride_kt = backwards(k, stride_kt, T)
        v, stride_vt = backwards(v, stride_vt, T)
        o, stride_ot = backwards(o, stride_ot, T)

    dtype: tl.constexpr = q.dtype.element_ty
    log_decay_h = load_log_decay(log_decay, i_h)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    distance = o_c[None, :] - o_c[:, None]  # from key j, in rows, to query i, in columns
    b_inside = tl.where(distance >= 0, decay_over(log_decay_h, distance) * scale, 0.0)  # [C, C]
    b_read = decay_over(log_decay_h, o_c + 1 - REVERSE)
    state_scale = 1.0 / scale if REVERSE else 1.0

    first = i_s * segment_length
    last = tl.minimum(first + segment_length, T)
    if cu_seqlens is None:
        n_first, n_last = i_b.to(tl.int32), i_b.to(tl.int32) + 1
    else:
        n_first, n_last = sequences_in(cu_seqlens, first, last, N, T, REVERSE)
    for n in range(n_first, n_last):
        start, end, i_n = sequence_bounds(cu_seqlens, n, N, T, REVERSE)
        lo, hi = tl.maximum(start, first), tl.minimum(end, last)

        b_S = tl.zeros([BV, BK], tl.float32)
        if interval_states is not None:
            num_intervals = (num_segments - 1) * (segment_length // interval)
            remembered = tl.minimum(memory_length(log_decay_h, T, dtype == tl.float32), max_reach)
            for i in range(tl.maximum(start, first - remembered) // interval, first // interval):
                p_S = interval_states + ((i_b * num_intervals + i) * H + i_h) * (K * V)
                b_S = b_S * decay_over(log_decay_h, interval) + load_state(p_S, o_k, o_v, True, K, V, TRANSPOSED_STATES)
        if initial_state is not None:
            p_S = initial_state + (i_n * H + i_h) * (K * V)
            b_S += load_state(p_S, o_k, o_v, True, K, V, TRANSPOSED_STATES) * (
                decay_over(log_decay_h, lo - start) * state_scale
            )

        # A single part, unless states are to be stored on the way.
        m_first, m_last = 0, 0
        if states is not None:
            m_first, m_last = positions_in(state_positions, lo, hi, M)
        for m in range(m_first, m_last + 1):
            stop = hi
            if states is not None:
                stop = next_stop(state_positions, m, m_last, lo, hi)
            p_q = q + lo.to(tl.int64) * stride_qt
            p_k = k + lo.to(tl.int64) * stride_kt
            p_v = v + lo.to(tl.int64) * stride_vt
            p_o = o + lo.to(tl.int64) * stride_ot
            for t in tl.range(lo, stop, C, num_stages=NUM_STAGES):
                m_c = o_c < stop - t
                b_q = load_tokens(p_q, stride_qt, o_c, o_k, m_c, K, BK)  # [C, BK]
                b_k = load_tokens(p_k, stride_kt, o_c, o_k, m_c, K, BK)  # [C, BK]
                b_v = load_tokens(p_v, stride_vt, o_c, o_v, m_c, V, BV)  # [C, BV]

                b_o = attend_chunk(b_S, b_q, b_k, b_v, b_inside, b_read, scale, PRECISION)  # [BV, C]
                b_S = add_chunk(b_S, b_k, b_v, log_decay_h, tl.minimum(C, stop - t), o_c, REVERSE, PRECISION)

                m_o = m_c[:, None] & (o_v < V)[None, :]
                tl.store(p_o + o_c[:, None] * stride_ot + o_v[None, :], tl.trans(b_o).to(dtype), mask=m_o)
                p_q += C * stride_qt
                p_k += C * stride_kt
                p_v += C * stride_vt
                p_o += C * stride_ot
            lo = stop
            if states is not None:
                p_saved, is_kept = states + ((i_b * M + m) * H + i_h) * (K * V), m < m_last
                if stride_slot is not None:
                    i_slot = tl.load(saved_indices + i_b * M + m, mask=is_kept, other=-1).to(tl.int64)
                    p_saved, is_kept = states + i_slot * stride_slot + i_h * (K * V), i_slot >= 0
                store_state(p_saved, b_S, o_k, o_v, is_kept, K, V, TRANSPOSED_STATES)

        if final_state is not None:
            p_final, is_last = final_state + (i_n * H + i_h) * (K * V), hi == end
            if stride_slot is not None:
                i_slot = load_slot(final_indices, i_n)
                p_final, is_last = final_state + i_slot * stride_slot + i_h * (K * V), is_last & (i_slot >= 0)
            store_state(p_final, b_S / state_scale, o_k, o_v, is_last, K, V, TRANSPOSED_STATES)


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
    """Increment by an interval of the state of the sequence that continues after it: `Σ_j λ^(end-1-j) k_j v_jᵀ`.

    The factor on the state before the interval is its decay, or 0 if that sequence begins later. Tokens that are
    negligible when the next segment starts are not read.
    """
    i_v, i_h, i_i, i_b = program_ids(H, num_intervals, V, BV)
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    if REVERSE:
        k, stride_kt = backwards(k, stride_kt, T)
        v, stride_vt = backwards(v, stride_vt, T)

    log_decay_h = load_log_decay(log_decay, i_h)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    is_float32: tl.constexpr = k.dtype.element_ty == tl.float32
    lo, hi, factor = interval_bounds(i_i, log_decay_h, cu_seqlens, N, T, segment_length, interval, REVERSE, is_float32)

    b_S = tl.zeros([BV, BK], tl.float32)
    p_k = k + lo.to(tl.int64) * stride_kt
    p_v = v + lo.to(tl.int64) * stride_vt
    for t in tl.range(lo, hi, C, num_stages=NUM_STAGES):
        m_c = o_c < hi - t
        b_k = load_tokens(p_k, stride_kt, o_c, o_k, m_c, K, BK)  # [C, BK]
        b_v = load_tokens(p_v, stride_vt, o_c, o_v, m_c, V, BV)  # [C, BV]
        b_S = add_chunk(b_S, b_k, b_v, log_decay_h, tl.minimum(C, hi - t), o_c, REVERSE, PRECISION)
        p_k += C * stride_kt
        p_v += C * stride_vt
    i_state = (i_b * num_intervals + i_i) * H + i_h
    tl.store(factors + i_state, factor)  # all tiles of V write the same value
    store_state(interval_states + i_state * (K * V), b_S, o_k, o_v, True, K, V, False)


@jit(do_not_specialize=["T", "H", "tokens_per_program"])
def read_kernel(
    q,
    o,
    log_decay,
    state,
    T,
    H,
    tokens_per_program,
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
    """`o = λ^(i+1) q S`, or with ADD `o += ...`, for `tokens_per_program` tokens of one head, and BV columns.

    In reverse the weight is `λ^(T-1-i)`. Tokens whose weight is 0 in float32 are not read, and with ADD not written.
    """
    i_v, i_h, i_p, i_b = program_ids(H, tl.cdiv(T, tokens_per_program), V, BV)
    q += i_b * stride_qb + i_h * stride_qh
    o += i_b * stride_ob + i_h * stride_oh

    dtype: tl.constexpr = q.dtype.element_ty
    log_decay_h = load_log_decay(log_decay, i_h)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    b_S = load_state(state + (i_b * H + i_h) * (K * V), o_k, o_v, True, K, V, False)  # [BV, BK]
    if dtype == tl.float16:
        b_operand, b_unit = scale_to_float16(b_S, 1)
    else:
        b_operand = b_S.to(dtype)
    lo = i_p * tokens_per_program
    hi = tl.minimum(lo + tokens_per_program, T)
    p_q = q + lo.to(tl.int64) * stride_qt
    p_o = o + lo.to(tl.int64) * stride_ot
    for t in tl.range(lo, hi, C, num_stages=NUM_STAGES):
        m_c = o_c < hi - t
        b_read = decay_over(log_decay_h, T - 1 - t - o_c if REVERSE else t + 1 + o_c)
        m_q = m_c & (b_read > 0.0)
        b_q = load_tokens(p_q, stride_qt, o_c, o_k, m_q, K, BK)  # [C, BK]
        b_o = tl.dot(b_operand, tl.trans(b_q), input_precision=PRECISION) * b_read[None, :]  # [BV, C]
        if dtype == tl.float16:
            b_o *= b_unit
        b_o = tl.trans(b_o)
        if ADD:
            m_c = m_q
            b_o += load_tokens(p_o, stride_ot, o_c, o_v, m_c, V, BV)
        tl.store(p_o + o_c[:, None] * stride_ot + o_v[None, :], b_o.to(dtype), mask=m_c[:, None] & (o_v < V)[None, :])
        p_q += C * stride_qt
        p_o += C * stride_ot
