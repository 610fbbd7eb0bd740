"""The gradients of keys and values for Hopper GPUs: two scans in reverse that share what they read, and the state R.

In the terms of `kernels.py`, and with the state `R = Σ_i λ^(i-n) q_i do_iᵀ` of the tokens i after a chunk of n,

    dv = scale (((k qᵀ) ⊙ λ^(i-j)) do + λ^(n-1-j) k R)        dk = scale (((v doᵀ) ⊙ λ^(i-j)) q + λ^(n-1-j) v Rᵀ)

Of heads of 128 one warpgroup makes dv, the other dk; each keeps half the columns of R, and publishes a copy for both.
Of heads of 64 a single warpgroup makes both.
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
def gradient_kernel(
    q,
    k,
    v,
    do,
    dk,
    dv,
    log_decay,
    d_final_state,
    interval_states,
    d_initial_state,
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
    stride_dob,
    stride_dot,
    stride_doh,
    D: constexpr,
    PREFIX: constexpr,
    STAGES: constexpr,
):
    """dk and dv, where K = V = D. It runs beside the kernel launched before it, of which it takes nothing."""
    GROUPS: constexpr = D // BV
    dtype: constexpr = q.dtype.element_ty
    i_h, i_b, part = program(log_decay, H, cu_seqlens, N, T, segment_length, True, PREFIX)
    row = (cu_seqlens, N, T, part)

    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, D], BOX)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, D], BOX)
    v_s = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, 1, C, 1, BV], BOX)
    do_s = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, 1, C, 1, BV], BOX)
    out_s = gl.allocate_shared_memory(dtype, [2 * GROUPS, 1, C, 1, BV], BOX)
    R_s = gl.allocate_shared_memory(dtype, [GROUPS * GROUPS, D, BV], TILE)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    published = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for b in gl.static_range(2):
        mbarrier.init(published.index(b), count=2)
    init_barriers(ready, empty, GROUPS, STAGES)

    inputs = (q_s, k_s, v_s, do_s, ready, empty)
    R = (R_s, published)
    num_states = count_states(T, segment_length)
    states = (d_final_state, interval_states, d_initial_state, segment_length, num_states, summed)
    where = (row, B, H, i_b, i_h)
    decay = (log_decay, scale)
    of_q = (q, stride_qb, stride_qt, stride_qh)
    of_k = (k, stride_kb, stride_kt, stride_kh)
    of_v = (v, stride_vb, stride_vt, stride_vh)
    of_do = (do, stride_dob, stride_dot, stride_doh)
    tensors = (of_q, of_k, of_v, of_do)
    outputs = (dk, dv, out_s)
    shared = (inputs, outputs, R, states, decay, where)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_gradient, (shared, constexpr(0), D, PREFIX, STAGES)),
                (_gradient, (shared, constexpr(1), D, PREFIX, STAGES)),
                (_fetch, (tensors, inputs, log_decay, where, D, PREFIX, STAGES)),
            ],
            [4, 1],
            [232, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_gradients, (shared, D, PREFIX, STAGES)),
                (_fetch, (tensors, inputs, log_decay, where, D, PREFIX, STAGES)),
            ],
            [1],
            [24],
        )
    wait_for_previous()


@jit
def _fetch(tensors, inputs, log_decay, where, D: constexpr, PREFIX: constexpr, STAGES: constexpr):
    GROUPS: constexpr = D // BV
    of_q, of_k, of_v, of_do = tensors
    q_s, k_s, v_s, do_s, ready, empty = inputs
    row, B, H, i_b, i_h = where
    _, _, T, part = row
    _, _, n_first, n_last = part
    q_desc = input_boxes(of_q, B, T, H, D, D)
    k_desc = input_boxes(of_k, B, T, H, D, D)
    v_desc = input_boxes(of_v, B, T, H, D, BV)
    do_desc = input_boxes(of_do, B, T, H, D, BV)
    STATE_BYTES: constexpr = q_desc.block_type.nbytes + GROUPS * do_desc.block_type.nbytes
    rate = load_rate(log_decay, i_h)
    c = 0
    for n in range(n_first, n_last):
        _, _, _, lo, hi = piece(row, n, True)
        if PREFIX:
            lo_prefix = prefix(row, n, rate, True)
            for i in range(count_chunks(lo_prefix, lo)):
                t, _ = tokens(lo_prefix, lo, i, T, True)
                s, b_ready = empty_stage(ready, empty, c, STATE_BYTES, STAGES)
                load_box(q_desc, [i_b, t, i_h, 0], b_ready, q_s.index(s))
                load_columns(do_desc, i_b, t, i_h, b_ready, do_s, s, GROUPS)
                c += 1
        for i in range(count_chunks(lo, hi)):
            t, _ = tokens(lo, hi, i, T, True)
            s, b_ready = empty_stage(ready, empty, c, 2 * STATE_BYTES, STAGES)
            load_box(q_desc, [i_b, t, i_h, 0], b_ready, q_s.index(s))
            load_box(k_desc, [i_b, t, i_h, 0], b_ready, k_s.index(s))
            load_columns(v_desc, i_b, t, i_h, b_ready, v_s, s, GROUPS)
            load_columns(do_desc, i_b, t, i_h, b_ready, do_s, s, GROUPS)
            c += 1


@jit
def _gradient(shared, g: constexpr, D: constexpr, PREFIX: constexpr, STAGES: constexpr):
    """One of both gradients of a head of 128."""
    inputs, outputs, R, states, decay, where = shared
    dk, dv, out_s = outputs
    _, published = R
    d_final_state, _, d_initial_state, _, _, _ = states
    log_decay, scale = decay
    row, B, H, i_b, i_h = where
    _, _, T, part = row
    _, _, n_first, n_last = part
    PACKED: constexpr = constexpr(row[0] is not None)

    i_head = i_h.to(gl.int64)
    rate = load_rate(log_decay, i_head)
    b_inside, b_read = read_decays(rate, scale, True)
    o_k = gl.arange(0, D, layout=gl.SliceLayout(1, ACC))
    o_v = g * BV + gl.arange(0, BV, layout=gl.SliceLayout(0, ACC))
    stride_t = H * D
    out = dv if g == 0 else dk
    place = (out + (i_b.to(gl.int64) * T * H + i_head) * D, stride_t, output_boxes(out, B, T, H, D), out_s, i_b, i_h)
    written = (inputs[0], inputs[3], inputs[4], inputs[5])

    c = 0  # chunks
    r = 0  # states that were published
    for n in range(n_first, n_last):
        start, end, i_n, lo, hi = piece(row, n, True)
        b_R = gl.zeros([D, BV], gl.float32, layout=ACC)
        b_write, whole = write_decay(rate, C, True)
        before = (written, b_write, whole, states, where, rate, n, start, lo, i_head, o_k, o_v)
        b_R, c = state_before(b_R, c, before, g, D, D, True, False, PREFIX, STAGES)
        if d_final_state is not None:
            p_R = state_pointers(d_final_state, i_n, i_head, o_k, o_v, H, D, D, False)
            b_R += gl.load(p_R) * (decay_over(rate, lo - start) / scale)
        _publish(b_R, R, r, g)

        for i in range(count_chunks(lo, hi)):
            t, m = tokens(lo, hi, i, T, True)
            if d_initial_state is not None and m < C:
                b_write, whole = write_decay(rate, m, True)
            decays = (b_inside, b_read, b_write, whole)
            b_R = _gradient_chunk(b_R, R, inputs, place, decays, c, r, t, m, g, D, PACKED, STAGES)
            c += 1
            r += 1
        # The last one was published too, and nobody reads it; but it must not be overwritten by only one of two.
        mbarrier.wait(published.index(r % 2), r // 2 & 1)
        r += 1

        if d_initial_state is not None:
            p_R = state_pointers(d_initial_state, i_n, i_head, o_k, o_v, H, D, D, False)
            if hi == end:
                gl.store(p_R, b_R * scale)
    tma.store_wait(0)


@jit
def _publish(b_R, R, r, g: constexpr):
    """In the buffer that nobody reads: who has seen the state r - 1 has read the one before."""
    R_s, published = R
    R_s.index(r % 2 * 2 + g).store(b_R.to(R_s.dtype))
    fence_async_shared()
    mbarrier.arrive(published.index(r % 2))


@jit
def _tiles(inputs, s, D: constexpr):
    """Of the chunk at s; those of v and do in halves."""
    q_s, k_s, v_s, do_s, _, _ = inputs
    t_q, t_k = q_s.index(s).reshape([C, D]), k_s.index(s).reshape([C, D])
    t_v0, t_v1 = v_s.index(2 * s).reshape([C, BV]), v_s.index(2 * s + 1).reshape([C, BV])
    t_do0, t_do1 = do_s.index(2 * s).reshape([C, BV]), do_s.index(2 * s + 1).reshape([C, BV])
    return t_q, t_k, t_v0, t_v1, t_do0, t_do1


@jit
def _gradient_chunk(
    b_R,
    R,
    inputs,
    place,
    decays,
    c,
    r,
    t,
    m,
    g: constexpr,
    D: constexpr,
    PACKED: constexpr,
    STAGES: constexpr,
):
    """The gradients of m tokens. Returns the state before them, of which a copy is then published."""
    R_s, published = R
    _, _, _, _, ready, empty = inputs
    p_out, stride_t, out_desc, out_s, i_b, i_h = place
    dtype: constexpr = R_s.dtype
    b_inside, b_read, b_write, whole = decays
    s, parity = stage(c, STAGES)
    mbarrier.wait(ready.index(s), parity)
    t_q, t_k, t_v0, t_v1, t_do0, t_do1 = _tiles(inputs, s, D)
    if PACKED and m < C:  # both warpgroups write the same
        clear_rows(t_q, m, D, True)
        clear_rows(t_do0, m, BV, True)
        clear_rows(t_do1, m, BV, True)
        fence_async_shared()

    zeros = gl.zeros([C, C], gl.float32, layout=ACC)
    if g == 0:
        b_A = warpgroup_mma(t_k, t_q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    else:
        b_A = warpgroup_mma(t_v0, t_do0.permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_A = warpgroup_mma(t_v1, t_do1.permute((1, 0)), b_A, is_async=True)
    mbarrier.wait(published.index(r % 2), r // 2 & 1)
    t_R0, t_R1 = R_s.index(r % 2 * 2), R_s.index(r % 2 * 2 + 1)
    zeros = gl.zeros([C, BV], gl.float32, layout=ACC)
    if g == 0:
        b_0 = warpgroup_mma(t_k, t_R0, zeros, use_acc=False, is_async=True)
        b_1 = warpgroup_mma(t_k, t_R1, zeros, use_acc=False, is_async=True)
    else:
        b_0 = warpgroup_mma(t_v0, t_R0.slice(0, BV).permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_1 = warpgroup_mma(t_v0, t_R0.slice(BV, BV).permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_0 = warpgroup_mma(t_v1, t_R1.slice(0, BV).permute((1, 0)), b_0, is_async=True)
        b_1 = warpgroup_mma(t_v1, t_R1.slice(BV, BV).permute((1, 0)), b_1, is_async=True)
    b_A = warpgroup_mma_wait(2 if g == 0 else 4, deps=[b_A])
    b_A = gl.convert_layout((b_A * b_inside).to(dtype), LEFT)
    b_0, b_1 = warpgroup_mma_wait(0, deps=[b_0, b_1])
    b_0 = b_0 * b_read[:, None]
    b_1 = b_1 * b_read[:, None]
    if g == 0:
        t_x0, t_x1 = t_do0, t_do1
    else:
        t_x0, t_x1 = t_q.slice(0, BV, dim=1), t_q.slice(BV, BV, dim=1)
    b_0 = warpgroup_mma(b_A, t_x0, b_0, is_async=True)
    b_1 = warpgroup_mma(b_A, t_x1, b_1, is_async=True)
    b_qT = t_q.permute((1, 0)).load(LEFT)
    b_qT = (b_qT.to(gl.float32) * b_write[None, :]).to(dtype)
    b_R = b_R * whole
    b_R = warpgroup_mma(b_qT, t_do0 if g == 0 else t_do1, b_R, is_async=True)

    b_0, b_1 = warpgroup_mma_wait(1, deps=[b_0, b_1])
    tma.store_wait(0)
    box_0, box_1 = out_s.index(2 * g), out_s.index(2 * g + 1)
    t_0, t_1 = box_0.reshape([C, BV]), box_1.reshape([C, BV])
    t_0.store(b_0.to(dtype))
    t_1.store(b_1.to(dtype))
    fence_async_shared()
    if m == C:
        store_box(out_desc, [i_b, t, i_h, 0], box_0)
        store_box(out_desc, [i_b, t, i_h, BV], box_1)
    b_R = warpgroup_mma_wait(0, deps=[b_R])
    mbarrier.arrive(empty.index(s))
    _publish(b_R, R, r + 1, g)
    if m < C:
        p_out += t.to(gl.int64) * stride_t
        store_rows(p_out, stride_t, t_0, m, True)
        store_rows(p_out + BV, stride_t, t_1, m, True)
    return b_R


@jit
def _gradients(shared, D: constexpr, PREFIX: constexpr, STAGES: constexpr):
    """Both gradients of a head of 64."""
    inputs, outputs, R, states, decay, where = shared
    dk, dv, out_s = outputs
    R_s, _ = R
    d_final_state, _, d_initial_state, _, _, _ = states
    log_decay, scale = decay
    row, B, H, i_b, i_h = where
    _, _, T, part = row
    _, _, n_first, n_last = part
    PACKED: constexpr = constexpr(row[0] is not None)
    dtype: constexpr = out_s.dtype

    i_head = i_h.to(gl.int64)
    rate = load_rate(log_decay, i_head)
    b_inside, b_read = read_decays(rate, scale, True)
    o_k = gl.arange(0, D, layout=gl.SliceLayout(1, ACC))
    o_v = gl.arange(0, D, layout=gl.SliceLayout(0, ACC))
    stride_t = H * D
    offset = (i_b.to(gl.int64) * T * H + i_head) * D
    dk_desc, dv_desc = output_boxes(dk, B, T, H, D), output_boxes(dv, B, T, H, D)
    place = (dk + offset, dk_desc, dv + offset, dv_desc, out_s, stride_t, i_b, i_h)
    t_R = R_s.index(0)
    written = (inputs[0], inputs[3], inputs[4], inputs[5])

    c = 0
    for n in range(n_first, n_last):
        start, end, i_n, lo, hi = piece(row, n, True)
        b_R = gl.zeros([D, BV], gl.float32, layout=ACC)
        b_write, whole = write_decay(rate, C, True)
        before = (written, b_write, whole, states, where, rate, n, start, lo, i_head, o_k, o_v)
        b_R, c = state_before(b_R, c, before, 0, D, D, True, False, PREFIX, STAGES)
        if d_final_state is not None:
            p_R = state_pointers(d_final_state, i_n, i_head, o_k, o_v, H, D, D, False)
            b_R += gl.load(p_R) * (decay_over(rate, lo - start) / scale)
        t_R.store(b_R.to(dtype))
        fence_async_shared()

        for i in range(count_chunks(lo, hi)):
            t, m = tokens(lo, hi, i, T, True)
            if d_initial_state is not None and m < C:
                b_write, whole = write_decay(rate, m, True)
            decays = (b_inside, b_read, b_write, whole)
            b_R = _gradients_chunk(b_R, t_R, inputs, place, decays, c, t, m, D, PACKED, STAGES)
            c += 1

        if d_initial_state is not None:
            p_R = state_pointers(d_initial_state, i_n, i_head, o_k, o_v, H, D, D, False)
            if hi == end:
                gl.store(p_R, b_R * scale)
    tma.store_wait(0)


@jit
def _gradients_chunk(
    b_R,
    t_R,
    inputs,
    place,
    decays,
    c,
    t,
    m,
    D: constexpr,
    PACKED: constexpr,
    STAGES: constexpr,
):
    """The gradients of m tokens. Returns the state before them, of which a copy is then in `t_R`."""
    q_s, k_s, v_s, do_s, ready, empty = inputs
    p_dk, dk_desc, p_dv, dv_desc, out_s, stride_t, i_b, i_h = place
    dtype: constexpr = t_R.dtype
    b_inside, b_read, b_write, whole = decays
    s, parity = stage(c, STAGES)
    mbarrier.wait(ready.index(s), parity)
    t_q, t_k = q_s.index(s).reshape([C, D]), k_s.index(s).reshape([C, D])
    t_v, t_do = v_s.index(s).reshape([C, D]), do_s.index(s).reshape([C, D])
    if PACKED and m < C:
        clear_rows(t_q, m, D, True)
        clear_rows(t_do, m, D, True)
        fence_async_shared()

    zeros = gl.zeros([C, C], gl.float32, layout=ACC)
    b_A = warpgroup_mma(t_k, t_q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    b_B = warpgroup_mma(t_v, t_do.permute((1, 0)), zeros, use_acc=False, is_async=True)
    zeros = gl.zeros([C, D], gl.float32, layout=ACC)
    b_dv = warpgroup_mma(t_k, t_R, zeros, use_acc=False, is_async=True)
    b_dk = warpgroup_mma(t_v, t_R.permute((1, 0)), zeros, use_acc=False, is_async=True)
    b_A, b_B = warpgroup_mma_wait(2, deps=[b_A, b_B])
    b_A = gl.convert_layout((b_A * b_inside).to(dtype), LEFT)
    b_B = gl.convert_layout((b_B * b_inside).to(dtype), LEFT)
    b_dv, b_dk = warpgroup_mma_wait(0, deps=[b_dv, b_dk])
    b_dv = b_dv * b_read[:, None]
    b_dk = b_dk * b_read[:, None]
    b_dv = warpgroup_mma(b_A, t_do, b_dv, is_async=True)
    b_dk = warpgroup_mma(b_B, t_q, b_dk, is_async=True)
    b_qT = t_q.permute((1, 0)).load(LEFT)
    b_qT = (b_qT.to(gl.float32) * b_write[None, :]).to(dtype)
    b_R = b_R * whole
    b_R = warpgroup_mma(b_qT, t_do, b_R, is_async=True)

    b_dv, b_dk = warpgroup_mma_wait(1, deps=[b_dv, b_dk])
    tma.store_wait(0)
    box_dv, box_dk = out_s.index(0), out_s.index(1)
    t_dv, t_dk = box_dv.reshape([C, D]), box_dk.reshape([C, D])
    t_dv.store(b_dv.to(dtype))
    t_dk.store(b_dk.to(dtype))
    fence_async_shared()
    if m == C:
        store_box(dv_desc, [i_b, t, i_h, 0], box_dv)
        store_box(dk_desc, [i_b, t, i_h, 0], box_dk)
    b_R = warpgroup_mma_wait(0, deps=[b_R])
    mbarrier.arrive(empty.index(s))
    t_R.store(b_R.to(dtype))
    fence_async_shared()
    if m < C:
        store_rows(p_dv + t.to(gl.int64) * stride_t, stride_t, t_dv, m, True)
        store_rows(p_dk + t.to(gl.int64) * stride_t, stride_t, t_dk, m, True)
    return b_R
