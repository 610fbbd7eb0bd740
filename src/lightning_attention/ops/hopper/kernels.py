"""The kernels of sequences for Hopper GPUs, in Gluon: TMA brings tiles, warpgroups multiply them side by side.

A program has one head of a row and one segment of it. One warp fetches chunks of C tokens, some ahead; each of one or
two warpgroups owns 64 columns of V (of the state, and of the output), and shares nothing with the other but the tiles
that come in. The state stays in float32 in registers; what multiplies queries is a copy of it in shared memory, in the
dtype of the inputs.

Chunks follow each other from where a scan begins, so that only the last one may be ragged: of fewer tokens than C. What
TMA brings from outside of a row is zero; keys and values of other sequences in the row are cleared. Outputs of a ragged
chunk are stored by rows: TMA would overwrite those of the next sequence, and stores no box that begins before a row.
"""

from triton.language import constexpr

from ..gpu.primitives import decay_over
from ..gpu.primitives import load_log_decay as load_rate
from .parts import (
    ACC,
    BARRIER,
    BOX,
    BV,
    LEFT,
    TILE,
    C,
    clear_rows,
    count_chunks,
    count_states,
    empty_stage,
    fence_async_shared,
    gl,
    init_barriers,
    input_boxes,
    jit,
    let_next_begin,
    load_box,
    load_columns,
    mbarrier,
    output_boxes,
    piece,
    prefix,
    program,
    read_decays,
    stage,
    state_before,
    state_pointers,
    store_box,
    store_rows,
    tma,
    tokens,
    wait_for_previous,
    warpgroup_mma,
    warpgroup_mma_wait,
    write_decay,
)


@jit(do_not_specialize=["scale", "B", "T", "H", "N", "segment_length", "summed"])
def scan_kernel(
    q,
    k,
    v,
    o,
    log_decay,
    initial_state,
    interval_states,
    final_state,
    cu_seqlens,
    scale,
    B,
    T,
    H,
    N,
    segment_length,
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
    K: constexpr,
    V: constexpr,
    REVERSE: constexpr,
    TRANSPOSED_STATES: constexpr,
    PREFIX: constexpr,
    BESIDE: constexpr,
    STAGES: constexpr,
):
    """`o = scale (λ^(i+1) q S + ((q kᵀ) ⊙ λ^(i-j)) v)`, as in `..triton.kernels.scan_kernel`.

    With BESIDE it runs beside the kernel launched before it, of which it takes nothing, and ends after it. States of
    segments it otherwise waits for, and then lets the next one begin, which may take them too.
    """
    AFTER: constexpr = constexpr(interval_states is not None and not BESIDE)
    if not AFTER:
        let_next_begin()
    GROUPS: constexpr = V // BV
    dtype: constexpr = q.dtype.element_ty
    i_h, i_b, part = program(log_decay, H, cu_seqlens, N, T, segment_length, REVERSE, PREFIX)
    row = (cu_seqlens, N, T, part)

    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, K], BOX)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, K], BOX)
    v_s = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, 1, C, 1, BV], BOX)
    o_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, C, 1, BV], BOX)
    S_s = gl.allocate_shared_memory(dtype, [GROUPS, K, BV], TILE)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    init_barriers(ready, empty, GROUPS, STAGES)

    inputs = (q_s, k_s, v_s, ready, empty)
    num_states = count_states(T, segment_length)
    states = (initial_state, interval_states, final_state, segment_length, num_states, summed)
    outputs = (o, o_s, S_s)
    where = (row, B, H, i_b, i_h)
    decay = (log_decay, scale)
    of_q = (q, stride_qb, stride_qt, stride_qh)
    of_k = (k, stride_kb, stride_kt, stride_kh)
    of_v = (v, stride_vb, stride_vt, stride_vh)
    tensors = (of_q, of_k, of_v)
    shared = (inputs, outputs, states, decay, where)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_scan, (shared, constexpr(0), K, V, REVERSE, TRANSPOSED_STATES, PREFIX, AFTER, STAGES)),
                (_scan, (shared, constexpr(1), K, V, REVERSE, TRANSPOSED_STATES, PREFIX, AFTER, STAGES)),
                (_fetch, (tensors, inputs, log_decay, where, K, V, REVERSE, PREFIX, STAGES)),
            ],
            [4, 1],
            [232, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_scan, (shared, constexpr(0), K, V, REVERSE, TRANSPOSED_STATES, PREFIX, AFTER, STAGES)),
                (_fetch, (tensors, inputs, log_decay, where, K, V, REVERSE, PREFIX, STAGES)),
            ],
            [1],
            [24],
        )
    if BESIDE:
        wait_for_previous()


