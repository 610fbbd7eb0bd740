"""Attention from decoding states, in Triton: steps, prefill in any pieces and drafts, with the bits of a scan.

A program takes one head of a sequence. Its chunks begin where those of a scan from the first token of the sequence
begin, so the first chunk starts with the tokens of the ring. Names as in kernels.py; n counts the tokens of the ring.

The order of every sum is that of `kernels.scan_kernel`, or with SCALE_KEYS that of the scan for Hopper. What a tensor
core adds at once, and the number of queries in a tile, do not change a sum; tests show it.
"""

import triton.language as tl

from ..calls import Prepared
from ..gpu.plan import Operand, Planner, planned, strides
from ..gpu.primitives import decay_over, jit, load_log_decay, load_slot
from ..inputs import AppendInputs, FoldInputs, Metadata
from . import config
from .launch import Scans
from .parts import add_chunk, attend_chunk, float16_scales, load_state, scale_to_float16, store_state


def append(x: AppendInputs[Metadata], scale: float, update: bool, *, scale_keys: bool = False) -> Prepared:
    return planned(_plan_append, x, scale, update, scale_keys)


def _plan_append(
    planner: Planner, x: AppendInputs[Operand], scale: float, update: bool, scale_keys: bool
) -> tuple[Operand]:
    q, k, v = Scans.readable(planner, x.q, x.k, x.v)
    others = (x.log_decay, x.state_indices, x.has_initial_state, x.cu_seqlens, x.lengths)
    log_decay, state_indices, has_initial_state, cu_seqlens, lengths = (planner.contiguous(y) for y in others)
    (B, T, H, K), V, C = q.shape, v.shape[3], x.keys.shape[2]
    o = planner.empty(*v.shape, dtype=v.dtype)
    arguments = {"q": q, "k": k, "v": v, "o": o, "log_decay": log_decay, "state_indices": state_indices}
    arguments |= {"scale": scale, "H": H, **strides(q=q, k=k, v=v), **_slots(x), "K": K, "V": V, "C": C}
    arguments |= {"SCALE_KEYS": scale_keys, "PRECISION": planner.precision}
    if T == 1 and update and has_initial_state is None and cu_seqlens is None and lengths is None:
        tiles = config.ring_step_tiles(K, V, C, q.dtype, B * H, is_interpreted=planner.device.type == "cpu")
        for dim in "qkv":
            del arguments[f"stride_{dim}t"]
        planner.launch(ring_step_kernel, B * H, {"num_warps": tiles.num_warps}, **arguments, **tiles.constants())
        return (o,)
    tiles = config.ring_tiles(K, V, C, q.dtype, planner.precision)
    planner.launch(
        ring_kernel,
        H * (B if cu_seqlens is None else cu_seqlens.shape[0] - 1),
        {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
        **arguments,
        has_initial_state=has_initial_state,
        cu_seqlens=cu_seqlens,
        lengths=lengths,
        T=T,
        BK=tiles.BK,
        BV=tiles.BV,
        UPDATE=update,
    )
    return (o,)


def fold(x: FoldInputs[Metadata]) -> Prepared:
    return planned(_plan_fold, x)


def _plan_fold(planner: Planner, x: FoldInputs[Operand]) -> tuple[()]:
    (N, H, C, K), V = x.keys.shape, x.values.shape[3]
    tiles = config.ring_tiles(K, V, C, x.keys.dtype, planner.precision)
    planner.launch(
        fold_kernel,
        H * (N if x.state_indices is None else x.state_indices.shape[0]),
        {"num_warps": tiles.num_warps},
        log_decay=planner.contiguous(x.log_decay),
        state_indices=planner.contiguous(x.state_indices),
        H=H,
        **_slots(x),
        K=K,
        V=V,
        C=C,
        BK=tiles.BK,
        BV=tiles.BV,
        PRECISION=planner.precision,
    )
    return ()


def _slots(x: AppendInputs[Operand] | FoldInputs[Operand]) -> dict:
    """The parts of decoding states, and elements from one slot to the next."""
    parts = {"state": x.state, "keys": x.keys, "values": x.values, "count": x.count}
    return parts | {f"stride_{name}": part.strides[0] for name, part in parts.items()}


@jit
def _load_rows(p, stride, o_t, o_d, m, D: tl.constexpr):
    """A block of tokens, with zeros where the mask `[C, 1]` is false or a column is past the end."""
    return tl.load(p + o_t[:, None] * stride + o_d[None, :], mask=m & (o_d < D)[None, :], other=0.0)


@jit
def _store_rows(p, stride, o_t, o_d, m, b_x, D: tl.constexpr):
    tl.store(p + o_t[:, None] * stride + o_d[None, :], b_x, mask=m & (o_d < D)[None, :])


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
    lengths,
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
    UPDATE: tl.constexpr,
    SCALE_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`o = scale (λ^(i+1) q S + ((q kᵀ) ⊙ λ^(i-j)) v)` for all tokens of one head, which follow those of the ring.

    With UPDATE, complete chunks are added to the state, and the tokens after them replace the ring.
    """
    i_h, i_b = (tl.program_id(0) % H).to(tl.int64), (tl.program_id(0) // H).to(tl.int64)
    i_slot = load_slot(state_indices, i_b)
    if cu_seqlens is None:
        start, stop = 0, T
        q += i_b * stride_qb
        k += i_b * stride_kb
        v += i_b * stride_vb
        o += i_b * T * H * V
    else:
        start, stop = tl.load(cu_seqlens + i_b).to(tl.int32), tl.load(cu_seqlens + i_b + 1).to(tl.int32)
    q += i_h * stride_qh
    k += i_h * stride_kh
    v += i_h * stride_vh
    o += i_h * V
    stride_ot = H * V
    dtype: tl.constexpr = q.dtype.element_ty
    NUM_TILES: tl.constexpr = (V + BV - 1) // BV
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)

    end = stop
    if lengths is not None:
        end = tl.minimum(tl.maximum(tl.load(lengths + i_b).to(tl.int32), 0), T)
    if i_slot < 0:
        end = start
    for t in range(end, stop, C):  # tokens that are not read
        p_o = o + tl.cast(t, tl.int64) * stride_ot
        for i_v in range(NUM_TILES):
            o_v = i_v * BV + tl.arange(0, BV)
            _store_rows(p_o, stride_ot, o_c, o_v, (o_c < stop - t)[:, None], tl.zeros([C, BV], dtype), V)
    if i_slot >= 0:
        log_decay_h = load_log_decay(log_decay, i_h)
        p_S = state + i_slot * stride_state + i_h * (K * V)
        p_keys = keys + i_slot * stride_keys + i_h * (C * K)
        p_values = values + i_slot * stride_values + i_h * (C * V)
        p_n = count + i_slot * stride_count + i_h
        n = tl.load(p_n)
        exists = i_slot >= 0
        if has_initial_state is not None:
            exists = tl.load(has_initial_state + i_b) != 0
            n = tl.where(exists, n, 0)
        begin = start - n
        num_complete = (end - begin) // C
        distance = o_c[None, :] - o_c[:, None]  # from key j, in rows, to query i, in columns
        b_inside = tl.where(distance >= 0, decay_over(log_decay_h, distance) * scale, 0.0)
        b_read = decay_over(log_decay_h, o_c + 1)
        for i_v in range(NUM_TILES):
            o_v = i_v * BV + tl.arange(0, BV)
            b_S = load_state(p_S, o_k, o_v, exists, K, V, False).to(tl.float32)  # [BV, BK]
            p_q = q + begin.to(tl.int64) * stride_qt
            p_k = k + begin.to(tl.int64) * stride_kt
            p_v = v + begin.to(tl.int64) * stride_vt
            p_o = o + begin.to(tl.int64) * stride_ot
            for t in range(begin, end, C):
                m_old = (o_c < start - t)[:, None]
                m_new = (o_c >= start - t)[:, None] & (o_c < end - t)[:, None]
                b_q = _load_rows(p_q, stride_qt, o_c, o_k, m_new, K)
                b_k = _load_rows(p_k, stride_kt, o_c, o_k, m_new, K)
                b_v = _load_rows(p_v, stride_vt, o_c, o_v, m_new, V)
                if t < start:
                    b_k = tl.where(m_old, _load_rows(p_keys, K, o_c, o_k, m_old, K), b_k)
                    b_v = tl.where(m_old, _load_rows(p_values, V, o_c, o_v, m_old, V), b_v)
                b_o = attend_chunk(b_S, b_q, b_k, b_v, b_inside, b_read, scale, PRECISION)
                _store_rows(p_o, stride_ot, o_c, o_v, m_new, tl.trans(b_o).to(dtype), V)
                if t + C <= end:
                    b_S = add_chunk(b_S, b_k, b_v, log_decay_h, C, o_c, False, PRECISION, SCALE_KEYS)
                    b_S = b_S.to(state.dtype.element_ty).to(tl.float32)  # rounded once a chunk, however it is read
                p_q += C * stride_qt
                p_k += C * stride_kt
                p_v += C * stride_vt
                p_o += C * stride_ot
            if UPDATE:
                b_stored = b_S.to(state.dtype.element_ty)
                store_state(p_S, b_stored, o_k, o_v, (num_complete > 0) | (not exists), K, V, False)
        if UPDATE:
            tl.debug_barrier()  # all threads have read the ring
            t = begin + num_complete * C
            m_new = (o_c >= start - t)[:, None] & (o_c < end - t)[:, None]
            b_k = _load_rows(k + t.to(tl.int64) * stride_kt, stride_kt, o_c, o_k, m_new, K)
            _store_rows(p_keys, K, o_c, o_k, m_new, b_k, K)
            p_v = v + t.to(tl.int64) * stride_vt
            for i_v in range(NUM_TILES):
                o_v = i_v * BV + tl.arange(0, BV)
                _store_rows(p_values, V, o_c, o_v, m_new, _load_rows(p_v, stride_vt, o_c, o_v, m_new, V), V)
            tl.store(p_n, end - begin - num_complete * C)


@jit(do_not_specialize=["scale", "H"])
def ring_step_kernel(
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
    scale,
    H,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_vb,
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
    BS: tl.constexpr,
    BC: tl.constexpr,
    SCALE_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """`ring_kernel` for one token of every sequence: the state is read BS rows at a time, the ring BC tokens at a time.

    The query is row 0 of a tile of 16, the fewest that a tensor core takes.
    """
    i_h, i_b = (tl.program_id(0) % H).to(tl.int64), (tl.program_id(0) // H).to(tl.int64)
    i_slot = load_slot(state_indices, i_b)
    q += i_b * stride_qb + i_h * stride_qh
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    o += (i_b * H + i_h) * V
    dtype: tl.constexpr = q.dtype.element_ty
    o_k, o_v, o_s, o_r = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BS), tl.arange(0, 16)
    m_k, m_v, m_q = o_k < K, o_v < V, (o_r == 0)[:, None]
    if i_slot < 0:
        tl.store(o + o_v, tl.zeros([BV], dtype), mask=m_v)
    else:
        log_decay_h = load_log_decay(log_decay, i_h)
        p_S = state + i_slot * stride_state + i_h * (K * V)
        p_keys = keys + i_slot * stride_keys + i_h * (C * K)
        p_values = values + i_slot * stride_values + i_h * (C * V)
        p_n = count + i_slot * stride_count + i_h
        n = tl.load(p_n)
        b_read = decay_over(log_decay_h, n + 1)
        b_o = tl.zeros([16, BV], tl.float32)
        if dtype == tl.float16:
            b_bits = tl.zeros([1, BV], tl.int32)
            for s in range(0, BK, BS):
                b_S = _load_rows(p_S, V, s + o_s, o_v, (s + o_s < K)[:, None], V).to(tl.float32)
                b_bits = tl.maximum(b_bits, tl.max(b_S.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0, keep_dims=True))
            b_power, b_unit = float16_scales(b_bits)
            for s in range(0, BK, BS):
                b_S = _load_rows(p_S, V, s + o_s, o_v, (s + o_s < K)[:, None], V).to(tl.float32)
                b_q = _load_rows(q, 0, o_r, s + o_s, m_q, K)
                b_o = tl.dot(b_q, (b_S * b_power).to(dtype), b_o)
            b_o = b_o * b_read * (b_unit * scale)
        else:
            for s in tl.range(0, BK, BS, num_stages=NUM_STAGES):
                b_q = _load_rows(q, 0, o_r, s + o_s, m_q, K)
                b_S = _load_rows(p_S, V, s + o_s, o_v, (s + o_s < K)[:, None], V)
                b_o = tl.dot(b_q, b_S.to(tl.float32).to(dtype), b_o, input_precision=PRECISION)
            b_o *= b_read * scale
        b_q = _load_rows(q, 0, o_r, o_k, m_q, K)
        b_new_k, b_new_v = tl.load(k + o_k, mask=m_k, other=0.0), tl.load(v + o_v, mask=m_v, other=0.0)
        for c in range(0, n + 1, BC):
            o_c = c + tl.arange(0, BC)
            m_old, m_new = (o_c < n)[:, None], (o_c == n)[:, None]
            b_k = tl.where(m_new, b_new_k[None, :], _load_rows(p_keys, K, o_c, o_k, m_old, K))
            b_v = tl.where(m_new, b_new_v[None, :], _load_rows(p_values, V, o_c, o_v, m_old, V))
            b_inside = tl.where(o_c <= n, decay_over(log_decay_h, n - o_c) * scale, 0.0)
            b_A = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_inside[None, :]
            if dtype == tl.float16:
                b_scores, b_scores_unit = scale_to_float16(b_A, 1)
                b_o = tl.fma(tl.dot(b_scores, b_v), b_scores_unit, b_o)
            else:
                b_o = tl.dot(b_A.to(dtype), b_v, b_o, input_precision=PRECISION)
        _store_rows(o, 0, o_r, o_v, m_q, b_o.to(dtype), V)

        if n + 1 < C:
            tl.store(p_keys + n * K + o_k, b_new_k, mask=m_k)
            tl.store(p_values + n * V + o_v, b_new_v, mask=m_v)
            tl.store(p_n, n + 1)
        else:
            o_c = tl.arange(0, C)
            m_old, m_new = (o_c < n)[:, None], (o_c == n)[:, None]
            b_write = decay_over(log_decay_h, C - 1 - o_c)[:, None]
            b_v = tl.where(m_new, b_new_v[None, :], _load_rows(p_values, V, o_c, o_v, m_old, V))
            if not SCALE_KEYS:
                b_v = (b_v * b_write).to(dtype)
            for s in range(0, BK, BS):
                b_k = _load_rows(p_keys, K, o_c, s + o_s, m_old, K)
                b_k = tl.where(m_new, tl.load(k + s + o_s, mask=s + o_s < K, other=0.0)[None, :], b_k)
                if SCALE_KEYS:
                    b_k = (b_k.to(tl.float32) * b_write).to(dtype)
                m_s = (s + o_s < K)[:, None]
                b_S = _load_rows(p_S, V, s + o_s, o_v, m_s, V).to(tl.float32) * decay_over(log_decay_h, C)
                b_S = tl.dot(tl.trans(b_k), b_v, b_S, input_precision=PRECISION)
                _store_rows(p_S, V, s + o_s, o_v, m_s, b_S.to(state.dtype.element_ty), V)
            tl.store(p_n, 0)


@jit(do_not_specialize=["H"])
def fold_kernel(
    log_decay,
    state,
    keys,
    values,
    count,
    state_indices,
    H,
    stride_state,
    stride_keys,
    stride_values,
    stride_count,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`S ← λ^n S + Σ_j λ^(n-1-j) k_j v_jᵀ` over the n tokens of the ring of one head, which is empty then."""
    i_h, i_n = (tl.program_id(0) % H).to(tl.int64), (tl.program_id(0) // H).to(tl.int64)
    i_slot = load_slot(state_indices, i_n)
    if i_slot >= 0:
        p_S = state + i_slot * stride_state + i_h * (K * V)
        p_keys = keys + i_slot * stride_keys + i_h * (C * K)
        p_values = values + i_slot * stride_values + i_h * (C * V)
        p_n = count + i_slot * stride_count + i_h
        n = tl.load(p_n)
        if n > 0:
            log_decay_h = load_log_decay(log_decay, i_h)
            o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
            m_c = (o_c < n)[:, None]
            b_k = _load_rows(p_keys, K, o_c, o_k, m_c, K)
            for i_v in range((V + BV - 1) // BV):
                o_v = i_v * BV + tl.arange(0, BV)
                b_v = _load_rows(p_values, V, o_c, o_v, m_c, V)
                b_S = load_state(p_S, o_k, o_v, n > 0, K, V, False).to(tl.float32)
                b_S = add_chunk(b_S, b_k, b_v, log_decay_h, n, o_c, False, PRECISION)
                store_state(p_S, b_S.to(state.dtype.element_ty), o_k, o_v, True, K, V, False)
            tl.debug_barrier()  # all threads have read n
            tl.store(p_n, 0)
