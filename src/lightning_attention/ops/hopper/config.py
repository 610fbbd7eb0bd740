"""Sizes of the Hopper kernels, and a model of their times, which decides on segments. Pure functions."""

from dataclasses import replace
from functools import lru_cache
from math import ceil

from ..gpu.segments import Segments, ceil_div, one_segment

HEAD_DIMS = (64, 128)

# Least number of elements of q or v, by head size, at which forward is faster here than with the portable kernels,
# which have no descriptors and cost the host less. Backward is always faster here: it takes fewer launches.
MIN_ELEMENTS = {128: 3 << 22, 64: 1 << 21}

# Interval states that a program sums by itself; more are accumulated by a kernel.
MAX_SUMMED = 7

# Tokens of a chunk.
C = 64

# Chunks in shared memory, by K and V: as many as fit beside a state and an output.
SCAN_STAGES = {(128, 128): 3, (64, 128): 5, (128, 64): 2, (64, 64): 4}
GRADIENT_STAGES = {128: 2, 64: 2}
STATE_STAGES = {(128, 128): 6, (64, 128): 8, (128, 64): 4, (64, 64): 6}

# Registers of a thread, by V, before the partitions share them: with V of 64 a multiprocessor runs two programs.
MAX_REGISTERS = {128: None, 64: 128}

# Microseconds of a chunk, latency-bound, by head size: in a scan, and in the kernel of dk and dv. Factors on them for
# packed sequences, and for two programs on a multiprocessor.
SCAN = {128: 1.65, 64: 0.73}
GRADIENTS = {128: 2.5, 64: 1.35}
PACKED, SHARED = 1.3, 1.6
# Time of a chunk that only updates the state, relative to that of a scan.
STATE_ALONE = 0.45

# The two kernels of backward: factor on memory time if they run concurrently, by head size, and microseconds more if
# they run one after the other.
CONCURRENT, SEQUENTIAL = {128: 1.15, 64: 1.0}, 16
# Microseconds that segments cost at all, and each one.
SEGMENTS, SEGMENT = 7, 0.15
# Microseconds for which heads that are whole wait for the kernel that accumulates the states of others.
ACCUMULATED = 10

# Decays are on the GPU and are not read. The model assumes ALiBi slopes: the slowest-decaying head (1/256) has an
# effective window of 78 chunks, here somewhat more. The mean window is this share of it.
REMEMBERED = 86
ON_AVERAGE = 0.7


def programs_per_multiprocessor(value_dim: int) -> int:
    return 128 // value_dim


@lru_cache(1024)
def segments(
    length: int,
    sequence: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    multiprocessors: int,
    bytes_per_second: float,
    *,
    is_backward: bool = False,
) -> Segments:
    """The fastest cut by a model of the time.

    The second of two segments makes the state before it by itself; the states of more come from another kernel. More
    heads than the GPU runs at a time are whole as often as they fill it; the heads that are left are cut as if they
    were alone, and run last.

    Args:
        length: tokens T of a batch row.
        sequence: mean number of tokens of a sequence; a batch row may hold several.
        heads: heads of all batch rows: the number of programs without a cut.
        key_dim: K.
        value_dim: V.
        multiprocessors: number on the GPU.
        bytes_per_second: bandwidth of a copy, reads and writes together.
        is_backward: two kernels, which may run concurrently; forward is one.
    """
    chunks = ceil_div(length, C)
    max_programs = multiprocessors * programs_per_multiprocessor(value_dim)
    num_uncut = heads // max_programs * max_programs
    heads -= num_uncut
    slower = PACKED if sequence < length else 1.0
    head_dim = max(key_dim, value_dim)
    scan, gradients = SCAN[head_dim] * slower, GRADIENTS[head_dim] * slower
    tensor = length * heads * (key_dim + value_dim) / bytes_per_second * 1e6

    def time(count: int) -> float:
        """Microseconds, without what every call takes."""
        is_concurrent = is_backward and 2 * heads * count <= max_programs
        is_sequential = is_backward and not is_concurrent
        is_shared = heads * count * (2 if is_concurrent else 1) > multiprocessors
        chunk = gradients if is_concurrent else scan + gradients if is_sequential else scan
        chunk *= SHARED if is_shared else 1
        moved = tensor * (10 if is_backward else 4) * (CONCURRENT[head_dim] if is_concurrent else 1)
        if count == 1:
            return _soft_maximum(chunk * chunks, moved)
        if count == 2:
            first = min(two_segments(length, sequence).length / C, (chunks + STATE_ALONE * REMEMBERED) / 2)
            read_twice = ON_AVERAGE * _share_begun_before(2, length, sequence) * min(first, REMEMBERED)
            return SEGMENTS + _soft_maximum(chunk * first, moved * (1 + 0.5 * read_twice / chunks))
        chunks_each = ceil_div(chunks, count)
        window = min(chunks_each, sequence / C, REMEMBERED)
        directions = 2 if is_backward else 1
        rounds = ceil_div(directions * heads * (count - 1), max_programs)
        moved_for_states = 2 * directions * tensor * (count - 1) * ON_AVERAGE * window / chunks
        states = _soft_maximum(STATE_ALONE * scan * rounds * window, moved_for_states) + SEGMENTS + SEGMENT * count
        states += ACCUMULATED if num_uncut and count - 1 > MAX_SUMMED else 0
        return states + _soft_maximum(chunk * chunks_each, moved) + (SEQUENTIAL if is_sequential else 0)

    max_count = min(max_programs // max(heads, 1), chunks)
    count = min(range(1, max_count + 1), key=time, default=1) if heads else 1
    if count == 1:
        return one_segment(length)
    if count == 2:
        return replace(two_segments(length, sequence), num_uncut=num_uncut)
    segment_length = ceil_div(chunks, count) * C
    return Segments(segment_length, segment_length, ceil_div(length, segment_length), num_uncut)


def two_segments(length: int, sequence: int) -> Segments:
    """Two segments of equal time: the second also makes the state before it, from a part of the first."""
    chunks = ceil_div(length, C)
    first = ceil(chunks / (2 - STATE_ALONE * _share_begun_before(2, length, sequence)))
    first = min(first, chunks - 1) * C
    return Segments(first, first, 2)


def _share_begun_before(count: int, length: int, sequence: int) -> float:
    """Mean share of a segment that belongs to the sequence at the start of the next segment."""
    return min(1.0, sequence * count / max(length, 1))


def _soft_maximum(a: float, b: float) -> float:
    """The maximum, and up to 15 % more where both are alike."""
    return (a**5 + b**5) ** (1 / 5)
