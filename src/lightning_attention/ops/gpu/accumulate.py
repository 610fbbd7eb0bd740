"""States after intervals, from what each interval adds."""

import triton.language as tl
from triton.language.extra import cuda

from .primitives import jit, load_log_decay, memory_length, program_ids

# Elements of a state that a program accumulates, its warps, and the number of intervals it loads ahead.
BLOCK, NUM_WARPS, NUM_STAGES = 256, 2, 16


@jit(do_not_specialize=["H", "first_head", "num_heads", "num_intervals", "interval"])
def accumulate_kernel(
    interval_states,
    factors,
    log_decay,
    H,
    first_head,
    num_heads,
    num_intervals,
    interval,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    TRIGGER_DEPENDENTS: tl.constexpr,
    OVERLAP_PREVIOUS: tl.constexpr,
):
    """`S_i ← f_i S_{i-1} + S_i` over the intervals i of a batch row, in place, with the factors f.

    States are `[B, intervals, H, SIZE]`; state i of the H is of head `(first_head + i) % num_heads`.
    A head that remembers less than an interval needs the last two alone, since only the last may be shorter.
    Hopper's programmatic dependent launch: with TRIGGER_DEPENDENTS the next kernel may start; with OVERLAP_PREVIOUS
    this one starts before the previous kernel has ended, and ends after it.
    """
    if TRIGGER_DEPENDENTS:
        cuda.gdc_launch_dependents()
    i_x, i_h, _, i_b = program_ids(H, 1, SIZE, BLOCK)
    begin = 0
    if memory_length(load_log_decay(log_decay, (first_head + i_h) % num_heads), interval + 1, IN_FLOAT32) <= interval:
        begin = tl.maximum(num_intervals - 2, 0)
    o_x = i_x * BLOCK + tl.arange(0, BLOCK)
    p_S = interval_states + ((i_b * num_intervals + begin) * H + i_h) * SIZE + o_x
    p_factor = factors + i_b * num_intervals * H + i_h
    b_S = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(begin, num_intervals, num_stages=NUM_STAGES):
        factor = tl.load(p_factor + i * H)
        b_added = tl.load(p_S, mask=o_x < SIZE)
        b_S = b_added + tl.where(factor > 0, factor * b_S, 0.0)
        tl.store(p_S, b_S, mask=o_x < SIZE)
        p_S += H.to(tl.int64) * SIZE
    if OVERLAP_PREVIOUS:
        cuda.gdc_wait()
