"""The kernels of sequences for Hopper GPUs, in Gluon: TMA brings tiles, warpgroups multiply them side by side.

A program has one head of a row and one segment of it. One warp fetches chunks of C tokens, some ahead; each of one or
two warpgroups owns 64 columns of V (of the state, and of the output), and shares nothing with the other but the tiles
that come in. The state stays in float32 in registers; what multiplies queries is a copy of it in shared memory, in the
dtype of the inputs.

Chunks follow each other from where a scan begins, so that only the last one may be ragged: of fewer tokens than C. What
TMA brings from outside of a row is zero; keys and values of other sequences in the row are cleared. Outputs of a ragged
chunk are stored by rows: TMA would overwrite those of the next sequence, and stores no box that begins before a row.

Names: as for the portable kernels, whose helpers find sequences and decays. `_s` is shared memory, `t_` a tile of it.
"""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language
from triton.experimental.gluon.language.nvidia import hopper
from triton.language import constexpr

from ..triton.kernels import _reach, _sequence, _sequences_in, decay_over, load_rate

# A type checker knows nothing of what a compiler does with these.
jit: Any = gluon.jit
gl: Any = language
mbarrier: Any = hopper.mbarrier
tma: Any = hopper.tma
fence_async_shared: Any = hopper.fence_async_shared
warpgroup_mma: Any = hopper.warpgroup_mma
warpgroup_mma_wait: Any = hopper.warpgroup_mma_wait
# Their names since Triton 3.9, and before.
load_box: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_box: Any = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

C: Any = constexpr(64)
# Columns of a state or an output that a warpgroup owns.
BV: Any = constexpr(64)

# Where products are accumulated, and their left operand where it comes from registers.
ACC: Any = constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LEFT: Any = constexpr(gl.DotOperandLayout(0, ACC.value, 2))
# Tiles in shared memory, and as TMA brings them from `[B, T, H, D]`.
TILE: Any = constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
BOX: Any = constexpr(gl.NVMMASharedLayout(128, 16, rank=4))
BARRIER: Any = constexpr(mbarrier.MBarrierLayout())


@jit(do_not_specialize=["scale", "B", "T", "H", "N", "segment_length", "interval"])
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
    interval,
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
    STAGES: constexpr,
):
    """`o = scale (λ^(i+1) q S + ((q kᵀ) ⊙ λ^(i-j)) v)`, as in `..triton.kernels.scan_kernel`."""
    GROUPS: constexpr = V // BV
    dtype: constexpr = q.dtype.element_ty
    i_h, i_b, num_intervals, part = _program(H, cu_seqlens, N, T, segment_length, interval, REVERSE)
    row = (cu_seqlens, N, T, part)

    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, K], BOX)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, K], BOX)
    v_s = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, 1, C, 1, BV], BOX)
    o_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, C, 1, BV], BOX)
    S_s = gl.allocate_shared_memory(dtype, [GROUPS, K, BV], TILE)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    _init(ready, empty, GROUPS, STAGES)

    inputs = (q_s, k_s, v_s, ready, empty)
    states = (initial_state, interval_states, final_state, interval, num_intervals)
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
                (_scan, (shared, constexpr(0), K, V, REVERSE, TRANSPOSED_STATES, PREFIX, STAGES)),
                (_scan, (shared, constexpr(1), K, V, REVERSE, TRANSPOSED_STATES, PREFIX, STAGES)),
                (_fetch, (tensors, inputs, log_decay, where, K, V, REVERSE, PREFIX, STAGES)),
            ],
            [4, 1],
            [232, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_scan, (shared, constexpr(0), K, V, REVERSE, TRANSPOSED_STATES, PREFIX, STAGES)),
                (_fetch, (tensors, inputs, log_decay, where, K, V, REVERSE, PREFIX, STAGES)),
            ],
            [1],
            [24],
        )


