"""Decoding in Triton: one or a few tokens of every sequence, and the drafts of speculative decoding.

A program takes one head of a batch row, and BV columns of its state, which it reads once. Names as in kernels.py;
here C is the number of drafts, rounded up.
"""

import triton.language as tl
from torch import Tensor

from ..calls import Prepared, call
from ..gpu.plan import Operand, Planner, planned, strides
from ..gpu.primitives import decay_over, jit, load_log_decay, load_slot, program_ids
from ..gpu.segments import ceil_div
from ..inputs import AttentionInputs, DecodingInputs, Metadata
from .config import MAX_TREE, step_tiles, verify_tiles
from .launch import Scans, forward


def step(x: DecodingInputs[Metadata], scale: float) -> Prepared:
    return planned(_plan_step, x, scale)


def _plan_step(planner: Planner, x: DecodingInputs[Operand], scale: float) -> tuple[Operand]:
    x = _readable(planner, x)
    o = planner.empty(*x.v.shape, dtype=x.v.dtype)
    _advance(planner, x, o, scale)
    return (o,)


def commit(x: DecodingInputs[Metadata]) -> Prepared:
    return planned(_plan_commit, x)


def _plan_commit(planner: Planner, x: DecodingInputs[Operand]) -> tuple[()]:
    _advance(planner, _readable(planner, x), None, 1.0)
    return ()


def _advance(planner: Planner, x: DecodingInputs[Operand], o: Operand | None, scale: float) -> None:
    """Launch the kernel that decodes token after token; without `o`, only those on the path to `last`."""
    (B, *tokens, H, K), V = x.k.shape, x.v.shape[-1]
    BK, BV = step_tiles(K, V)
    planner.launch(
        step_kernel,
        ceil_div(V, BV) * H * B if 0 not in x.v.shape else 0,
        {"num_warps": 4},
        **x._asdict(),
        o=o,
        scale=scale,
        T=tokens[0] if tokens else 1,
        H=H,
        **strides(q=x.q, k=x.k, v=x.v),
        **_state_strides(x.state),
        K=K,
        V=V,
        BK=BK,
        BV=BV,
    )


def verify(x: DecodingInputs[Metadata], scale: float) -> Prepared:
    if x.q.shape[1] <= MAX_TREE:
        return planned(_plan_verify, x, scale)
    return lambda x: _verify_chain(x, scale)


def _verify_chain(x: DecodingInputs[Tensor], scale: float) -> list[Tensor]:
    state, is_padding = x.state, None
    if x.state_indices is not None:
        state, is_padding = state[x.state_indices.clamp_min(0)], x.state_indices < 0
    (o,) = call(forward, AttentionInputs(x.q, x.k, x.v, x.log_decay, state.float(), None), scale, False)
    return [o if is_padding is None else o.masked_fill_(is_padding[:, None, None, None], 0)]


def _plan_verify(planner: Planner, x: DecodingInputs[Operand], scale: float) -> tuple[Operand]:
    x = _readable(planner, x)
    (B, T, H, K), V = x.q.shape, x.v.shape[3]
    o = planner.empty(*x.v.shape, dtype=x.v.dtype)
    C, BK, BV, num_warps = verify_tiles(K, V, max(T, 1))
    planner.launch(
        verify_kernel,
        ceil_div(V, BV) * H * B if T else 0,
        {"num_warps": num_warps},
        q=x.q,
        k=x.k,
        v=x.v,
        o=o,
        log_decay=x.log_decay,
        state=x.state,
        parents=x.parents,
        state_indices=x.state_indices,
        scale=scale,
        T=T,
        H=H,
        **strides(q=x.q, k=x.k, v=x.v),
        **_state_strides(x.state),
        K=K,
        V=V,
        C=C,
        BK=BK,
        BV=BV,
    )
    return (o,)


def _readable(planner: Planner, x: DecodingInputs[Operand]) -> DecodingInputs[Operand]:
    """Operands as the kernels read them; the state, which they write, has any strides."""
    q, k, v = Scans.readable(planner, x.q, x.k, x.v)
    others = (x.log_decay, x.state_indices, x.parents, x.last, x.saved_indices)
    log_decay, *indices = (planner.contiguous(y) for y in others)
    return DecodingInputs(q, k, v, log_decay, x.state, *indices)


def _state_strides(state: Operand) -> dict[str, int]:
    return {f"stride_s{dim}": stride for dim, stride in zip("nhkv", state.strides, strict=True)}


