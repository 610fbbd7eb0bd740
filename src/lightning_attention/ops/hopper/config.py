"""How the work is cut. Pure functions."""

from functools import lru_cache
from math import ceil

from ..triton.config import Segments, ceil_div

HEAD_DIMS = (64, 128)

# Of queries, or values. With fewer a call is mostly launching, which takes the host longer than with portable kernels.
MIN_ELEMENTS = 1 << 21

# States of segments that a program sums by itself; of more, another kernel makes the sums.
MAX_SUMMED = 7

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

# Of two kernels, what the memory's part takes longer where they run beside each other; what part of the longer one's
# chunk one takes where they run one after the other, and the microseconds between them.
BESIDE, IN_TURN, AFTER = 1.06, 0.85, 13
# Microseconds that segments cost, and each of them.
SEGMENTS, SEGMENT = 5, 0.1

# Decays are on the GPU, and not looked at. So many tokens a head of slope 1/512 remembers: in a model with the slopes
# of ALiBi, that shrink from layer to layer, the gentlest in a layer of the middle. On average heads remember less.
REMEMBERED = 11_400
ON_AVERAGE = 0.7
# Heads may remember more: what is hardly better cut is not.
UNCUT = 0.97


def programs_per_multiprocessor(value_dim: int) -> int:
    return 128 // value_dim


def alone(key_dim: int, value_dim: int, is_packed: bool, kernels: int = 1) -> float:
    """Microseconds a chunk takes a program that has the memory for itself: latencies in a row."""
    of_kernel = (1.65, 2.4) if max(key_dim, value_dim) > 64 else (0.73, 1.3)
    return of_kernel[kernels - 1] * (1.2 if is_packed else 1.0)


def by_memory(places: int, value_dim: int, kernels: int, bytes_per_second: float) -> float:
    """Microseconds that memory takes for a chunk of as many programs as run at a time, of tensors of 2 bytes.

    A scan moves q, k, v and o; the two kernels of backward move four and six.
    """
    return (3 + kernels) * C * value_dim * 2 * places / bytes_per_second * 1e6


@lru_cache(1024)
def segments(
    length: int, sequence: int, heads: int, places: int, alone: float, by_memory: float, kernels: int = 1
) -> Segments:
    """As many as take least time, by a model of it.

    The second of two makes the state before it as well; more than two get their states from another kernel.

    Args:
        length: tokens T of a row.
        sequence: tokens of a sequence, on average; a row may have several.
        heads: of all rows, programs of a kernel if rows are not cut.
        places: programs that run at a time.
        alone: see `alone`.
        by_memory: see `by_memory`.
        kernels: that run beside each other.
    """
    chunks, programs = ceil_div(length, C), kernels * heads
    traffic = by_memory * chunks * programs / places

    def time(count: int) -> float:
        """By what was measured on an H100; what every call takes is left out."""
        is_beside = kernels > 1 and programs * count <= places
        is_in_turn = kernels > 1 and not is_beside
        chunk = alone * ceil_div(programs * count, places) * (IN_TURN if is_in_turn else 1)
        moved = traffic * (BESIDE if is_beside else 1)
        if count == 1:
            return _longer(chunk * chunks, moved) * UNCUT
        if count == 2:
            first = min(two_segments(length, sequence).length, (length + STATE_ALONE * REMEMBERED) / 2) / C
            again = _begun_before(2, length, sequence) * ON_AVERAGE * min(first, REMEMBERED / C)
            return SEGMENTS + _longer(chunk * first, moved * (1 + 0.5 * again / chunks))
        in_a_row = ceil_div(chunks, count)
        remembered = min(in_a_row, min(sequence, REMEMBERED) / C)
        state = STATE_ALONE * alone * ceil_div(programs * (count - 1), places) * remembered
        moved_for_states = 0.5 * traffic * (count - 1) * ON_AVERAGE * remembered / chunks
        states = SEGMENTS + SEGMENT * count + _longer(state, moved_for_states) + (AFTER if is_in_turn else 0)
        return _longer(chunk * in_a_row, moved) + states

    most = min(places // max(heads, 1), chunks)
    count = min(range(1, most + 1), key=time, default=1)
    if count == 2:
        return two_segments(length, sequence)
    length_of_each = max(1, ceil_div(chunks, count) * C if count > 1 else length)
    return Segments(length_of_each, length_of_each, ceil_div(max(length, 1), length_of_each))


def two_segments(length: int, sequence: int) -> Segments:
    """The first takes as long as the second, which also goes through what it has to know of the first."""
    chunks = ceil_div(length, C)
    first = ceil(chunks / (2 - STATE_ALONE * _begun_before(2, length, sequence)))
    first = min(first, chunks - 1) * C
    return Segments(first, first, 2)


def _begun_before(count: int, length: int, sequence: int) -> float:
    """How much of a segment, on average, belongs to the sequence with which the next one begins."""
    return min(1.0, sequence * count / max(length, 1))


def _longer(a: float, b: float) -> float:
    """Somewhat more than either, where both are alike."""
    return (a**5 + b**5) ** (1 / 5)