@jit
def _program(H, cu_seqlens, N, T, segment_length, interval, REVERSE: constexpr):
    """Head and row of this program, how many intervals a row has, and what part of the row this is."""
    num_segments = gl.maximum(1, gl.cdiv(T, segment_length))
    i = gl.program_id(0)
    i_h = i % H
    i = i // H
    i_s, i_b = i % num_segments, i // num_segments
    first = i_s * segment_length
    last = gl.minimum(first + segment_length, T)
    if cu_seqlens is None:
        n_first, n_last = i_b, i_b + 1
    else:
        n_first, n_last = _sequences_in(cu_seqlens, first, last, N, T, REVERSE)
    num_intervals = (num_segments - 1) * (segment_length // interval)
    return i_h, i_b, num_intervals, (first, last, n_first, n_last)


@jit
def _piece(row, n, REVERSE: constexpr):
    """Of sequence n start, end and the index of its states; and what of it is in this part of the row, `lo` to `hi`."""
    cu_seqlens, N, T, part = row
    first, last, _, _ = part
    start, end, i_n = _sequence(cu_seqlens, n, N, T, REVERSE)
    return start, end, i_n, gl.maximum(start, first), gl.minimum(end, last)


@jit
def _num_chunks(lo, hi):
    return gl.cdiv(gl.maximum(hi - lo, 0), C)


@jit
def _tokens(lo, hi, i, T, REVERSE: constexpr):
    """First row of chunk i of a piece, and how many tokens it has: in reverse, in its last rows."""
    t = T - lo - (i + 1) * C if REVERSE else lo + i * C
    return t, gl.minimum(hi - lo - i * C, C)


@jit
def _prefix(row, n, rate, REVERSE: constexpr):
    """Where to begin for the state before this part of the row: a whole number of chunks before what is in it of n."""
    _, _, T, part = row
    first, _, _, _ = part
    start, _, _, lo, _ = _piece(row, n, REVERSE)
    return lo - _num_chunks(gl.maximum(start, first - _reach(rate, T)), first) * C


@jit
def _init(ready, empty, GROUPS: constexpr, STAGES: constexpr):
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(empty.index(s), count=GROUPS)
    fence_async_shared()


@jit
def _stage(c, STAGES: constexpr):
    """Where chunk c lies, and the parity of the phase of the barriers there."""
    return c % STAGES, c // STAGES & 1


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
    q_desc = _input_boxes(of_q, B, T, H, K, K)
    k_desc = _input_boxes(of_k, B, T, H, K, K)
    v_desc = _input_boxes(of_v, B, T, H, V, BV)
    STATE_BYTES: constexpr = k_desc.block_type.nbytes + GROUPS * v_desc.block_type.nbytes
    NUM_BYTES: constexpr = q_desc.block_type.nbytes + STATE_BYTES
    rate = load_rate(log_decay, i_h)
    c = 0
    for n in range(n_first, n_last):
        _, _, _, lo, hi = _piece(row, n, REVERSE)
        if PREFIX:
            lo_prefix = _prefix(row, n, rate, REVERSE)
            for i in range(_num_chunks(lo_prefix, lo)):
                t, _ = _tokens(lo_prefix, lo, i, T, REVERSE)
                s, b_ready = _empty_stage(ready, empty, c, STATE_BYTES, STAGES)
                load_box(k_desc, [i_b, t, i_h, 0], b_ready, k_s.index(s))
                _load_columns(v_desc, i_b, t, i_h, b_ready, v_s, s, GROUPS)
                c += 1
        for i in range(_num_chunks(lo, hi)):
            t, _ = _tokens(lo, hi, i, T, REVERSE)
            s, b_ready = _empty_stage(ready, empty, c, NUM_BYTES, STAGES)
            load_box(q_desc, [i_b, t, i_h, 0], b_ready, q_s.index(s))
            load_box(k_desc, [i_b, t, i_h, 0], b_ready, k_s.index(s))
            _load_columns(v_desc, i_b, t, i_h, b_ready, v_s, s, GROUPS)
            c += 1


@jit
def _input_boxes(tensor, B, T, H, D: constexpr, BD: constexpr):
    """The descriptor of an input: chunks of tokens of a head, BD columns of them.

    Who uses a descriptor makes it: it takes a microsecond, in which the other partitions go on.
    """
    x, stride_b, stride_t, stride_h = tensor
    return tma.make_tensor_descriptor(x, [B, T, H, D], [stride_b, stride_t, stride_h, 1], [1, C, 1, BD], BOX)


@jit
def _output_boxes(o, B, T, H, D: constexpr):
    """The descriptor of an output, which is contiguous."""
    stride_t = H.to(gl.int64) * D
    return _input_boxes((o, T * stride_t, stride_t, D), B, T, H, D, BV)


@jit
def _empty_stage(ready, empty, c, num_bytes: constexpr, STAGES: constexpr):
    """Where chunk c goes, once what lay there has been read, and the barrier that then waits for its bytes."""
    s, parity = _stage(c, STAGES)
    mbarrier.wait(empty.index(s), parity ^ 1)
    mbarrier.expect(ready.index(s), num_bytes)
    return s, ready.index(s)


@jit
def _load_columns(desc, i_b, t, i_h, b_ready, x_s, s, GROUPS: constexpr):
    """Of values or output gradients what each warpgroup needs."""
    for g in gl.static_range(GROUPS):
        load_box(desc, [i_b, t, i_h, g * BV], b_ready, x_s.index(GROUPS * s + g))


@jit
def _scan(
    shared,
    g: constexpr,
    K: constexpr,
    V: constexpr,
    REVERSE: constexpr,
    TRANSPOSED_STATES: constexpr,
    PREFIX: constexpr,
    STAGES: constexpr,
):
    """A warpgroup's columns."""
    GROUPS: constexpr = V // BV
    inputs, outputs, states, decay, where = shared
    o, o_s, S_s = outputs
    _, _, final_state, _, _ = states
    log_decay, scale = decay
    row, B, H, i_b, i_h = where
    _, _, T, part = row
    _, _, n_first, n_last = part
    PACKED: constexpr = constexpr(row[0] is not None)
    dtype: constexpr = o_s.dtype

    i_head = i_h.to(gl.int64)
    column: constexpr = g * BV
    rate = load_rate(log_decay, i_head)
    b_inside, b_read, copy_scale = _decays(rate, scale, dtype, REVERSE)
    o_k = gl.arange(0, K, layout=gl.SliceLayout(1, ACC))
    o_v = column + gl.arange(0, BV, layout=gl.SliceLayout(0, ACC))
    stride_ot = H * V
    o_desc = _output_boxes(o, B, T, H, V)
    p_o = o + (i_b.to(gl.int64) * T * H + i_head) * V + column
    t_S = S_s.index(g)
    place = (p_o, stride_ot, o_desc, o_s.index(g), i_b, i_h, column)
    written = inputs[1:]

    c = 0
    for n in range(n_first, n_last):
        _, end, i_n, lo, hi = _piece(row, n, REVERSE)
        b_write, whole = _write_decay(rate, C, REVERSE)
        b_S, c = _state_before(
            c,
            written,
            b_write,
            whole,
            states,
            decay,
            where,
            n,
            o_k,
            o_v,
            g,
            K,
            V,
            REVERSE,
            TRANSPOSED_STATES,
            PREFIX,
            STAGES,
        )
        t_S.store((b_S * copy_scale).to(dtype))
        fence_async_shared()

        for i in range(_num_chunks(lo, hi)):
            t, m = _tokens(lo, hi, i, T, REVERSE)
            if final_state is not None and m < C:
                b_write, whole = _write_decay(rate, m, REVERSE)
            decays = (b_inside, b_read, b_write, whole)
            b_S = _chunk(b_S, t_S, inputs, place, decays, copy_scale, c, t, m, g, GROUPS, K, REVERSE, PACKED, STAGES)
            c += 1

        if final_state is not None:
            p_S = _state_pointers(final_state, i_n, i_head, o_k, o_v, H, K, V, TRANSPOSED_STATES)
            if hi == end:
                gl.store(p_S, b_S * scale if REVERSE else b_S)
    tma.store_wait(0)


@jit
def _state_before(
    c,
    written,
    b_write,
    whole,
    states,
    decay,
    where,
    n,
    o_k,
    o_v,
    g: constexpr,
    K: constexpr,
    V: constexpr,
    REVERSE: constexpr,
    TRANSPOSED: constexpr,
    PREFIX: constexpr,
    STAGES: constexpr,
):
    """The state of sequence n before this part of the row, and the chunk that comes next: with PREFIX some made it."""
    initial_state, interval_states, _, interval, num_intervals = states
    log_decay, scale = decay
    row, _, H, i_b, i_h = where
    cu_seqlens, _, T, part = row
    first, _, _, _ = part
    rate = load_rate(log_decay, i_h)
    start, _, i_n, lo, _ = _piece(row, n, REVERSE)
    b_S = gl.zeros([K, BV], gl.float32, layout=ACC)
    if PREFIX:
        PACKED: constexpr = constexpr(cu_seqlens is not None)
        lo_prefix = _prefix(row, n, rate, REVERSE)
        num_chunks, num_others = _num_chunks(lo_prefix, lo), gl.maximum(start - lo_prefix, 0)
        b_S = _prefix_state(
            b_S, written, b_write, whole, c, num_chunks, num_others, g, V // BV, K, REVERSE, PACKED, STAGES
        )
        c += num_chunks
    if interval_states is not None:
        for j in range(gl.maximum(start, first - _reach(rate, T)) // interval, first // interval):
            p_S = _state_pointers(interval_states, i_b * num_intervals + j, i_h, o_k, o_v, H, K, V, TRANSPOSED)
            b_S = b_S * decay_over(rate, interval) + gl.load(p_S)
    if initial_state is not None:
        p_S = _state_pointers(initial_state, i_n, i_h, o_k, o_v, H, K, V, TRANSPOSED)
        so_far = decay_over(rate, lo - start)
        b_S += gl.load(p_S) * (so_far / scale if REVERSE else so_far)
    return b_S, c


@jit
def _prefix_state(
    b_S,
    inputs,
    b_write,
    whole,
    c,
    num_chunks,
    num_others,
    g: constexpr,
    GROUPS: constexpr,
    K: constexpr,
    REVERSE: constexpr,
    PACKED: constexpr,
    STAGES: constexpr,
):
    """The state after chunks c to `c + num_chunks` of keys and values, or of queries and output gradients."""
    x_s, y_s, ready, empty = inputs
    dtype: constexpr = x_s.dtype
    for i in range(num_chunks):
        s, parity = _stage(c + i, STAGES)
        mbarrier.wait(ready.index(s), parity)
        t_x = x_s.index(s).reshape([C, K])
        t_y = y_s.index(GROUPS * s + g).reshape([C, BV])
        if PACKED and (i == 0) & (num_others > 0):
            _clear_rows(t_x, C - num_others, K, not REVERSE)
            _clear_rows(t_y, C - num_others, BV, not REVERSE)
            fence_async_shared()
        b_xT = t_x.permute((1, 0)).load(LEFT)
        b_xT = (b_xT.to(gl.float32) * b_write[None, :]).to(dtype)
        b_S = warpgroup_mma(b_xT, t_y, b_S * whole, is_async=True)
        b_S = warpgroup_mma_wait(0, deps=[b_S])
        mbarrier.arrive(empty.index(s))
    return b_S


@jit
def _decays(rate, scale, dtype: constexpr, REVERSE: constexpr):
    """Of what a chunk reads: of itself, and of the state; and what the copy of the state is multiplied by.

    In float16 the scale goes with the state, whose range a long sum may leave, where its output does not.
    """
    copy_scale = scale if dtype == gl.float16 else 1.0
    read_scale = 1.0 if dtype == gl.float16 else scale
    return _inside(rate, scale, REVERSE), _read_decay(rate, REVERSE) * read_scale, copy_scale


@jit
def _inside(rate, scale, REVERSE: constexpr):
    """`scale λ^(i-j)` from key j, in columns, to query i, in rows, where it is not later."""
    o_i = gl.arange(0, C, layout=gl.SliceLayout(1, ACC))
    o_j = gl.arange(0, C, layout=gl.SliceLayout(0, ACC))
    distance = o_j[None, :] - o_i[:, None] if REVERSE else o_i[:, None] - o_j[None, :]
    return gl.where(distance >= 0, decay_over(rate, distance) * scale, 0.0)


@jit
def _read_decay(rate, REVERSE: constexpr):
    """Of the state before a chunk, or in reverse after it, where row i reads it."""
    o_i = gl.arange(0, C, layout=gl.SliceLayout(1, ACC))
    return decay_over(rate, C - 1 - o_i if REVERSE else o_i + 1)


@jit
def _write_decay(rate, m, REVERSE: constexpr):
    """Of what row j of a chunk of m tokens writes, and of the state, to where the chunk ends."""
    o_j = gl.arange(0, C, layout=gl.SliceLayout(0, LEFT))
    return decay_over(rate, o_j + 1 - (C - m) if REVERSE else m - 1 - o_j), decay_over(rate, m)


@jit
def _state_pointers(p, i_n, i_h, o_k, o_v, H, K: constexpr, V: constexpr, TRANSPOSED: constexpr):
    """Of a state `[K, V]`, or `[V, K]` where it is transposed, in a block `[K, BV]`."""
    p += (i_n.to(gl.int64) * H + i_h) * (K * V)
    return p + (o_v[None, :] * K + o_k[:, None] if TRANSPOSED else o_k[:, None] * V + o_v[None, :])


@jit
def _is_token(m, layout: constexpr, REVERSE: constexpr):
    """Which rows of a chunk hold its m tokens, in a column."""
    o_c = gl.arange(0, C, layout=gl.SliceLayout(1, layout))
    return (o_c >= C - m if REVERSE else o_c < m)[:, None]


@jit
def _clear_rows(t_x, m, D: constexpr, REVERSE: constexpr):
    """All but m tokens."""
    layout: constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    b_x = t_x.load(layout)
    t_x.store(gl.where(_is_token(m, layout, REVERSE), b_x, gl.zeros_like(b_x)))


@jit
def _store_rows(p, stride, t_x, m, REVERSE: constexpr):
    """m tokens of a tile of an output."""
    layout: constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    o_c = gl.arange(0, C, layout=gl.SliceLayout(1, layout))
    o_d = gl.arange(0, BV, layout=gl.SliceLayout(0, layout))
    gl.store(p + o_c[:, None] * stride + o_d[None, :], t_x.load(layout), mask=_is_token(m, layout, REVERSE))


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
    copy_scale,
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
    s, parity = _stage(c, STAGES)
    mbarrier.wait(ready.index(s), parity)
    t_q, t_k, t_v = _tiles(inputs, s, g, GROUPS, K)
    if PACKED and m < C:  # of a tile that warpgroups share both write the same
        _clear_rows(t_k, m, K, REVERSE)
        _clear_rows(t_v, m, BV, REVERSE)
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
    t_S.store((b_S * copy_scale).to(dtype))
    fence_async_shared()
    if m < C:
        _store_rows(p_o + t.to(gl.int64) * stride_ot, stride_ot, t_o, m, REVERSE)
    return b_S
