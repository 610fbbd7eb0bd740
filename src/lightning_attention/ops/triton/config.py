"""Tiles of the Triton kernels from head sizes, and segments from the number of programs. Pure functions."""

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch

from ..gpu.segments import Segments, ceil_div, one_segment

MAX_HEAD_DIM = 256

# Drafts in a tree: the ancestors of a draft are the bits of an integer.
MAX_TREE = 64

# Tokens of a program of `read_kernel`: the state is then at most a tenth of what it loads.
TOKENS_PER_READ = 1024

# Interval states that a program sums by itself; more are accumulated by a kernel.
MAX_SUMMED = 12

# Least ratio of the bytes of inputs to those of interval states, if a segment has several intervals.
INPUTS_OVER_STATES = 24


@dataclass(frozen=True)
class Tiles:
    """Tile of a program: C tokens by BK by BV. A multiprocessor runs `programs_per_sm` programs at once."""

    C: int
    BK: int
    BV: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


@cache
def scan_tiles(key_dim: int, value_dim: int, dtype: torch.dtype, precision: str) -> Tiles:
    """Tiles of `scan_kernel`: the fastest in trials on an H200 that fit 99 KB, the smallest chips' shared memory.

    Short chunks leave registers for the state, which takes `BV BK / 128` a thread of 4 warps, and for loads in flight.

    Args:
        precision: "ieee" or "tf32", of products of float32.
    """
    BK, BV = power_of_two(key_dim), power_of_two(value_dim)
    if dtype == torch.float32 and precision == "ieee":
        if BK <= 64:
            return Tiles(32, BK, min(BV, 32), num_warps=4, num_stages=1, programs_per_sm=2)
        return Tiles(16, BK, min(BV, 32), num_warps=8, num_stages=1, programs_per_sm=1)
    if dtype == torch.float32:
        if BK <= 128:
            return Tiles(32, BK, min(BV, 32), num_warps=4, num_stages=2, programs_per_sm=2)
        return Tiles(16, BK, min(BV, 32), num_warps=8, num_stages=2, programs_per_sm=1)
    # A copy of the state scaled to float16 needs registers too; 64 columns of 256 would spill.
    max_BV = 32 if dtype == torch.float16 and BK > 128 else 64
    return Tiles(32 if BK <= 128 else 16, BK, min(BV, max_BV), num_warps=4, num_stages=4, programs_per_sm=2)


@cache
def interval_tiles(key_dim: int, value_dim: int, dtype: torch.dtype, precision: str) -> Tiles:
    """Tiles of kernels that make or read states alone, which leaves room for chunks twice as long."""
    tiles = scan_tiles(key_dim, value_dim, dtype, precision)
    return tiles if dtype == torch.float32 else replace(tiles, C=2 * tiles.C, num_stages=3)


