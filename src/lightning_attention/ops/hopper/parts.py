"""Building blocks of the Hopper kernels: segments, barriers, descriptors, decays and states.

Names are those of the portable kernels; `_s` is shared memory, and `t_` a tile of it.
"""

from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language
from triton.experimental.gluon.language.nvidia import hopper
from triton.language import constexpr
from triton.language.extra import cuda

from ..gpu.primitives import decay_over, load_log_decay, memory_length, sequence_bounds, sequences_in
from . import config

# Any: a type checker cannot follow what a compiler does with them.
jit: Any = gluon.jit
gl: Any = language
mbarrier: Any = hopper.mbarrier
tma: Any = hopper.tma
fence_async_shared: Any = hopper.fence_async_shared
warpgroup_mma: Any = hopper.warpgroup_mma
warpgroup_mma_wait: Any = hopper.warpgroup_mma_wait
# Programmatic dependent launch: kernels launched next may start, and memory of previous kernels may be read.
trigger_dependents: Any = cuda.gdc_launch_dependents
wait_for_previous: Any = cuda.gdc_wait
# Renamed in Triton 3.9.
tma_load: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store: Any = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

C: Any = constexpr(config.C)
# Columns of a state or an output that a warpgroup computes.
BV: Any = constexpr(64)
STATE_ALONE: Any = constexpr(config.STATE_ALONE)

# Registers that accumulate products, and a left operand in registers.
ACC: Any = constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LEFT: Any = constexpr(gl.DotOperandLayout(0, ACC.value, 2))
# Tiles in shared memory, and blocks that TMA copies from or to `[B, T, H, D]`.
TILE: Any = constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
BLOCK: Any = constexpr(gl.NVMMASharedLayout(128, 16, rank=4))
BARRIER: Any = constexpr(mbarrier.MBarrierLayout())

# Types of fields. Arguments of a kernel may be constants: None for a tensor that is not given.
Value = language.tensor | constexpr
Shared = language.shared_memory_descriptor
Descriptor = hopper.tma.tensor_descriptor


def aggregate(cls: Any) -> Any:
    """Define a struct for kernels: `triton.aggregate`, which before Triton 3.8 is private and writes no `__init__`."""
    if native := getattr(triton, "aggregate", None):
        return native(cls)

    def init(self: Any, *values: Any) -> None:
        for name, value in zip(cls.__annotations__, values, strict=True):
            setattr(self, name, value if isinstance(value, gl.base_value) else constexpr(value))

    init.__triton_builtin__ = True  # pyright: ignore[reportFunctionMemberAccess]
    cls.__init__ = init
    return triton.language.core._aggregate(cls)


@aggregate
class Sequence:
    """Tokens `start` to `end` of a sequence, of which `lo` to `hi` are in the segment, and the index of its states."""

    start: Value
    end: Value
    index: Value
    lo: Value
    hi: Value


@aggregate
class Segment:
    """Tokens `first` to `last` of batch row i_b, which a program scans for head i_h.

    Positions count in the direction of the scan, and so do its sequences `n_first` to `n_last`.
    """

    cu_seqlens: Value
    N: Value
    T: Value
    first: Value
    last: Value
    n_first: Value
    n_last: Value
    B: Value
    H: Value
    i_b: Value
    i_h: Value
    num_uncut: Value
    REVERSE: constexpr

    @jit
    def is_cut(self):
        return self.i_b * self.H + self.i_h >= self.num_uncut

    @jit
    def sequence(self, n):
        start, end, i_n = sequence_bounds(self.cu_seqlens, n, self.N, self.T, self.REVERSE)
        return Sequence(start, end, i_n, gl.maximum(start, self.first), gl.minimum(end, self.last))

    @jit
    def prefix(self, sequence, log_decay):
        """Position of the first chunk that the state before the segment is made of."""
        start = gl.maximum(sequence.start, self.first - memory_length(log_decay, self.T, False))
        return sequence.lo - count_chunks(start, self.first) * C

    @jit
    def chunk(self, lo, hi, i):
        """First token in memory of chunk i of `lo` to `hi`, and its number of tokens; in reverse they come last."""
        t = self.T - lo - (i + 1) * C if self.REVERSE else lo + i * C
        return t, gl.minimum(hi - lo - i * C, C)


