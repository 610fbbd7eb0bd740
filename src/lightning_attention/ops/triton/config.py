"""How the work is cut: tiles from the sizes of the heads, segments from how many programs there are. Pure functions."""

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch

MAX_HEAD_DIM = 256

# Drafts in a tree: the ancestors of one are the bits of an integer.
MAX_TREE = 64

# Tokens of one program that reads a state: so many that the state is at most a tenth of what it loads.
PIECE_LENGTH = 1024

# States of intervals that a program sums by itself; of more, another kernel makes the sums.
MAX_SUMMED = 12
# Elements of a state that a program accumulates, its warps, and how many intervals it loads ahead.
ACCUMULATED = 256, 2, 16

# Inputs are at least so many times as large as the states of intervals, where a segment has several.
INPUTS_OVER_STATES = 24


@dataclass(frozen=True)
class Tiles:
    """Of one program of a scan: C tokens by BK by BV, with `programs_per_sm` of them at once on a multiprocessor."""

    C: int
    BK: int
    BV: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


@dataclass(frozen=True)
class Segments:
    """Of a row, one a program. A segment starts from the state after the intervals before it."""

    length: int
    interval: int
    count: int

    @property
    def num_intervals(self) -> int:
        """Those before the last segment: no other segment starts after it."""
        return (self.count - 1) * (self.length // self.interval)


@cache
def scan_tiles(key_dim: int, value_dim: int, dtype: torch.dtype, precision: str) -> Tiles:
    """Chosen by trials on an H200 from those that fit the 99 KB of shared memory of the smallest chips.

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
    most = 32 if dtype == torch.float16 and BK > 128 else 64
    return Tiles(32 if BK <= 128 else 16, BK, min(BV, most), num_warps=4, num_stages=4, programs_per_sm=2)


@cache
def interval_tiles(key_dim: int, value_dim: int, dtype: torch.dtype, precision: str) -> Tiles:
    """The states alone leave room for chunks twice as long."""
    tiles = scan_tiles(key_dim, value_dim, dtype, precision)
    return tiles if dtype == torch.float32 else replace(tiles, C=2 * tiles.C, num_stages=3)


@cache
def step_tiles(key_dim: int, value_dim: int) -> tuple[int, int]:
    """BK and BV of the decoding kernel: about 4096 elements of the state, 32 a thread."""
    BK = power_of_two(key_dim)
    return BK, min(power_of_two(value_dim), max(16, 4096 // BK))


@cache
def verify_tiles(key_dim: int, value_dim: int, num_drafts: int) -> tuple[int, int, int, int]:
    """C, BK, BV and num_warps of the kernel for drafts, whose float32 products want registers."""
    C, (BK, BV) = power_of_two(num_drafts), step_tiles(key_dim, value_dim)
    return C, BK, BV if C <= 32 else 16, 4 if C <= 16 else 8


@cache
def min_interval(key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
    """Tokens of one of several intervals in a segment, at least: 2048 for heads of 128 in 16 bits."""
    state_bytes, token_bytes = 4 * key_dim * value_dim, (2 * key_dim + value_dim) * dtype.itemsize
    return max(256, ceil_div(INPUTS_OVER_STATES * state_bytes, token_bytes))


@lru_cache(1024)
def segments(length: int, programs: int, multiprocessors: int, programs_per_sm: int, min_interval: int) -> Segments:
    """As many as take least time, by what was measured on an H200, among those that the device runs at once.

    Args:
        length: tokens T of a row.
        programs: that work if rows are not cut.
        multiprocessors: of the device.
        programs_per_sm: that one of them holds at once.
        min_interval: tokens of one of several intervals in a segment, at least.
    """

    def time(count: int) -> float:
        """Of a scan, in that of a token where one program has a multiprocessor for itself."""
        if count == 1:
            return length
        sharing = 1.4 if programs * count > multiprocessors else 1.0
        launch = 160
        states = 15 * count if count <= MAX_SUMMED + 1 else 100 + 4 * count
        return launch + (1.25 * length / count + states) * sharing

    most = min(programs_per_sm * multiprocessors // max(programs, 1), length // 64)
    count = min(range(1, most + 1), key=time, default=1)
    if count == 1:
        return Segments(max(length, 1), max(length, 1), 1)
    intervals = max(1, length // count // min_interval)
    interval = ceil_div(length, count * intervals * 64) * 64
    return Segments(intervals * interval, interval, ceil_div(length, intervals * interval))


@lru_cache(1024)
def whole_row(length: int, programs: int, multiprocessors: int, programs_per_sm: int, min_interval: int) -> Segments:
    """A row as one segment, cut into intervals for as many programs as the device runs at once.

    The state after it is that from which a second segment, without tokens, would start. Arguments as for `segments`.
    """
    most = min(programs_per_sm * multiprocessors // max(programs, 1), length // min_interval)
    length = max(length, 1)
    interval = ceil_div(length, max(most, 1) * 64) * 64
    return Segments(ceil_div(length, interval) * interval, interval, 2)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(size: int) -> int:
    """That covers a head; a product on tensor cores needs 16."""
    return max(16, 1 << (size - 1).bit_length())