@cache
def step_tiles(key_dim: int, value_dim: int) -> tuple[int, int]:
    """BK and BV of `step_kernel`: about 4096 elements of the state, 32 a thread."""
    BK = power_of_two(key_dim)
    return BK, min(power_of_two(value_dim), max(16, 4096 // BK))


@dataclass(frozen=True)
class RingStepTiles:
    """Blocks of `ring_step_kernel`: BS rows of the state and BC tokens of the ring at a time."""

    BK: int
    BV: int
    BS: int
    BC: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int]:
        return {"BK": self.BK, "BV": self.BV, "BS": self.BS, "BC": self.BC, "NUM_STAGES": self.num_stages}


@cache
def ring_step_tiles(
    key_dim: int, value_dim: int, chunk_size: int, dtype: torch.dtype, programs: int, *, is_interpreted: bool
) -> RingStepTiles:
    """Blocks of `ring_step_kernel`, of which no sum depends.

    Trials on an H200, 64 heads of 128 in bfloat16, chunks of 64, microseconds of a step of batch 1, 16, 64 and 256, for
    blocks of 32 rows: 1 warp and 3 stages 9.7, 29.8, 93.0 and 331; 2 warps and 3 stages 7.0, 28.5, 96.0 and 357; 8
    warps, 4 stages and the ring at once 6.3, 33.4, 108 and 468. With chunks of 32, blocks of 64 rows, 2 stages and 4
    warps are best from batch 16 on.
    """
    BK, BV = power_of_two(key_dim), power_of_two(value_dim)
    if is_interpreted:  # NumPy's sums depend on their length
        return RingStepTiles(BK, BV, BK, chunk_size, num_warps=4, num_stages=1)
    ring = chunk_size if dtype == torch.float16 else 16  # scores of a chunk are scaled to float16 together
    if chunk_size > 32:
        if programs <= 132:  # multiprocessors
            return RingStepTiles(BK, BV, 32, chunk_size, num_warps=8, num_stages=4)
        return RingStepTiles(BK, BV, 32, ring, num_warps=1 if programs > 16 * 132 else 2, num_stages=3)
    BS = max(16, min(BK, 8192 // BV))
    if dtype == torch.float32:
        return RingStepTiles(BK, BV, 16, chunk_size, num_warps=4 if BV <= 128 else 8, num_stages=2)
    return RingStepTiles(BK, BV, BS, chunk_size, num_warps=4, num_stages=2 if BS * BV <= 8192 else 3)


@cache
def ring_tiles(key_dim: int, value_dim: int, chunk_size: int, dtype: torch.dtype, precision: str) -> Tiles:
    """Tiles of `ring_kernel` for chunks of the scan, or of the Hopper kernels, which are longer.

    It holds a mask and two sources of every token, so it spills with fewer warps, or with loads ahead.
    """
    tiles = scan_tiles(key_dim, value_dim, dtype, precision)
    num_warps = 4 if tiles.BK * max(chunk_size, tiles.BV) < 64 * 64 else 8
    return replace(tiles, C=chunk_size, num_warps=num_warps, num_stages=1)


@cache
def verify_tiles(key_dim: int, value_dim: int, num_drafts: int) -> tuple[int, int, int, int]:
    """C, BK, BV and num_warps of `verify_kernel`, whose float32 products need registers."""
    C, (BK, BV) = power_of_two(num_drafts), step_tiles(key_dim, value_dim)
    return C, BK, BV if C <= 32 else 16, 4 if C <= 16 else 8


@cache
def min_interval(key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
    """Least number of tokens of an interval, if a segment has several: 2048 for heads of 128 in 16 bits."""
    state_bytes, token_bytes = 4 * key_dim * value_dim, (2 * key_dim + value_dim) * dtype.itemsize
    return max(256, ceil_div(INPUTS_OVER_STATES * state_bytes, token_bytes))


@lru_cache(1024)
def segments(length: int, programs: int, multiprocessors: int, programs_per_sm: int, min_interval: int) -> Segments:
    """The fastest cut by a model of times measured on an H200, among those that the device runs at once.

    Args:
        length: tokens T of a batch row.
        programs: number of programs without a cut.
        multiprocessors: number on the device.
        programs_per_sm: programs that a multiprocessor runs at once.
        min_interval: least number of tokens of an interval, if a segment has several.
    """

    def time(count: int) -> float:
        """Time of a scan, in times of a token if a program has a multiprocessor for itself."""
        if count == 1:
            return length
        sharing = 1.4 if programs * count > multiprocessors else 1.0
        launch = 160
        states = 15 * count if count <= MAX_SUMMED + 1 else 100 + 4 * count
        return launch + (1.25 * length / count + states) * sharing

    max_count = min(programs_per_sm * multiprocessors // max(programs, 1), length // 64)
    count = min(range(1, max_count + 1), key=time, default=1)
    if count == 1:
        return one_segment(length)
    intervals = max(1, length // count // min_interval)
    interval = ceil_div(length, count * intervals * 64) * 64
    return Segments(intervals * interval, interval, ceil_div(length, intervals * interval))


@lru_cache(1024)
def all_intervals(
    length: int, programs: int, multiprocessors: int, programs_per_sm: int, min_interval: int
) -> Segments:
    """One segment with as many intervals as the device runs at once, and an empty second segment.

    The second segment starts from the state after all tokens. Arguments as for `segments`.
    """
    max_count = min(programs_per_sm * multiprocessors // max(programs, 1), length // min_interval)
    length = max(length, 1)
    interval = ceil_div(length, max(max_count, 1) * 64) * 64
    return Segments(ceil_div(length, interval) * interval, interval, 2)


def power_of_two(size: int) -> int:
    """The least power of two that covers a head; a product on tensor cores needs 16."""
    return max(16, 1 << (size - 1).bit_length())
