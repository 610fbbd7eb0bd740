"""Gradients of keys and values for Hopper GPUs: two scans in reverse that share what they read, and the state R.

In the terms of `kernels.py`, and with the state `R = Σ_i λ^(i-n) q_i do_iᵀ` of the tokens i after a chunk of n,

    dv = scale (((k qᵀ) ⊙ λ^(i-j)) do + λ^(n-1-j) k R)        dk = scale (((v doᵀ) ⊙ λ^(i-j)) q + λ^(n-1-j) v Rᵀ)

For heads of 128 one warpgroup computes dv, the other dk; for heads of 64 a single warpgroup computes both.
"""

from triton.language import constexpr

from ..gpu.primitives import decay_over, load_log_decay
from .gradient_chunks import Copies, chunk_64, chunk_128
from .parts import (
    ACC,
    BARRIER,
    BLOCK,
    BV,
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
    count_chunks,
    gl,
    jit,
    load_columns,
    mbarrier,
    output_descriptor,
    program_segment,
    read_decays,
    state_block,
    tma,
    tma_load,
    wait_for_previous,
    write_decays,
)


@aggregate
class GradientArgs:
    """Arguments of the partitions; `states` are those of R."""

    q_s: Shared
    k_s: Shared
    v_s: Shared
    do_s: Shared
    pipeline: Pipeline
    dk: Value
    dv: Value
    out_s: Shared
    R_s: Shared
    published: Shared | constexpr
    states: States
    log_decay: Value
    scale: Value
    segment: Segment
    D: constexpr
    PREFIX: constexpr


@jit(do_not_specialize=["scale", "B", "T", "H", "N", "segment_length", "num_uncut", "max_reach"])
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
    stride_dob,
    stride_dot,
    stride_doh,
    D: constexpr,
    PREFIX: constexpr,
    STAGES: constexpr,
):
    """dk and dv, where K = V = D. Runs beside the kernel launched before it, and reads none of its results."""
    GROUPS: constexpr = D // BV
    dtype: constexpr = q.dtype.element_ty
    segment = program_segment(log_decay, cu_seqlens, B, N, T, H, segment_length, num_uncut, True, PREFIX)

    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, D], BLOCK)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, D], BLOCK)
    v_s = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, 1, C, 1, BV], BLOCK)
    do_s = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, 1, C, 1, BV], BLOCK)
    out_s = gl.allocate_shared_memory(dtype, [2 * GROUPS, 1, C, 1, BV], BLOCK)
    R_s = gl.allocate_shared_memory(dtype, [GROUPS * GROUPS, D, BV], TILE)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    published = None
    if GROUPS == 2:
        published = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
        for b in gl.static_range(2):
            mbarrier.init(published.index(b), count=2)
    pipeline = Pipeline(ready, empty)
    pipeline.init(GROUPS)

    states = States(d_final_state, interval_states, d_initial_state, None, None, segment_length, max_reach)
    args = GradientArgs(
        q_s, k_s, v_s, do_s, pipeline, dk, dv, out_s, R_s, published, states, log_decay, scale, segment, D, PREFIX
    )
    q = Operand(q, stride_qb, stride_qt, stride_qh)
    k = Operand(k, stride_kb, stride_kt, stride_kh)
    v = Operand(v, stride_vb, stride_vt, stride_vh)
    do = Operand(do, stride_dob, stride_dot, stride_doh)
    if GROUPS == 2:
        gl.warp_specialize(
            [(_mma_partition, (args, 0)), (_mma_partition, (args, 1)), (_load_partition, (q, k, v, do, args))],
            [4, 1],
            [232, 24],
        )
    else:
        gl.warp_specialize([(_mma_partition, (args, 0)), (_load_partition, (q, k, v, do, args))], [1], [24])
    wait_for_previous()


