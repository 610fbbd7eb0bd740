"""How the work is cut. Pure functions."""

from functools import lru_cache

from ..triton.config import Segments, ceil_div

HEAD_DIMS = (64, 128)

# Of queries, or values. With fewer a call is mostly launching, which takes the host longer than with portable kernels.
MIN_ELEMENTS = 1 << 21

# States of intervals that a program sums by itself; of more, another kernel makes the sums.
MAX_SUMMED = 7
# Of a row, where segments have several: each makes that kernel take longer.
MAX_INTERVALS = 96

# Tokens of a chunk.
C = 64

# Chunks in shared memory, as many as fit beside a state and an output.
SCAN_STAGES = {(128, 128): 3, (64, 128): 5, (128, 64): 2, (64, 64): 4}
GRADIENT_STAGES = {128: 2, 64: 2}
STATE_STAGES = {(128, 128): 6, (64, 128): 8, (128, 64): 4, (64, 64): 6}

# Of a thread, before the warps share them unevenly: two programs run on a multiprocessor where V is 64.
MAX_REGISTERS = {128: None, 64: 128}

# Of a chunk's time, where only its state is made.
STATE_ALONE = 0.45

# Of two kernels: beside each other they take longer for the memory's part; one after the other has microseconds more.
BESIDE, AFTER = 1.08, 30


def programs_per_multiprocessor(value_dim: int) -> int:
    return 128 // value_dim


def alone(key_dim: int, value_dim: int, is_packed: bool, kernels: int = 1) -> float:
    """Microseconds a chunk takes a program that has the memory for itself: latencies in a row."""
    of_kernel = (1.65, 2.3) if max(key_dim, value_dim) > 64 else (0.73, 1.16)
    return of_kernel[kernels - 1] * (1.2 if is_packed else 1.0)


def by_memory(places: int, value_dim: int, kernels: int, bytes_per_second: float) -> float:
    """Microseconds that memory takes for a chunk of as many programs as run at a time, of tensors of 2 bytes.

    A scan moves q, k, v and o; the two kernels of backward move four and six.
    """
    return (3 + kernels) * C * value_dim * 2 * places / bytes_per_second * 1e6


@lru_cache(1024)
def segments(
    length: int, heads: int, places: int, min_interval: int, alone: float, by_memory: float, kernels: int = 1
) -> Segments:
    """As many as take least time, by a model of it.

    The second of two makes the state before it as well; more than two get their states from another kernel.

    Args:
        length: tokens T of a row.
        heads: of all rows, programs of a kernel if rows are not cut.
        places: programs that run at a time.
        min_interval: tokens of one of several intervals in a segment, at least.
        alone: see `alone`.
        by_memory: see `by_memory`.
        kernels: that run beside each other.
    """
    chunks, programs = ceil_div(length, C), kernels * heads
    traffic = by_memory * chunks * programs / places

    def time(count: int) -> float:
        """Of the scan, and of the states before it, by what was measured on an H100."""
        in_a_row = alone * ceil_div(chunks, count) * ceil_div(programs * count, places)
        beside = kernels > 1 and programs * count <= places
        moved = traffic * (BESIDE if beside else 1)
        if count == 1:
            return _longer(in_a_row, moved)
        if count == 2:
            return _longer((1 + STATE_ALONE) * in_a_row, 1.25 * moved)
        after = AFTER if kernels > 1 and not beside else 0
        return _longer(in_a_row, moved) + 0.3 * traffic * (count - 1) / count + 8 + after + 0.05 * count

    most = min(places // max(heads, 1), chunks)
    count = min(range(1, most + 1), key=time, default=1)
    if count == 1:
        return Segments(max(length, 1), max(length, 1), 1)
    intervals = 1 if count == 2 else max(1, min(length // count // min_interval, MAX_INTERVALS // count))
    interval = ceil_div(length, count * intervals * C) * C
    return Segments(intervals * interval, interval, ceil_div(length, intervals * interval))


def _longer(a: float, b: float) -> float:
    """Somewhat more than either, where both are alike."""
    return (a**5 + b**5) ** (1 / 5)