@jit
def program_segment(
    log_decay, cu_seqlens, B, N, T, H, segment_length, num_uncut, REVERSE: constexpr, PREFIX: constexpr
):
    """Segment of this program.

    The first programs scan a batch row each, whole, for the first heads of all batch rows; the others are cut.
    With PREFIX the second of two segments also reads what its head remembers of the first, which is longer for that.
    """
    i = gl.program_id(0)
    i_c = gl.maximum(i - num_uncut, 0)
    num_cut = B * H - num_uncut
    i_s = i_c // num_cut
    i_bh = gl.minimum(i, num_uncut) + i_c % num_cut
    i_b, i_h = i_bh // H, i_bh % H
    if PREFIX:
        remembered = memory_length(load_log_decay(log_decay, i_h), T, False).to(gl.float32) * STATE_ALONE
        segment_length = gl.minimum(segment_length, gl.cdiv(T + remembered.to(gl.int32), 2 * C) * C)
    first = i_s * segment_length
    last = gl.where(i < num_uncut, T, gl.minimum(first + segment_length, T))
    if cu_seqlens is None:
        n_first, n_last = i_b, i_b + 1
    else:
        n_first, n_last = sequences_in(cu_seqlens, first, last, N, T, REVERSE)
    return Segment(cu_seqlens, N, T, first, last, n_first, n_last, B, H, i_b, i_h, num_uncut, REVERSE)


@jit
def count_chunks(lo, hi):
    return gl.cdiv(gl.maximum(hi - lo, 0), C)


@aggregate
class Pipeline:
    """Barriers of the stages that chunks take turns in: loaded (`ready`), and read by all warpgroups (`empty`).

    A kernel may only have barriers that it uses to its end. The compiler gives the memory of others to descriptors,
    which were then corrupted when two processes shared a GPU.
    """

    ready: Shared
    empty: Shared

    @jit
    def init(self, num_readers: constexpr):
        STAGES: constexpr = self.ready.shape[0]
        for s in gl.static_range(STAGES):
            mbarrier.init(self.ready.index(s), count=1)
            mbarrier.init(self.empty.index(s), count=num_readers)
        fence_async_shared()

    @jit
    def stage(self, c):
        """Stage of chunk c, and the phase of its barriers."""
        STAGES: constexpr = self.ready.shape[0]
        return c % STAGES, c // STAGES & 1

    @jit
    def acquire(self, c, num_bytes: constexpr):
        """Wait until the stage of chunk c is empty. Returns the stage, and the barrier to load `num_bytes` with."""
        s, phase = self.stage(c)
        mbarrier.wait(self.empty.index(s), phase ^ 1)
        mbarrier.expect(self.ready.index(s), num_bytes)
        return s, self.ready.index(s)

    @jit
    def wait(self, c):
        """Wait until chunk c is loaded. Returns its stage."""
        s, phase = self.stage(c)
        mbarrier.wait(self.ready.index(s), phase)
        return s

    @jit
    def release(self, s):
        mbarrier.arrive(self.empty.index(s))


@aggregate
class Operand:
    """A tensor `[B, T, H, D]` with a contiguous last dimension."""

    p: Value
    stride_b: Value
    stride_t: Value
    stride_h: Value

    @jit
    def descriptor(self, segment, D: constexpr, BD: constexpr):
        """Describe blocks of C tokens and BD columns of a head. Costs time: a partition makes only those it uses."""
        return tma.make_tensor_descriptor(
            self.p,
            [segment.B, segment.T, segment.H, D],
            [self.stride_b, self.stride_t, self.stride_h, 1],
            [1, C, 1, BD],
            BLOCK,
        )