@jit
def _load_partition(q, k, v, do, args):
    """Load the chunks of the segment, and queries and output gradients of those before it that R is made of."""
    GROUPS: constexpr = args.D // BV
    segment, pipeline = args.segment, args.pipeline
    i_b, i_h = segment.i_b, segment.i_h
    q_desc = q.descriptor(segment, args.D, args.D)
    k_desc = k.descriptor(segment, args.D, args.D)
    v_desc = v.descriptor(segment, args.D, BV)
    do_desc = do.descriptor(segment, args.D, BV)
    STATE_BYTES: constexpr = q_desc.block_type.nbytes + GROUPS * do_desc.block_type.nbytes
    log_decay = load_log_decay(args.log_decay, i_h)
    c = 0
    for n in range(segment.n_first, segment.n_last):
        sequence = segment.sequence(n)
        if args.PREFIX:
            lo = segment.prefix(sequence, log_decay)
            for i in range(count_chunks(lo, sequence.lo)):
                t, _ = segment.chunk(lo, sequence.lo, i)
                s, bar = pipeline.acquire(c, STATE_BYTES)
                tma_load(q_desc, [i_b, t, i_h, 0], bar, args.q_s.index(s))
                load_columns(do_desc, i_b, t, i_h, bar, args.do_s, s, GROUPS)
                c += 1
        for i in range(count_chunks(sequence.lo, sequence.hi)):
            t, _ = segment.chunk(sequence.lo, sequence.hi, i)
            s, bar = pipeline.acquire(c, 2 * STATE_BYTES)
            tma_load(q_desc, [i_b, t, i_h, 0], bar, args.q_s.index(s))
            tma_load(k_desc, [i_b, t, i_h, 0], bar, args.k_s.index(s))
            load_columns(v_desc, i_b, t, i_h, bar, args.v_s, s, GROUPS)
            load_columns(do_desc, i_b, t, i_h, bar, args.do_s, s, GROUPS)
            c += 1


@jit
def _mma_partition(args, g: constexpr):
    """Compute the gradients of warpgroup g."""
    states, segment = args.states, args.segment
    i_h = segment.i_h.to(gl.int64)
    log_decay = load_log_decay(args.log_decay, i_h)
    reads = read_decays(log_decay, args.scale, True)
    block = state_block(i_h, segment.H, g, args.D, args.D, False)
    kv = KeyValues(args.q_s, args.do_s, args.pipeline, g, segment.cu_seqlens is not None, True)
    copies = Copies(args.R_s, args.published, args.D)
    stride_t = segment.H * args.D
    offset = (segment.i_b.to(gl.int64) * segment.T * segment.H + i_h) * args.D
    if args.D == 128:
        out = args.dv if g == 0 else args.dk
        p_out = out + offset
        desc = output_descriptor(out, segment, args.D)
        output_0 = Output(p_out, stride_t, desc, args.out_s.index(2 * g), segment.i_b, segment.i_h, 0)
        output_1 = Output(p_out, stride_t, desc, args.out_s.index(2 * g + 1), segment.i_b, segment.i_h, BV)
    else:
        dk_desc, dv_desc = output_descriptor(args.dk, segment, args.D), output_descriptor(args.dv, segment, args.D)
        output_1 = Output(args.dk + offset, stride_t, dk_desc, args.out_s.index(1), segment.i_b, segment.i_h, 0)
        output_0 = Output(args.dv + offset, stride_t, dv_desc, args.out_s.index(0), segment.i_b, segment.i_h, 0)

    c = 0  # chunks
    r = 0  # copies of R
    for n in range(segment.n_first, segment.n_last):
        sequence = segment.sequence(n)
        b_R = gl.zeros([args.D, BV], gl.float32, layout=ACC)
        writes = write_decays(log_decay, C, True)
        if args.PREFIX:
            b_R, c = kv.add_prefix(b_R, c, segment, sequence, log_decay, writes)
        if states.interval is not None:
            b_R = add_interval_states(b_R, states, block, segment, sequence, log_decay)
        if states.initial is not None:
            p_R = block.pointers(states.initial, sequence.index)
            b_R += gl.load(p_R) * (decay_over(log_decay, sequence.lo - sequence.start) / args.scale)
        copies.publish(b_R, r, g)

        for i in range(count_chunks(sequence.lo, sequence.hi)):
            t, m = segment.chunk(sequence.lo, sequence.hi, i)
            if states.final is not None and m < C:
                writes = write_decays(log_decay, m, True)
            if args.D == 128:
                b_R = chunk_128(b_R, copies, args, kv, output_0, output_1, reads, writes, c, r, t, m, g)
            else:
                b_R = chunk_64(b_R, copies, args, kv, output_0, output_1, reads, writes, c, r, t, m, g)
            c += 1
            r += 1
        # Nobody reads the last copy; but neither warpgroup may overwrite it before both have published.
        copies.wait(r)
        r += 1

        if states.final is not None:
            p_R = block.pointers(states.final, sequence.index)
            if sequence.hi == sequence.end:
                gl.store(p_R, b_R * args.scale)
    tma.store_wait(0)