@jit
def _fetch(
    tensors,
    inputs,
    log_decay,
    where,
    K: constexpr,
    V: constexpr,
    REVERSE: constexpr,
    PREFIX: constexpr,
    STAGES: constexpr,
):
    GROUPS: constexpr = V // BV
    of_q, of_k, of_v = tensors
    q_s, k_s, v_s, ready, empty = inputs
    row, B, H, i_b, i_h = where
    _, _, T, part = row
    _, _, n_first, n_last = part
    q_desc = input_boxes(of_q, B, T, H, K, K)
    k_desc = input_boxes(of_k, B, T, H, K, K)
    v_desc = input_boxes(of_v, B, T, H, V, BV)
    STATE_BYTES: constexpr = k_desc.block_type.nbytes + GROUPS * v_desc.block_type.nbytes
    NUM_BYTES: constexpr = q_desc.block_type.nbytes + STATE_BYTES
    rate = load_rate(log_decay, i_h)
    c = 0
    for n in range(n_first, n_last):
        _, _, _, lo, hi = piece(row, n, REVERSE)
        if PREFIX:
            lo_prefix = prefix(row, n, rate, REVERSE)
            for i in range(count_chunks(lo_prefix, lo)):
                t, _ = tokens(lo_prefix, lo, i, T, REVERSE)
                s, b_ready = empty_stage(ready, empty, c, STATE_BYTES, STAGES)
                load_box(k_desc, [i_b, t, i_h, 0], b_ready, k_s.index(s))
                load_columns(v_desc, i_b, t, i_h, b_ready, v_s, s, GROUPS)
                c += 1
        for i in range(count_chunks(lo, hi)):
            t, _ = tokens(lo, hi, i, T, REVERSE)
            s, b_ready = empty_stage(ready, empty, c, NUM_BYTES, STAGES)
            load_box(q_desc, [i_b, t, i_h, 0], b_ready, q_s.index(s))
            load_box(k_desc, [i_b, t, i_h, 0], b_ready, k_s.index(s))
            load_columns(v_desc, i_b, t, i_h, b_ready, v_s, s, GROUPS)
            c += 1


@jit
def _scan(
    shared,
    g: constexpr,
    K: constexpr,
    V: constexpr,
    REVERSE: constexpr,
    TRANSPOSED_STATES: constexpr,
    PREFIX: constexpr,
    AFTER: constexpr,
    STAGES: constexpr,
):
    """A warpgroup's columns."""
    GROUPS: constexpr = V // BV
    inputs, outputs, states, decay, where = shared
    o, o_s, S_s = outputs
    initial_state, _, final_state, _, _, _ = states
    log_decay, scale = decay
    row, B, H, i_b, i_h = where
    _, _, T, part = row
    _, _, n_first, n_last = part
    PACKED: constexpr = constexpr(row[0] is not None)
    dtype: constexpr = o_s.dtype

    i_head = i_h.to(gl.int64)
    column: constexpr = g * BV
    rate = load_rate(log_decay, i_head)
    b_inside, b_read = read_decays(rate, scale, REVERSE)
    state_scale = 1.0 / scale if REVERSE else 1.0
    o_k = gl.arange(0, K, layout=gl.SliceLayout(1, ACC))
    o_v = column + gl.arange(0, BV, layout=gl.SliceLayout(0, ACC))
    stride_ot = H * V
    o_desc = output_boxes(o, B, T, H, V)
    p_o = o + (i_b.to(gl.int64) * T * H + i_head) * V + column
    t_S = S_s.index(g)
    place = (p_o, stride_ot, o_desc, o_s.index(g), i_b, i_h, column)
    written = inputs[1:]
    if AFTER:
        wait_for_previous()
        let_next_begin()

    c = 0
    for n in range(n_first, n_last):
        start, end, i_n, lo, hi = piece(row, n, REVERSE)
        b_S = gl.zeros([K, BV], gl.float32, layout=ACC)
        b_write, whole = write_decay(rate, C, REVERSE)
        before = (written, b_write, whole, states, where, rate, n, start, lo, i_head, o_k, o_v)
        b_S, c = state_before(b_S, c, before, g, K, V, REVERSE, TRANSPOSED_STATES, PREFIX, STAGES)
        if initial_state is not None:
            p_S = state_pointers(initial_state, i_n, i_head, o_k, o_v, H, K, V, TRANSPOSED_STATES)
            b_S += gl.load(p_S) * (decay_over(rate, lo - start) * state_scale)
        t_S.store(b_S.to(dtype))
        fence_async_shared()

        for i in range(count_chunks(lo, hi)):
            t, m = tokens(lo, hi, i, T, REVERSE)
            if final_state is not None and m < C:
                b_write, whole = write_decay(rate, m, REVERSE)
            decays = (b_inside, b_read, b_write, whole)
            b_S = _chunk(b_S, t_S, inputs, place, decays, c, t, m, g, GROUPS, K, REVERSE, PACKED, STAGES)
            c += 1

        if final_state is not None:
            p_S = state_pointers(final_state, i_n, i_head, o_k, o_v, H, K, V, TRANSPOSED_STATES)
            if hi == end:
                gl.store(p_S, b_S / state_scale)
    tma.store_wait(0)


