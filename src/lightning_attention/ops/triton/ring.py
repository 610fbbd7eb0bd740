"""Attention from and to decoding states, in Triton: steps, prefill in any pieces, and drafts, with the bits of a scan.

A program takes one head of a sequence. Its chunks begin where those of a scan from the first token of the sequence
would, so the first chunk holds the tokens of the ring. Names as in kernels.py.
"""

import triton.language as tl

from ..gpu.primitives import decay_over, jit, load_log_decay, load_slot
from .parts import add_chunk, attend_chunk, load_state, store_state


@jit(do_not_specialize=["scale", "T", "H"])
def ring_kernel(
    q,
    k,
    v,
    o,
    log_decay,
    state,
    keys,
    values,
    count,
    state_indices,
    has_initial_state,
    cu_seqlens,
    scale,
    T,
    H,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_state,
    stride_keys,
    stride_values,
    stride_count,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BQ: tl.constexpr,
    UPDATE: tl.constexpr,
    SCALE_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`o = scale (λ^(i+1) q S + ((q kᵀ) ⊙ λ^(i-j)) v)` for the tokens of one head, after those of its ring.

    With UPDATE, complete chunks are added to the state, and the tokens after them replace the ring.
    """
    i = tl.program_id(0)
    i_h, i_b = (i % H).to(tl.int64), (i // H).to(tl.int64)
    i_slot = load_slot(state_indices, i_b)
    if cu_seqlens is None:
        start, end = 0, T
        q += i_b * stride_qb
        k += i_b * stride_kb
        v += i_b * stride_vb
        o += i_b * T * H * V
    else:
        start, end = tl.load(cu_seqlens + i_b).to(tl.int32), tl.load(cu_seqlens + i_b + 1).to(tl.int32)
    q += i_h * stride_qh
    k += i_h * stride_kh
    v += i_h * stride_vh
    o += i_h * V
    stride_ot = H * V
    dtype: tl.constexpr = q.dtype.element_ty
    o_c, o_k, o_r = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BQ)
    m_k = (o_k < K)[None, :]

    if i_slot < 0:
        for t in range(start, end):
            for i_v in tl.static_range((V + BV - 1) // BV):
                o_v = i_v * BV + tl.arange(0, BV)
                tl.store(o + t.to(tl.int64) * stride_ot + o_v, tl.zeros([BV], dtype), mask=o_v < V)
    else:
        log_decay_h = load_log_decay(log_decay, i_h)
        p_S = state + i_slot * stride_state + i_h * (K * V)
        p_keys = keys + i_slot * stride_keys + i_h * (C * K)
        p_values = values + i_slot * stride_values + i_h * (C * V)
        p_count = count + i_slot * stride_count + i_h
        n, exists = tl.load(p_count), True
        if has_initial_state is not None:
            exists = tl.load(has_initial_state + i_b) != 0
            n = tl.where(exists, n, 0)
        begin = start - n
        num_full = (end - begin) // C
        for i_v in tl.static_range((V + BV - 1) // BV):
            o_v = i_v * BV + tl.arange(0, BV)
            m_v = (o_v < V)[None, :]
            b_S = load_state(p_S, o_k, o_v, exists, K, V, False).to(tl.float32)
            for t in range(begin, end, C):
                o_t = t + o_c
                m_old, m_new = (o_t < start)[:, None], ((o_t >= start) & (o_t < end))[:, None]
                o_t64 = o_t.to(tl.int64)[:, None]
                b_k = tl.load(k + o_t64 * stride_kt + o_k[None, :], mask=m_new & m_k, other=0.0)
                b_v = tl.load(v + o_t64 * stride_vt + o_v[None, :], mask=m_new & m_v, other=0.0)
                b_k_old = tl.load(p_keys + o_c[:, None] * K + o_k[None, :], mask=m_old & m_k, other=0.0)
                b_v_old = tl.load(p_values + o_c[:, None] * V + o_v[None, :], mask=m_old & m_v, other=0.0)
                b_k, b_v = tl.where(m_old, b_k_old, b_k), tl.where(m_old, b_v_old, b_v)
                o_i = (t if BQ == C else start) + o_r
                m_q = ((o_i >= start) & (o_i >= t) & (o_i < t + C) & (o_i < end))[:, None]
                b_q = tl.load(q + o_i.to(tl.int64)[:, None] * stride_qt + o_k[None, :], mask=m_q & m_k, other=0.0)
                distance = (o_i - t)[None, :] - o_c[:, None]
                b_inside = tl.where(distance >= 0, decay_over(log_decay_h, distance) * scale, 0.0)
                b_read = decay_over(log_decay_h, o_i - t + 1)
                b_o = attend_chunk(b_S, b_q, b_k, b_v, b_inside, b_read, scale, PRECISION)
                p_o = o + o_i.to(tl.int64)[:, None] * stride_ot + o_v[None, :]
                tl.store(p_o, tl.trans(b_o).to(dtype), mask=m_q & m_v)
                if t + C <= end:
                    b_S = add_chunk(b_S, b_k, b_v, log_decay_h, C, o_c, False, PRECISION, SCALE_KEYS)
            if UPDATE:
                if (num_full > 0) | (not exists):
                    store_state(p_S, b_S.to(state.dtype.element_ty), o_k, o_v, True, K, V, False)
        if UPDATE:
            tl.debug_barrier()  # the ring has been read
            o_t = begin + num_full * C + o_c
            m_new = ((o_t >= start) & (o_t < end))[:, None]
            b_k = tl.load(k + o_t.to(tl.int64)[:, None] * stride_kt + o_k[None, :], mask=m_new & m_k, other=0.0)
            tl.store(p_keys + o_c[:, None] * K + o_k[None, :], b_k, mask=m_new & m_k)
            for i_v in tl.static_range((V + BV - 1) // BV):
                o_v = i_v * BV + tl.arange(0, BV)
                m_v = m_new & (o_v < V)[None, :]
                b_v = tl.load(v + o_t.to(tl.int64)[:, None] * stride_vt + o_v[None, :], mask=m_v, other=0.0)
                tl.store(p_values + o_c[:, None] * V + o_v[None, :], b_v, mask=m_v)
            tl.store(p_count, end - begin - num_full * C)