@jit
def load_columns(desc, i_b, t, i_h, bar, x_s, s, GROUPS: constexpr):
    """Load a chunk of values or output gradients, the columns of each warpgroup into a tile of their own."""
    for g in gl.static_range(GROUPS):
        tma_load(desc, [i_b, t, i_h, g * BV], bar, x_s.index(GROUPS * s + g))


@aggregate
class Output:
    """C tokens and BV columns from `column` of a contiguous output `[B, T, H, D]`, and the tile they leave from."""

    p: Value
    stride_t: Value
    desc: Descriptor
    smem: Shared
    i_b: Value
    i_h: Value
    column: constexpr

    @jit
    def tile(self):
        return self.smem.reshape([C, BV])

    @jit
    def store(self, t):
        """Begin to store a chunk from shared memory."""
        tma_store(self.desc, [self.i_b, t, self.i_h, self.column], self.smem)

    @jit
    def store_tokens(self, t, m, REVERSE: constexpr):
        """Store m tokens of a chunk from shared memory."""
        p = self.p + t.to(gl.int64) * self.stride_t + self.column
        layout: constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        o_c = gl.arange(0, C, layout=gl.SliceLayout(1, layout))
        o_d = gl.arange(0, BV, layout=gl.SliceLayout(0, layout))
        m_c = _is_token(m, layout, REVERSE)
        p_o = p + o_c[:, None] * self.stride_t + o_d[None, :]
        gl.store(p_o, self.tile().load(layout), mask=m_c)


@jit
def output_descriptor(o, segment, D: constexpr):
    stride_t = segment.H.to(gl.int64) * D
    return Operand(o, segment.T * stride_t, stride_t, D).descriptor(segment, D, BV)


@aggregate
class StateBlock:
    """Columns of states `[K, V]`, or `[V, K]` where they are transposed, that a warpgroup owns."""

    i_h: Value
    H: Value
    o_k: Value
    o_v: Value
    K: constexpr
    V: constexpr
    TRANSPOSED: constexpr

    @jit
    def pointers(self, p, i_n):
        """Addresses of the head's state of sequence i_n."""
        return self.at(p, i_n.to(gl.int64) * self.H + self.i_h)

    @jit
    def at(self, p, i):
        """Addresses of state i, which has 64 bits."""
        p += i * (self.K * self.V)
        if self.TRANSPOSED:
            return p + (self.o_v[None, :] * self.K + self.o_k[:, None])
        else:
            return p + (self.o_k[:, None] * self.V + self.o_v[None, :])


@jit
def state_block(i_h, H, g: constexpr, K: constexpr, V: constexpr, TRANSPOSED: constexpr):
    """Columns of warpgroup g; `i_h` has 64 bits."""
    o_k = gl.arange(0, K, layout=gl.SliceLayout(1, ACC))
    o_v = g * BV + gl.arange(0, BV, layout=gl.SliceLayout(0, ACC))
    return StateBlock(i_h, H, o_k, o_v, K, V, TRANSPOSED)


@aggregate
class States:
    """States before and after the scan, and states of segments, summed as far back as `max_reach` tokens.

    States of segments are `[intervals, heads, K, V]`, of the heads of all batch rows that are cut. With `stride_slot`,
    the states after the scan are in slots of a pool.
    """

    initial: Value
    interval: Value
    final: Value
    final_indices: Value
    stride_slot: Value
    segment_length: Value
    max_reach: Value


