"""How the work is cut. Pure functions."""

from functools import lru_cache
from math import ceil

from ..triton.config import Segments, ceil_div

HEAD_DIMS = (64, 128)

# Of queries or values, by head size. Forward of fewer is mostly launching and descriptors, which portable kernels do
# without; they are faster there, or about as fast and cost the host less. Backward they need more launches.
MIN_ELEMENTS = {128: 3 << 22, 64: 1 << 21}

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

# Microseconds that a chunk takes a program that has the memory for itself, latencies in a row: in a scan, and in the
# kernel of dk and dv. So many times as long it takes where sequences are packed, and where two share a multiprocessor.
SCAN = {128: 1.65, 64: 0.73}
GRADIENTS = {128: 2.5, 64: 1.35}
PACKED, SHARED = 1.3, 1.6
# Of a scan's, where only the state is made.
STATE_ALONE = 0.45

# Of the two kernels of backward: so many times as long the memory takes where they run beside each other, and so many
# microseconds more it is where they run one after the other.
BESIDE, AFTER = {128: 1.15, 64: 1.0}, 16
# Microseconds that segments cost, and each of them.
SEGMENTS, SEGMENT = 7, 0.15

# Decays are on the GPU, and not looked at: heads are taken for those of ALiBi, of which the gentlest, of slope 1/256,
# remembers 78 chunks, or somewhat more. Of what could be remembered heads on average remember this part.
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
    """As many as take least time, by a model of it.

    The second of two makes the state before it as well; more than two get their states from another kernel.

    Args:
        length: tokens T of a row.
        sequence: tokens of a sequence, on average; a row may have several.
        heads: of all rows, programs of a kernel if rows are not cut.
        key_dim: K.
        value_dim: V.
        multiprocessors: of the GPU.
        bytes_per_second: what a copy gets of its memory, read and written.
        is_backward: two kernels that may run beside each other, where forward is one.
    """
    chunks = ceil_div(length, C)
    places = multiprocessors * programs_per_multiprocessor(value_dim)
    slower = PACKED if sequence < length else 1.0
    head_dim = max(key_dim, value_dim)
    scan, gradients = SCAN[head_dim] * slower, GRADIENTS[head_dim] * slower
    tensor = length * heads * (key_dim + value_dim) / bytes_per_second * 1e6

    def time(count: int) -> float:
        """Microseconds, by what was measured; what every call takes is left out."""
        is_beside = is_backward and 2 * heads * count <= places
        is_in_turn = is_backward and not is_beside
        is_shared = heads * count * (2 if is_beside else 1) > multiprocessors
        chunk = gradients if is_beside else scan + gradients if is_in_turn else scan
        chunk *= SHARED if is_shared else 1
        moved = tensor * (10 if is_backward else 4) * (BESIDE[head_dim] if is_beside else 1)
        if count == 1:
            return _longer(chunk * chunks, moved)
        if count == 2:
            first = min(two_segments(length, sequence).length / C, (chunks + STATE_ALONE * REMEMBERED) / 2)
            again = ON_AVERAGE * _begun_before(2, length, sequence) * min(first, REMEMBERED)
            return SEGMENTS + _longer(chunk * first, moved * (1 + 0.5 * again / chunks))
        in_a_row = ceil_div(chunks, count)
        remembered = min(in_a_row, sequence / C, REMEMBERED)
        directions = 2 if is_backward else 1
        in_turns = ceil_div(directions * heads * (count - 1), places)
        moved_for_states = 2 * directions * tensor * (count - 1) * ON_AVERAGE * remembered / chunks
        states = _longer(STATE_ALONE * scan * in_turns * remembered, moved_for_states) + SEGMENTS + SEGMENT * count
        return states + _longer(chunk * in_a_row, moved) + (AFTER if is_in_turn else 0)

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