@jit
def _tiles(inputs, s, g: constexpr, GROUPS: constexpr, K: constexpr):
    """Queries, keys and values of the chunk at s."""
    q_s, k_s, v_s, _, _ = inputs
    return q_s.index(s).reshape([C, K]), k_s.index(s).reshape([C, K]), v_s.index(GROUPS * s + g).reshape([C, BV])


@jit
def _chunk(
    b_S,
    t_S,
    inputs,
    place,
    decays,
    c,
    t,
    m,
    g: constexpr,
    GROUPS: constexpr,
    K: constexpr,
    REVERSE: constexpr,
    PACKED: constexpr,
    STAGES: constexpr,
):
    """The outputs of m tokens. Returns the state after them, of which a copy is then in `t_S`."""
    _, _, _, ready, empty = inputs
    p_o, stride_ot, o_desc, box_o, i_b, i_h, column = place
    dtype: constexpr = t_S.dtype
    b_inside, b_read, b_write, whole = decays
    s, parity = stage(c, STAGES)
    mbarrier.wait(ready.index(s), parity)
    t_q, t_k, t_v = _tiles(inputs, s, g, GROUPS, K)
    if PACKED and m < C:  # of a tile that warpgroups share both write the same
        clear_rows(t_k, m, K, REVERSE)
        clear_rows(t_v, m, BV, REVERSE)
        fence_async_shared()

    zeros = gl.zeros([C, C], gl.float32, layout=ACC)
    b_P = warpgroup_mma(t_q, t_k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    b_o = warpgroup_mma(t_q, t_S, gl.zeros([C, BV], gl.float32, layout=ACC), use_acc=False, is_async=True)
    b_kT = t_k.permute((1, 0)).load(LEFT)
    b_kT = (b_kT.to(gl.float32) * b_write[None, :]).to(dtype)
    b_P = warpgroup_mma_wait(1, deps=[b_P])
    b_P = gl.convert_layout((b_P * b_inside).to(dtype), LEFT)
    b_o = warpgroup_mma_wait(0, deps=[b_o])
    b_o = b_o * b_read[:, None]
    b_S = b_S * whole
    b_o = warpgroup_mma(b_P, t_v, b_o, is_async=True)
    b_S = warpgroup_mma(b_kT, t_v, b_S, is_async=True)

    b_o = warpgroup_mma_wait(1, deps=[b_o])
    t_o = box_o.reshape([C, BV])
    tma.store_wait(0)
    t_o.store(b_o.to(dtype))
    fence_async_shared()
    if m == C:
        store_box(o_desc, [i_b, t, i_h, column], box_o)
    b_S = warpgroup_mma_wait(0, deps=[b_S])
    mbarrier.arrive(empty.index(s))
    t_S.store(b_S.to(dtype))
    fence_async_shared()
    if m < C:
        store_rows(p_o + t.to(gl.int64) * stride_ot, stride_ot, t_o, m, REVERSE)
    return b_S
