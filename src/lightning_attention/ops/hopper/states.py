"""States that segments leave, for Hopper GPUs; later segments start from their sums."""

from triton.language import constexpr

from ..gpu.primitives import interval_bounds, load_log_decay
from .parts import (
    ACC,
    BARRIER,
    BLOCK,
    BV,
    C,
    KeyValues,
    Operand,
    Pipeline,
    Segment,
    Shared,
    Value,
    aggregate,
    count_chunks,
    gl,
    jit,
    load_columns,
    state_block,
    tma_load,
    trigger_dependents,
    wait_for_previous,
    write_decays,
)


@aggregate
class StateArgs:
    """Arguments of the partitions: chunks from `first` to `last`. `num_foreign` tokens are of another sequence."""

    k_s: Shared
    v_s: Shared
    pipeline: Pipeline
    first: Value
    last: Value
    num_chunks: Value
    num_foreign: Value
    interval_states: Value
    i_state: Value
    log_decay: Value
    segment: Segment
    K: constexpr
    V: constexpr


@jit(do_not_specialize=["B", "T", "H", "N", "segment_length", "num_uncut"])
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
    num_uncut,
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

    Only of heads that are cut: of all but the first `num_uncut` of all batch rows.
    In reverse, which only backward needs, it runs beside the kernel of the other direction, and ends after it.
    """
    trigger_dependents()
    GROUPS: constexpr = V // BV
    dtype: constexpr = k.dtype.element_ty
    i = gl.program_id(0)
    num_cut = B * H - num_uncut
    i_s = i // num_cut
    i_bh = num_uncut + i % num_cut
    i_b, i_h = i_bh // H, i_bh % H

    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, C, 1, K], BLOCK)
    v_s = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, 1, C, 1, BV], BLOCK)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    pipeline = Pipeline(ready, empty)
    pipeline.init(GROUPS)

    head_decay = load_log_decay(log_decay, i_h)
    lo, hi, factor = interval_bounds(i_s, head_decay, cu_seqlens, N, T, segment_length, segment_length, REVERSE, False)
    gl.store(factors + i.to(gl.int64), factor)
    num_chunks = count_chunks(lo, hi)
    first = hi - num_chunks * C
    num_foreign = lo - first if cu_seqlens is not None else 0
    segment = Segment(cu_seqlens, N, T, first, hi, 0, N, B, H, i_b, i_h, num_uncut, REVERSE)
    args = StateArgs(
        k_s,
        v_s,
        pipeline,
        first,
        hi,
        num_chunks,
        num_foreign,
        interval_states,
        i.to(gl.int64),
        head_decay,
        segment,
        K,
        V,
    )
    k = Operand(k, stride_kb, stride_kt, stride_kh)
    v = Operand(v, stride_vb, stride_vt, stride_vh)
    if GROUPS == 2:
        gl.warp_specialize(
            [(_mma_partition, (args, 0)), (_mma_partition, (args, 1)), (_load_partition, (k, v, args))],
            [4, 1],
            [232, 24],
        )
    else:
        gl.warp_specialize([(_mma_partition, (args, 0)), (_load_partition, (k, v, args))], [1], [24])
    if REVERSE:
        wait_for_previous()


@jit
def _load_partition(k, v, args):
    GROUPS: constexpr = args.V // BV
    segment = args.segment
    k_desc = k.descriptor(segment, args.K, args.K)
    v_desc = v.descriptor(segment, args.V, BV)
    NUM_BYTES: constexpr = k_desc.block_type.nbytes + GROUPS * v_desc.block_type.nbytes
    for i in range(args.num_chunks):
        t, _ = segment.chunk(args.first, args.last, i)
        s, bar = args.pipeline.acquire(i, NUM_BYTES)
        tma_load(k_desc, [segment.i_b, t, segment.i_h, 0], bar, args.k_s.index(s))
        load_columns(v_desc, segment.i_b, t, segment.i_h, bar, args.v_s, s, GROUPS)


@jit
def _mma_partition(args, g: constexpr):
    """Compute the columns of warpgroup g."""
    block = state_block(args.segment.i_h.to(gl.int64), args.segment.H, g, args.K, args.V, False)
    kv = KeyValues(args.k_s, args.v_s, args.pipeline, g, args.segment.cu_seqlens is not None, args.segment.REVERSE)
    writes = write_decays(args.log_decay, C, args.segment.REVERSE)
    b_S = gl.zeros([args.K, BV], gl.float32, layout=ACC)
    b_S = kv.add_chunks(b_S, 0, args.num_chunks, args.num_foreign, writes)
    gl.store(block.at(args.interval_states, args.i_state), b_S)
