"""What the kernels for Hopper are made of: layouts of tiles, parts of a row, barriers, descriptors, decays and states.

`_s` is shared memory, `t_` a tile of it; the rest is named as in the portable kernels.
"""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language
from triton.experimental.gluon.language.nvidia import hopper
from triton.language import constexpr
from triton.language.extra import cuda

from ..gpu.primitives import decay_over, sequences_in
from ..gpu.primitives import load_log_decay as load_rate
from ..gpu.primitives import memory_length as reach_of
from ..gpu.primitives import sequence_bounds as sequence_of
from . import config

# A type checker knows nothing of what a compiler does with these.
jit: Any = gluon.jit
gl: Any = language
mbarrier: Any = hopper.mbarrier
tma: Any = hopper.tma
fence_async_shared: Any = hopper.fence_async_shared
warpgroup_mma: Any = hopper.warpgroup_mma
warpgroup_mma_wait: Any = hopper.warpgroup_mma_wait
# Programmatic dependent launch: a kernel lets the next one begin, and that waits for it.
let_next_begin: Any = cuda.gdc_launch_dependents
wait_for_previous: Any = cuda.gdc_wait
# Their names since Triton 3.9, and before.
load_box: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_box: Any = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

C: Any = constexpr(config.C)
# Columns of a state or an output that a warpgroup owns.
BV: Any = constexpr(64)
STATE_ALONE: Any = constexpr(config.STATE_ALONE)

# Where products are accumulated, and their left operand where it comes from registers.
ACC: Any = constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LEFT: Any = constexpr(gl.DotOperandLayout(0, ACC.value, 2))
# Tiles in shared memory, and as TMA brings them from `[B, T, H, D]`.
TILE: Any = constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
BOX: Any = constexpr(gl.NVMMASharedLayout(128, 16, rank=4))
BARRIER: Any = constexpr(mbarrier.MBarrierLayout())


@jit
def program(log_decay, H, cu_seqlens, N, T, segment_length, REVERSE: constexpr, PREFIX: constexpr):
    """Head and row of this program, and what part of the row this is.

    With PREFIX the first of two segments takes as long as the second with all that its head remembers of the first.
    """
    num_segments = gl.maximum(1, gl.cdiv(T, segment_length))
    i = gl.program_id(0)
    i_h = i % H
    i = i // H
    i_s, i_b = i % num_segments, i // num_segments
    if PREFIX:
        remembered = reach_of(load_rate(log_decay, i_h), T, False).to(gl.float32) * STATE_ALONE
        segment_length = gl.minimum(segment_length, gl.cdiv(T + remembered.to(gl.int32), 2 * C) * C)
    first = i_s * segment_length
    last = gl.minimum(first + segment_length, T)
    if cu_seqlens is None:
        n_first, n_last = i_b, i_b + 1
    else:
        n_first, n_last = sequences_in(cu_seqlens, first, last, N, T, REVERSE)
    return i_h, i_b, (first, last, n_first, n_last)


@jit
def count_states(T, segment_length):
    """Those of a row: nothing follows its last segment."""
    return gl.cdiv(T, segment_length) - 1


@jit
def piece(row, n, REVERSE: constexpr):
    """Of sequence n start, end and the index of its states; and what of it is in this part of the row, `lo` to `hi`."""
    cu_seqlens, N, T, part = row
    first, last, _, _ = part
    start, end, i_n = sequence_of(cu_seqlens, n, N, T, REVERSE)
    return start, end, i_n, gl.maximum(start, first), gl.minimum(end, last)


@jit
def count_chunks(lo, hi):
    return gl.cdiv(gl.maximum(hi - lo, 0), C)


@jit
def tokens(lo, hi, i, T, REVERSE: constexpr):
    """First row of chunk i of a piece, and how many tokens it has: in reverse, in its last rows."""
    t = T - lo - (i + 1) * C if REVERSE else lo + i * C
    return t, gl.minimum(hi - lo - i * C, C)


@jit
def prefix(row, n, rate, REVERSE: constexpr):
    """Where to begin for the state before this part of the row: a whole number of chunks before what is in it of n."""
    _, _, T, part = row
    first, _, _, _ = part
    start, _, _, lo, _ = piece(row, n, REVERSE)
    return lo - count_chunks(gl.maximum(start, first - reach_of(rate, T, False)), first) * C


@jit
def init_barriers(ready, empty, GROUPS: constexpr, STAGES: constexpr):
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(empty.index(s), count=GROUPS)
    fence_async_shared()


@jit
def stage(c, STAGES: constexpr):
    """Where chunk c lies, and the parity of the phase of the barriers there."""
    return c % STAGES, c // STAGES & 1


@jit
def input_boxes(tensor, B, T, H, D: constexpr, BD: constexpr):
    """The descriptor of an input: chunks of tokens of a head, BD columns of them.

    Who uses a descriptor makes it: that takes time, in which the other partitions go on.
    """
    x, stride_b, stride_t, stride_h = tensor
    return tma.make_tensor_descriptor(x, [B, T, H, D], [stride_b, stride_t, stride_h, 1], [1, C, 1, BD], BOX)


@jit
def output_boxes(o, B, T, H, D: constexpr):
    """The descriptor of an output, which is contiguous."""
    stride_t = H.to(gl.int64) * D
    return input_boxes((o, T * stride_t, stride_t, D), B, T, H, D, BV)


