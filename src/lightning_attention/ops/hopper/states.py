"""The states that segments leave, for Hopper GPUs, from which later ones start."""

from triton.language import constexpr

from ..gpu.primitives import interval_bounds
from ..gpu.primitives import load_log_decay as load_rate
from .parts import (
    ACC,
    BARRIER,
    BOX,
    BV,
    C,
    add_chunks,
    count_chunks,
    count_states,
    empty_stage,
    gl,
    init_barriers,
    input_boxes,
    jit,
    let_next_begin,
    load_box,
    load_columns,
    state_pointers,
    tokens,
    wait_for_previous,
    write_decay,
)


@jit(do_not_specialize=["B", "T", "H", "N", "segment_length"])
def interval_state_kernel(
    k,
    v,
    log_decay,
    interval_states,
    factors,
    cu_seqlens,
    B,
    T,
    H,
    N,
    segment_length,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    K: constexpr,
    V: constexpr,
    REVERSE: constexpr,
    STAGES: constexpr,
):
    """`Σ_j λ^(end-1-j) k_j v_jᵀ` of a segment, as in `..triton.kernels.interval_state_kernel`.

    In reverse, of which only backward has need, it runs beside the kernel of the other direction, and ends after it.
    """
    let_next_begin()
    GROUPS: constexpr = V // BV
    dtype: constexpr = k.dtype.element_ty
    i = gl.program_id(0)
    i_h = i % H
    i = i // H
    num_states = count_states(T, segment_length)
    i_s, i_b = i % num_states, i // num_states

    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, K], BOX)
    v_s = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, 1, C, 1, BV], BOX)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    init_barriers(ready, empty, GROUPS, STAGES)

    rate = load_rate(log_decay, i_h)
    lo, hi, factor = interval_bounds(i_s, rate, cu_seqlens, N, T, segment_length, segment_length, REVERSE, False)
    gl.store(factors + i.to(gl.int64) * H + i_h, factor)
    num_chunks = count_chunks(lo, hi)
    begin = hi - num_chunks * C
    num_others = lo - begin if cu_seqlens is not None else 0

    inputs = (k_s, v_s, ready, empty)
    part = (begin, hi, num_chunks, num_others)
    of_k = (k, stride_kb, stride_kt, stride_kh)
    of_v = (v, stride_vb, stride_vt, stride_vh)
    states = (interval_states, i, i_h.to(gl.int64), H, rate)
    PACKED: constexpr = constexpr(cu_seqlens is not None)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_sum, (inputs, part, states, constexpr(0), K, V, REVERSE, PACKED, STAGES)),
                (_sum, (inputs, part, states, constexpr(1), K, V, REVERSE, PACKED, STAGES)),
                (_fetch, (of_k, of_v, inputs, part, B, T, H, i_b, i_h, K, V, REVERSE, STAGES)),
            ],
            [4, 1],
            [232, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_sum, (inputs, part, states, constexpr(0), K, V, REVERSE, PACKED, STAGES)),
                (_fetch, (of_k, of_v, inputs, part, B, T, H, i_b, i_h, K, V, REVERSE, STAGES)),
            ],
            [1],
            [24],
        )
    if REVERSE:
        wait_for_previous()


@jit
def _fetch(
    of_k, of_v, inputs, part, B, T, H, i_b, i_h, K: constexpr, V: constexpr, REVERSE: constexpr, STAGES: constexpr
):
    GROUPS: constexpr = V // BV
    k_s, v_s, ready, empty = inputs
    begin, hi, num_chunks, _ = part
    k_desc = input_boxes(of_k, B, T, H, K, K)
    v_desc = input_boxes(of_v, B, T, H, V, BV)
    NUM_BYTES: constexpr = k_desc.block_type.nbytes + GROUPS * v_desc.block_type.nbytes
    for i in range(num_chunks):
        t, _ = tokens(begin, hi, i, T, REVERSE)
        s, b_ready = empty_stage(ready, empty, i, NUM_BYTES, STAGES)
        load_box(k_desc, [i_b, t, i_h, 0], b_ready, k_s.index(s))
        load_columns(v_desc, i_b, t, i_h, b_ready, v_s, s, GROUPS)


@jit
def _sum(
    inputs,
    part,
    states,
    g: constexpr,
    K: constexpr,
    V: constexpr,
    REVERSE: constexpr,
    PACKED: constexpr,
    STAGES: constexpr,
):
    """A warpgroup's columns."""
    _, _, num_chunks, num_others = part
    interval_states, i_state, i_head, H, rate = states
    o_k = gl.arange(0, K, layout=gl.SliceLayout(1, ACC))
    o_v = g * BV + gl.arange(0, BV, layout=gl.SliceLayout(0, ACC))
    b_write, whole = write_decay(rate, C, REVERSE)
    b_S = gl.zeros([K, BV], gl.float32, layout=ACC)
    b_S = add_chunks(b_S, inputs, b_write, whole, 0, num_chunks, num_others, g, V // BV, K, REVERSE, PACKED, STAGES)
    gl.store(state_pointers(interval_states, i_state, i_head, o_k, o_v, H, K, V, False), b_S)
