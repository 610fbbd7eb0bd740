"""Device functions of all kernels: program indices, decays, packed sequences.

Names: `i_` index, `n` sequence, `N` sequences, `T` tokens of a batch row, `H` heads, `V` value size, `BV` its tile.
"""

from typing import Any

import triton
import triton.language as tl

# To a type checker, a kernel that calls another raises.
jit: Any = triton.jit

# -log of the weight at which a token is left out of the state that a segment starts from. In 16 bits the weight is
# 2^-28: float32, which sums states, rounds off 16 times as much, and results 100,000 times. In float32 it is 0.
NEGLIGIBLE: Any = tl.constexpr(19.4)
NEGLIGIBLE_IN_FLOAT32: Any = tl.constexpr(104.0)


@jit
def program_ids(H, num_segments, V: tl.constexpr, BV: tl.constexpr):
    """Tile of V, head, segment and batch row of this program. Tiles of one head are neighbours: they share q and k."""
    i = tl.program_id(0)
    num_tiles: tl.constexpr = (V + BV - 1) // BV
    i_v = i % num_tiles
    i = i // num_tiles
    i_h = i % H
    i = i // H
    return i_v, i_h.to(tl.int64), i % num_segments, (i // num_segments).to(tl.int64)


@jit
def load_slot(indices, i):
    """The slot of sequence i, in 64 bits; without indices, slot i."""
    return tl.cast(i if indices is None else tl.load(indices + i), tl.int64)


@jit
def load_log_decay(log_decay, i_h):
    """log λ of a head; finite, because -inf times 0 is NaN."""
    return 0.0 if log_decay is None else tl.maximum(tl.load(log_decay + i_h), -1e20)


@jit
def decay_over(log_decay, distance):
    """`λ^distance`. Negative distances occur in masked positions; no exponent is ever above 0.

    `tl.exp` rounds `x log2(e)` and so errs by a part in 10^6 at e^-20; here only a remainder near 0 is rounded.
    """
    LOG2_E: tl.constexpr = tl.constexpr(1.44269504)
    # log(2) in two parts; the first has 9 bits, so that a whole number times it is exact.
    LOG_2: tl.constexpr = tl.constexpr(0.693359375)
    LOG_2_REST: tl.constexpr = tl.constexpr(-2.12194440e-4)
    x = tl.maximum(log_decay * tl.maximum(distance, 0).to(tl.float32), -104.0)  # exp(-104) is 0
    n = tl.floor(x * LOG2_E + 0.5)
    return tl.exp2(n) * tl.exp2((x - n * LOG_2 - n * LOG_2_REST) * LOG2_E)


@jit
def memory_length(log_decay, T, IN_FLOAT32: tl.constexpr):
    """Number of tokens, at most T, after which the weight of a token is negligible."""
    nats: tl.constexpr = NEGLIGIBLE_IN_FLOAT32 if IN_FLOAT32 else NEGLIGIBLE
    tokens = (1.0 / tl.maximum(-log_decay, 1e-30)) * nats + 1.0
    return tl.minimum(tokens, T.to(tl.float32)).to(tl.int32)


@jit
def _start(cu_seqlens, n, N, T, REVERSE: tl.constexpr):
    """First token of sequence n in the direction of the scan; for n = N, the end of the last sequence."""
    return T - tl.load(cu_seqlens + N - n).to(tl.int32) if REVERSE else tl.load(cu_seqlens + n).to(tl.int32)


@jit
def sequence_bounds(cu_seqlens, n, N, T, REVERSE: tl.constexpr):
    """Start and end of sequence n in the direction of the scan, and the index of its states."""
    if cu_seqlens is None:
        start, end, i_n = 0, T, n
    else:
        start, end = _start(cu_seqlens, n, N, T, REVERSE), _start(cu_seqlens, n + 1, N, T, REVERSE)
        i_n = N - 1 - n if REVERSE else n
    return start, end, i_n


@jit
def num_sequences_ended(cu_seqlens, position, N, T, REVERSE: tl.constexpr):
    """Number of sequences that end at a position or before it."""
    low, high = 0, N
    while low < high:
        middle = (low + high) // 2
        if _start(cu_seqlens, middle + 1, N, T, REVERSE) <= position:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def sequences_in(cu_seqlens, first, last, N, T, REVERSE: tl.constexpr):
    """Range of the sequences with tokens in a segment, perhaps one more. An empty one belongs where it ends."""
    n_first = 0
    if first > 0:
        n_first = num_sequences_ended(cu_seqlens, first, N, T, REVERSE)
    return n_first, tl.minimum(num_sequences_ended(cu_seqlens, last, N, T, REVERSE) + 1, N)


@jit
def interval_bounds(
    i_i, log_decay, cu_seqlens, N, T, segment_length, interval, REVERSE: tl.constexpr, IN_FLOAT32: tl.constexpr
):
    """Tokens `lo` to `hi` of interval i that the next segment needs, and the decay of the state over the interval."""
    begin, hi = i_i * interval, tl.minimum((i_i + 1) * interval, T)
    next_begin = tl.minimum(tl.cdiv(hi, segment_length) * segment_length, T)
    lo = tl.maximum(begin, next_begin - memory_length(log_decay, T, IN_FLOAT32))
    factor = decay_over(log_decay, hi - begin)
    if cu_seqlens is not None:
        start = _start(cu_seqlens, num_sequences_ended(cu_seqlens, hi, N, T, REVERSE), N, T, REVERSE)
        lo = tl.maximum(lo, start)
        factor = tl.where(start < begin, factor, 0.0)
    return lo, hi, factor