@jit(do_not_specialize=["scale", "T", "H"])
def step_kernel(
    q,
    k,
    v,
    o,
    log_decay,
    state,
    last,
    parents,
    state_indices,
    saved_indices,
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
    stride_sn,
    stride_sh,
    stride_sk,
    stride_sv: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Token after token: `S ← λ S + k vᵀ`, `o = scale Sᵀ q`.

    With `last`, only tokens on the path to that draft. With `saved_indices`, the state after each token is written to a
    slot of its own, and not to the one that is read.
    """
    i_v, i_h, _, i_b = program_ids(H, 1, V, BV)
    i_n = load_slot(state_indices, i_b)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    if o is not None:
        q += i_b * stride_qb + i_h * stride_qh
        o += (i_b * T * H + i_h) * V
    if i_n < 0:
        if o is not None:
            for _ in range(T):
                tl.store(o + o_v, tl.zeros([BV], o.dtype.element_ty), mask=m_v)
                o += H * V
    else:
        i_last, path = 0, 0
        if last is not None:
            i_last = tl.load(last + i_b).to(tl.int32)
            if parents is not None:
                path = _path(parents + i_b * T, tl.minimum(i_last, T - 1))
        b_decay = decay_over(load_log_decay(log_decay, i_h), 1)
        o_S = i_h * stride_sh + o_k[:, None].to(tl.int64) * stride_sk + o_v[None, :].to(tl.int64) * stride_sv
        p_S, m_S = state + i_n * stride_sn + o_S, m_k[:, None] & m_v[None, :]
        b_S = tl.load(p_S, mask=m_S, other=0.0).to(tl.float32)  # [BK, BV]
        for t in range(T):
            b_k = tl.load(k + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_v = tl.load(v + o_v, mask=m_v, other=0.0).to(tl.float32)
            k += stride_kt
            v += stride_vt
            # An explicit FMA: every variant of this kernel rounds alike.
            b_after = tl.fma(b_S, b_decay, b_k[:, None] * b_v[None, :])
            if last is None:
                b_S = b_after
            elif parents is None:
                b_S = tl.where(t <= i_last, b_after, b_S)
            else:
                b_S = tl.where((path >> t) & 1 != 0, b_after, b_S)
            if o is not None:
                b_q = tl.load(q + o_k, mask=m_k, other=0.0).to(tl.float32)
                b_o = tl.sum(b_S * b_q[:, None], axis=0) * scale
                tl.store(o + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
                q += stride_qt
                o += H * V
            if saved_indices is not None:
                i_saved = tl.load(saved_indices + i_b * T + t).to(tl.int64)
                p_saved = state + i_saved * stride_sn + o_S
                tl.store(p_saved, b_S.to(state.dtype.element_ty), mask=m_S & (i_saved >= 0))
        if saved_indices is None:
            tl.store(p_S, b_S.to(state.dtype.element_ty), mask=m_S)


@jit(do_not_specialize=["scale", "T", "H"])
def verify_kernel(
    q,
    k,
    v,
    o,
    log_decay,
    state,
    parents,
    state_indices,
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
    stride_sn,
    stride_sh,
    stride_sk,
    stride_sv: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """`o_i = scale (λ^d_i q_i S + Σ_j λ^(d_i-d_j) (q_i k_j) v_j)` over the path of draft i, whose depth is d_i."""
    i_v, i_h, _, i_b = program_ids(H, 1, V, BV)
    i_n = load_slot(state_indices, i_b)
    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_c, m_k, m_v = o_c < T, o_k < K, o_v < V
    o += (i_b * T * H + i_h) * V
    p_o, m_o = o + o_c[:, None] * H * V + o_v[None, :], m_c[:, None] & m_v[None, :]
    if i_n < 0:
        tl.store(p_o, tl.zeros([C, BV], o.dtype.element_ty), mask=m_o)
    else:
        q += i_b * stride_qb + i_h * stride_qh
        k += i_b * stride_kb + i_h * stride_kh
        v += i_b * stride_vb + i_h * stride_vh
        b_q = tl.load(q + o_c[:, None] * stride_qt + o_k[None, :], mask=m_c[:, None] & m_k[None, :], other=0.0)
        b_k = tl.load(k + o_c[:, None] * stride_kt + o_k[None, :], mask=m_c[:, None] & m_k[None, :], other=0.0)
        b_v = tl.load(v + o_c[:, None] * stride_vt + o_v[None, :], mask=m_o, other=0.0)
        p_S = state + i_n * stride_sn + i_h * stride_sh
        p_S += o_k[:, None].to(tl.int64) * stride_sk + o_v[None, :].to(tl.int64) * stride_sv
        b_S = tl.load(p_S, mask=m_k[:, None] & m_v[None, :], other=0.0).to(tl.float32)  # [BK, BV]

        b_path, b_depth = _paths(parents, i_b, T, C)
        b_log_decay = load_log_decay(log_decay, i_h)
        is_on_path = (b_path[:, None] >> o_c[None, :].to(tl.int64)) & 1 != 0  # draft i, in rows, after j, in columns
        b_between = tl.where(is_on_path, decay_over(b_log_decay, b_depth[:, None] - b_depth[None, :]), 0.0)
        b_A = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * b_between  # [C, C]
        b_o = tl.dot(b_q.to(tl.float32), b_S, input_precision="ieee") * decay_over(b_log_decay, b_depth)[:, None]
        b_o = tl.dot(b_A, b_v.to(tl.float32), b_o, input_precision="ieee") * scale
        tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_o)


@jit
def _path(p_parents, i):
    """Bits of draft i < T and its ancestors. Invalid parents end the path too, within bounds."""
    path = tl.zeros([], tl.int64)
    while i >= 0:
        path |= tl.full([], 1, tl.int64) << i
        i = tl.minimum(tl.load(p_parents + i).to(tl.int32), i - 1)
    return path


@jit
def _paths(parents, i_b, T, C: tl.constexpr):
    """Bits of the path of every draft, and its depth."""
    o_c = tl.arange(0, C)
    b_path = tl.full([C], 1, tl.int64) << o_c.to(tl.int64)
    if parents is None:
        b_path = b_path | (b_path - 1)
        b_depth = o_c + 1
    else:
        p_parents = parents + i_b * T
        b_depth = tl.full([C], 1, tl.int32)
        b_i = tl.load(p_parents + o_c, mask=o_c < T, other=-1).to(tl.int32)
        b_i = tl.minimum(b_i, o_c - 1)
        for _ in range(T):
            b_is_draft = b_i >= 0
            b_bit = tl.full([C], 1, tl.int64) << tl.maximum(b_i, 0).to(tl.int64)
            b_path = tl.where(b_is_draft, b_path | b_bit, b_path)
            b_depth += b_is_draft.to(tl.int32)
            b_next = tl.load(p_parents + tl.maximum(b_i, 0), mask=b_is_draft, other=-1).to(tl.int32)
            b_i = tl.minimum(b_next, b_i - 1)
    return b_path, b_depth