@jit
def add_interval_states(b_S, states, block, segment, sequence, log_decay):
    """Add the states that earlier segments leave of a sequence."""
    length = states.segment_length
    reach = gl.minimum(memory_length(log_decay, segment.T, False), states.max_reach)
    num_cut = segment.B * segment.H - segment.num_uncut
    i_c = segment.i_b * segment.H + segment.i_h - segment.num_uncut
    for j in range(gl.maximum(sequence.start, segment.first - reach) // length, segment.first // length):
        i = j.to(gl.int64) * num_cut + i_c  # pyright: ignore[reportAttributeAccessIssue]
        p_S = block.at(states.interval, i)
        b_S = b_S * decay_over(log_decay, length) + gl.load(p_S)
    return b_S


@aggregate
class KeyValues:
    """Chunks of keys and values, or of queries and output gradients, whose products make a state.

    Warpgroup g reads all columns of the keys, and its own of the values.
    """

    x_s: Shared
    y_s: Shared
    pipeline: Pipeline
    g: constexpr
    PACKED: constexpr
    REVERSE: constexpr

    @jit
    def tiles(self, s):
        K: constexpr = self.x_s.shape[4]
        GROUPS: constexpr = self.y_s.shape[0] // self.x_s.shape[0]
        return self.x_s.index(s).reshape([C, K]), self.y_s.index(GROUPS * s + self.g).reshape([C, BV])

    @jit
    def add_prefix(self, b_S, c, segment, sequence, log_decay, writes):
        """Add the state before the segment to b_S, which is zero. Returns it, and the next chunk."""
        lo = segment.prefix(sequence, log_decay)
        num_chunks, num_foreign = count_chunks(lo, sequence.lo), gl.maximum(sequence.start - lo, 0)
        b_S = self.add_chunks(b_S, c, num_chunks, num_foreign, writes)
        return b_S, c + num_chunks

    @jit
    def add_chunks(self, b_S, c, num_chunks, num_foreign, writes):
        """Add chunks c to `c + num_chunks` to a state. They begin with `num_foreign` tokens of another sequence."""
        for i in range(num_chunks):
            s = self.pipeline.wait(c + i)
            t_x, t_y = self.tiles(s)
            if self.PACKED and (i == 0) & (num_foreign > 0):
                clear_tokens(t_x, C - num_foreign, not self.REVERSE)
                clear_tokens(t_y, C - num_foreign, not self.REVERSE)
                fence_async_shared()
            b_xT = t_x.permute((1, 0)).load(LEFT)
            b_xT = (b_xT.to(gl.float32) * writes.key[None, :]).to(t_x.dtype)
            b_S = warpgroup_mma(b_xT, t_y, b_S * writes.state, is_async=True)
            b_S = warpgroup_mma_wait(0, deps=[b_S])
            self.pipeline.release(s)
        return b_S


@aggregate
class ReadDecays:
    """Decay factors times scale, to query i of a chunk: from key j (`[i, j]`), and from the state before the chunk."""

    inside: Value
    state: Value


@aggregate
class WriteDecays:
    """Decay factors to the end of a chunk: from key j, and from the state before the chunk."""

    key: Value
    state: Value


@jit
def read_decays(log_decay, scale, REVERSE: constexpr):
    o_i = gl.arange(0, C, layout=gl.SliceLayout(1, ACC))
    o_j = gl.arange(0, C, layout=gl.SliceLayout(0, ACC))
    distance = o_j[None, :] - o_i[:, None] if REVERSE else o_i[:, None] - o_j[None, :]
    b_inside = gl.where(distance >= 0, decay_over(log_decay, distance) * scale, 0.0)
    return ReadDecays(b_inside, decay_over(log_decay, C - 1 - o_i if REVERSE else o_i + 1) * scale)


@jit
def write_decays(log_decay, m, REVERSE: constexpr):
    """Decay factors of a chunk of m tokens."""
    o_j = gl.arange(0, C, layout=gl.SliceLayout(0, LEFT))
    b_key = decay_over(log_decay, o_j + 1 - (C - m) if REVERSE else m - 1 - o_j)
    return WriteDecays(b_key, decay_over(log_decay, m))


@jit
def _is_token(m, layout: constexpr, REVERSE: constexpr):
    """Mask of the m tokens of a chunk, in a column."""
    o_c = gl.arange(0, C, layout=gl.SliceLayout(1, layout))
    return (o_c >= C - m if REVERSE else o_c < m)[:, None]


@jit
def clear_tokens(t_x, m, REVERSE: constexpr):
    """Zero all tokens of a tile but m."""
    D: constexpr = t_x.shape[1]
    layout: constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    b_x = t_x.load(layout)
    t_x.store(gl.where(_is_token(m, layout, REVERSE), b_x, gl.zeros_like(b_x)))