@jit
def empty_stage(ready, empty, c, num_bytes: constexpr, STAGES: constexpr):
    """Where chunk c goes, once what lay there has been read, and the barrier that then waits for its bytes."""
    s, parity = stage(c, STAGES)
    mbarrier.wait(empty.index(s), parity ^ 1)
    mbarrier.expect(ready.index(s), num_bytes)
    return s, ready.index(s)


@jit
def load_columns(desc, i_b, t, i_h, b_ready, x_s, s, GROUPS: constexpr):
    """Of values or output gradients what each warpgroup needs."""
    for g in gl.static_range(GROUPS):
        load_box(desc, [i_b, t, i_h, g * BV], b_ready, x_s.index(GROUPS * s + g))


@jit
def state_before(
    b_S,
    c,
    before,
    g: constexpr,
    K: constexpr,
    V: constexpr,
    REVERSE: constexpr,
    TRANSPOSED: constexpr,
    PREFIX: constexpr,
    STAGES: constexpr,
):
    """b_S, zero, and what tokens `start` to `lo` of sequence n leave, before this part of the row; and the next chunk.

    With PREFIX chunks of them make it, otherwise it is the sum of the states of segments among the last `summed` ones.
    """
    written, b_write, whole, states, where, rate, n, start, lo, i_head, o_k, o_v = before
    _, interval_states, _, length, num_states, summed = states
    row, _, H, i_b, _ = where
    cu_seqlens, _, T, part = row
    first, _, _, _ = part
    if PREFIX:
        PACKED: constexpr = constexpr(cu_seqlens is not None)
        lo_prefix = prefix(row, n, rate, REVERSE)
        num_chunks, num_others = count_chunks(lo_prefix, lo), gl.maximum(start - lo_prefix, 0)
        b_S = add_chunks(
            b_S, written, b_write, whole, c, num_chunks, num_others, g, V // BV, K, REVERSE, PACKED, STAGES
        )
        c += num_chunks
    if interval_states is not None:
        reach = gl.minimum(reach_of(rate, T, False), summed)
        for j in range(gl.maximum(start, first - reach) // length, first // length):
            i_state = i_b * num_states + j
            p_S = state_pointers(interval_states, i_state, i_head, o_k, o_v, H, K, V, TRANSPOSED)
            b_S = b_S * decay_over(rate, length) + gl.load(p_S)
    return b_S, c


@jit
def add_chunks(
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
    """The state after chunks c to `c + num_chunks` of keys and values, or of queries and output gradients.

    The first of them begins with `num_others` rows of another sequence.
    """
    x_s, y_s, ready, empty = inputs
    dtype: constexpr = x_s.dtype
    for i in range(num_chunks):
        s, parity = stage(c + i, STAGES)
        mbarrier.wait(ready.index(s), parity)
        t_x = x_s.index(s).reshape([C, K])
        t_y = y_s.index(GROUPS * s + g).reshape([C, BV])
        if PACKED and (i == 0) & (num_others > 0):
            clear_rows(t_x, C - num_others, K, not REVERSE)
            clear_rows(t_y, C - num_others, BV, not REVERSE)
            fence_async_shared()
        b_xT = t_x.permute((1, 0)).load(LEFT)
        b_xT = (b_xT.to(gl.float32) * b_write[None, :]).to(dtype)
        b_S = warpgroup_mma(b_xT, t_y, b_S * whole, is_async=True)
        b_S = warpgroup_mma_wait(0, deps=[b_S])
        mbarrier.arrive(empty.index(s))
    return b_S


@jit
def read_decays(rate, scale, REVERSE: constexpr):
    """Decay factors, times scale, for intra-chunk scores and for reads of the carried state."""
    return _inside(rate, scale, REVERSE), _read_decay(rate, REVERSE) * scale


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
def write_decay(rate, m, REVERSE: constexpr):
    """Of what row j of a chunk of m tokens writes, and of the state, to where the chunk ends."""
    o_j = gl.arange(0, C, layout=gl.SliceLayout(0, LEFT))
    return decay_over(rate, o_j + 1 - (C - m) if REVERSE else m - 1 - o_j), decay_over(rate, m)


@jit
def state_pointers(p, i_n, i_h, o_k, o_v, H, K: constexpr, V: constexpr, TRANSPOSED: constexpr):
    """Of a state `[K, V]`, or `[V, K]` where it is transposed, in a block `[K, BV]`."""
    p += (i_n.to(gl.int64) * H + i_h) * (K * V)
    return p + (o_v[None, :] * K + o_k[:, None] if TRANSPOSED else o_k[:, None] * V + o_v[None, :])


@jit
def _is_token(m, layout: constexpr, REVERSE: constexpr):
    """Which rows of a chunk hold its m tokens, in a column."""
    o_c = gl.arange(0, C, layout=gl.SliceLayout(1, layout))
    return (o_c >= C - m if REVERSE else o_c < m)[:, None]


@jit
def clear_rows(t_x, m, D: constexpr, REVERSE: constexpr):
    """All but m tokens."""
    layout: constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    b_x = t_x.load(layout)
    t_x.store(gl.where(_is_token(m, layout, REVERSE), b_x, gl.zeros_like(b_x)))


@jit
def store_rows(p, stride, t_x, m, REVERSE: constexpr):
    """m tokens of a tile of an output."""
    layout: constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    o_c = gl.arange(0, C, layout=gl.SliceLayout(1, layout))
    o_d = gl.arange(0, BV, layout=gl.SliceLayout(0, layout))
    gl.store(p + o_c[:, None] * stride + o_d[None, :], t_x.load(layout), mask=_is_token(m, layout, REVERSE))
