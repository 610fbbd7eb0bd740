"""Sequence kernels for Hopper GPUs, in Gluon: TMA loads tiles, warpgroups multiply them side by side.

A program scans one segment of a batch row, for one head. One warp loads chunks of C tokens, some ahead. Each of one or
two warpgroups owns 64 columns of V, in the state and in the output, and shares only the loaded tiles with the other.
The state stays in float32 registers; queries multiply a copy in shared memory, in the dtype of the inputs.

Chunks follow each other from where a scan begins, so that only the last one may be ragged, with fewer tokens than C.
TMA loads zeros from outside a batch row; keys and values of other sequences are cleared. Outputs of a ragged chunk are
stored by token: TMA would overwrite the next sequence, and stores no block that begins before a batch row.
"""

from triton.language import constexpr

from ..gpu.primitives import decay_over, load_log_decay
from .parts import (
    ACC,
    BARRIER,
    BLOCK,
    BV,
    LEFT,
    TILE,
    C,
    KeyValues,
    Operand,
    Output,
    Pipeline,
    Segment,
    Shared,
    States,
    Value,
    add_interval_states,
    aggregate,
    clear_tokens,
    count_chunks,
    fence_async_shared,
    gl,
    jit,
    load_columns,
    output_descriptor,
    program_segment,
    read_decays,
    state_block,
    tma,
    tma_load,
    trigger_dependents,
    wait_for_previous,
    warpgroup_mma,
    warpgroup_mma_wait,
    write_decays,
)


@aggregate
class ScanArgs:
    """Arguments of the partitions of a scan."""

    q_s: Shared
    k_s: Shared
    v_s: Shared
    pipeline: Pipeline
    o: Value
    o_s: Shared
    S_s: Shared
    states: States
    log_decay: Value
    scale: Value
    segment: Segment
    K: constexpr
    V: constexpr
    TRANSPOSED_STATES: constexpr
    PREFIX: constexpr
    WAITS: constexpr


@jit(do_not_specialize=["scale", "B", "T", "H", "N", "segment_length", "num_uncut", "max_reach"])
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
    final_indices,
    scale,
    B,
    T,
    H,
    N,
    segment_length,
    num_uncut,
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
    K: constexpr,
    V: constexpr,
    REVERSE: constexpr,
    TRANSPOSED_STATES: constexpr,
    PREFIX: constexpr,
    OVERLAP_PREVIOUS: constexpr,
    STAGES: constexpr,
):
    """`o = scale (λ^(i+1) q S + ((q kᵀ) ⊙ λ^(i-j)) v)`, as in `..triton.kernels.scan_kernel`.

    With OVERLAP_PREVIOUS the scan runs beside the kernel launched before it, reads none of its results, and ends after
    it. Otherwise programs of heads that are cut wait for states of segments, and then let the next kernel begin, which
    may read them too.
    """
    WAITS: constexpr = constexpr(interval_states is not None and not OVERLAP_PREVIOUS)
    if not WAITS:
        trigger_dependents()
    GROUPS: constexpr = V // BV
    dtype: constexpr = q.dtype.element_ty
    segment = program_segment(log_decay, cu_seqlens, B, N, T, H, segment_length, num_uncut, REVERSE, PREFIX)

    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, K], BLOCK)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, K], BLOCK)
    v_s = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, 1, C, 1, BV], BLOCK)
    o_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, C, 1, BV], BLOCK)
    S_s = gl.allocate_shared_memory(dtype, [GROUPS, K, BV], TILE)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    pipeline = Pipeline(ready, empty)
    pipeline.init(GROUPS)

    states = States(initial_state, interval_states, final_state, final_indices, stride_slot, segment_length, max_reach)
    args = ScanArgs(
        q_s, k_s, v_s, pipeline, o, o_s, S_s, states, log_decay, scale, segment, K, V, TRANSPOSED_STATES, PREFIX, WAITS
    )
    q = Operand(q, stride_qb, stride_qt, stride_qh)
    k = Operand(k, stride_kb, stride_kt, stride_kh)
    v = Operand(v, stride_vb, stride_vt, stride_vh)
    if GROUPS == 2:
        gl.warp_specialize(
            [(_mma_partition, (args, 0)), (_mma_partition, (args, 1)), (_load_partition, (q, k, v, args))],
            [4, 1],
            [232, 24],
        )
    else:
        gl.warp_specialize([(_mma_partition, (args, 0)), (_load_partition, (q, k, v, args))], [1], [24])
    if OVERLAP_PREVIOUS:
        wait_for_previous()


@jit
def _load_partition(q, k, v, args):
    """Load the chunks of the segment, and keys and values of those before it that the state is made of."""
    GROUPS: constexpr = args.V // BV
    segment, pipeline = args.segment, args.pipeline
    i_b, i_h = segment.i_b, segment.i_h
    q_desc = q.descriptor(segment, args.K, args.K)
    k_desc = k.descriptor(segment, args.K, args.K)
    v_desc = v.descriptor(segment, args.V, BV)
    STATE_BYTES: constexpr = k_desc.block_type.nbytes + GROUPS * v_desc.block_type.nbytes
    NUM_BYTES: constexpr = q_desc.block_type.nbytes + STATE_BYTES
    log_decay = load_log_decay(args.log_decay, i_h)
    c = 0
    for n in range(segment.n_first, segment.n_last):
        sequence = segment.sequence(n)
        if args.PREFIX:
            lo = segment.prefix(sequence, log_decay)
            for i in range(count_chunks(lo, sequence.lo)):
                t, _ = segment.chunk(lo, sequence.lo, i)
                s, bar = pipeline.acquire(c, STATE_BYTES)
                tma_load(k_desc, [i_b, t, i_h, 0], bar, args.k_s.index(s))
                load_columns(v_desc, i_b, t, i_h, bar, args.v_s, s, GROUPS)
                c += 1
        for i in range(count_chunks(sequence.lo, sequence.hi)):
            t, _ = segment.chunk(sequence.lo, sequence.hi, i)
            s, bar = pipeline.acquire(c, NUM_BYTES)
            tma_load(q_desc, [i_b, t, i_h, 0], bar, args.q_s.index(s))
            tma_load(k_desc, [i_b, t, i_h, 0], bar, args.k_s.index(s))
            load_columns(v_desc, i_b, t, i_h, bar, args.v_s, s, GROUPS)
            c += 1


