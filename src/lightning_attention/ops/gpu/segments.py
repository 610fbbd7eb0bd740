"""Cuts of sequences for the programs of a GPU."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Segments:
    """Equal shares of a batch row, one a program.

    A segment starts from the states that the intervals before it leave; a segment holds one interval or more.

    Attributes:
        length: tokens of a segment; the last one may be shorter.
        interval: tokens of an interval.
        count: number of segments.
        num_uncut: number of heads of all batch rows, the first ones, that are not cut.
    """

    length: int
    interval: int
    count: int
    num_uncut: int = 0

    @property
    def num_intervals(self) -> int:
        """Intervals before the last segment, which no other segment follows."""
        return (self.count - 1) * (self.length // self.interval)


def one_segment(length: int) -> Segments:
    """A batch row that is not cut."""
    return Segments(max(length, 1), max(length, 1), 1)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