@jit
def _mma_partition(args, g: constexpr):
    """Compute the columns of warpgroup g."""
    states, segment = args.states, args.segment
    REVERSE: constexpr = segment.REVERSE
    i_h = segment.i_h.to(gl.int64)
    log_decay = load_log_decay(args.log_decay, i_h)
    reads = read_decays(log_decay, args.scale, REVERSE)
    state_scale = 1.0 / args.scale if REVERSE else 1.0
    block = state_block(i_h, segment.H, g, args.K, args.V, args.TRANSPOSED_STATES)
    kv = KeyValues(args.k_s, args.v_s, args.pipeline, g, segment.cu_seqlens is not None, REVERSE)
    stride_t = segment.H * args.V
    o_desc = output_descriptor(args.o, segment, args.V)
    p_o = args.o + (segment.i_b.to(gl.int64) * segment.T * segment.H + i_h) * args.V
    t_S = args.S_s.index(g)
    output = Output(p_o, stride_t, o_desc, args.o_s.index(g), segment.i_b, segment.i_h, g * BV)
    if args.WAITS:
        if segment.is_cut():
            wait_for_previous()
        trigger_dependents()

    c = 0
    for n in range(segment.n_first, segment.n_last):
        sequence = segment.sequence(n)
        b_S = gl.zeros([args.K, BV], gl.float32, layout=ACC)
        writes = write_decays(log_decay, C, REVERSE)
        if args.PREFIX:
            b_S, c = kv.add_prefix(b_S, c, segment, sequence, log_decay, writes)
        if states.interval is not None:
            b_S = add_interval_states(b_S, states, block, segment, sequence, log_decay)
        if states.initial is not None:
            p_S = block.pointers(states.initial, sequence.index)
            b_S += gl.load(p_S) * (decay_over(log_decay, sequence.lo - sequence.start) * state_scale)
        t_S.store(b_S.to(t_S.dtype))
        fence_async_shared()

        for i in range(count_chunks(sequence.lo, sequence.hi)):
            t, m = segment.chunk(sequence.lo, sequence.hi, i)
            if states.final is not None and m < C:
                writes = write_decays(log_decay, m, REVERSE)
            b_S = _scan_chunk(b_S, t_S, args.q_s, kv, output, reads, writes, c, t, m)
            c += 1

        if states.final is not None:
            if states.stride_slot is None:
                p_S = block.pointers(states.final, sequence.index)
                if sequence.hi == sequence.end:
                    gl.store(p_S, b_S / state_scale)
            else:
                i_slot = sequence.index.to(gl.int64)
                if states.final_indices is not None:
                    i_slot = gl.load(states.final_indices + i_slot).to(gl.int64)
                p_S = block.at(states.final + i_slot * states.stride_slot, i_h)
                if (sequence.hi == sequence.end) & (i_slot >= 0):
                    gl.store(p_S, b_S.to(states.final.dtype.element_ty))
    tma.store_wait(0)


@jit
def _scan_chunk(b_S, t_S, q_s, kv, output, reads, writes, c, t, m):
    """Compute the outputs of m tokens. Returns the state after them, and leaves a copy in `t_S`."""
    K: constexpr = t_S.shape[0]
    dtype: constexpr = t_S.dtype
    s = kv.pipeline.wait(c)
    t_q = q_s.index(s).reshape([C, K])
    t_k, t_v = kv.tiles(s)
    if kv.PACKED and m < C:  # warpgroups that share a tile write the same
        clear_tokens(t_k, m, kv.REVERSE)
        clear_tokens(t_v, m, kv.REVERSE)
        fence_async_shared()

    zeros = gl.zeros([C, C], gl.float32, layout=ACC)
    b_P = warpgroup_mma(t_q, t_k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    b_o = warpgroup_mma(t_q, t_S, gl.zeros([C, BV], gl.float32, layout=ACC), use_acc=False, is_async=True)
    b_kT = t_k.permute((1, 0)).load(LEFT)
    b_kT = (b_kT.to(gl.float32) * writes.key[None, :]).to(dtype)
    b_P = warpgroup_mma_wait(1, deps=[b_P])
    b_P = gl.convert_layout((b_P * reads.inside).to(dtype), LEFT)
    b_o = warpgroup_mma_wait(0, deps=[b_o])
    b_o = b_o * reads.state[:, None]
    b_S = b_S * writes.state
    b_o = warpgroup_mma(b_P, t_v, b_o, is_async=True)
    b_S = warpgroup_mma(b_kT, t_v, b_S, is_async=True)

    b_o = warpgroup_mma_wait(1, deps=[b_o])
    t_o = output.tile()
    tma.store_wait(0)
    t_o.store(b_o.to(dtype))
    fence_async_shared()
    if m == C:
        output.store(t)
    b_S = warpgroup_mma_wait(0, deps=[b_S])
    kv.pipeline.release(s)
    t_S.store(b_S.to(dtype))
    fence_async_shared()
    if m < C:
        output.store_tokens(t, m, kv.REVERSE)
    return b_S
