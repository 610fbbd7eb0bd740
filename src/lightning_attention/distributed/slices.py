"""Partition of the tokens over ranks: the sequences in each slice, and the routes of states, in plain integers."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Route:
    """Path of the states to a rank: from its left in the forward pass, from its right in the backward pass.

    Attributes:
        sources: ranks whose states add up to the incoming state; empty if nothing comes in.
        distances: tokens between each source and this rank; its state decays over them.
        source: neighbour that sends to this rank, or None.
        target: neighbour that this rank sends to, or None.
        passed_tokens: tokens of this rank, if the incoming state passes through to the target and decays over them;
            else None.
    """

    sources: range
    distances: tuple[int, ...]
    source: int | None
    target: int | None
    passed_tokens: int | None


@dataclass(frozen=True)
class Slice:
    """The tokens of one rank.

    Attributes:
        sequences: indices of the sequences with tokens here, complete or in part.
        cu_seqlens: their bounds within the slice.
        state_route: route of states, in the forward pass.
        gradient_route: route of their gradients, in the backward pass.
    """

    sequences: range
    cu_seqlens: tuple[int, ...]
    state_route: Route
    gradient_route: Route

    @property
    def starts_inside(self) -> bool:
        """True if the first sequence begins on an earlier rank."""
        return self.state_route.source is not None

    @property
    def ends_inside(self) -> bool:
        """True if the last sequence ends on a later rank."""
        return self.state_route.target is not None

    @property
    def prefix_length(self) -> int:
        """Number of tokens of a sequence that begins on an earlier rank."""
        return self.cu_seqlens[1] if self.starts_inside else 0

    @property
    def suffix_length(self) -> int:
        """Number of tokens of a sequence that ends on a later rank."""
        return self.cu_seqlens[-1] - self.cu_seqlens[-2] if self.ends_inside else 0


def local_slice(rank: int, lengths: Sequence[int], bounds: Sequence[int] | None = None) -> Slice:
    """Slice of `rank`, when the ranks hold `lengths` tokens in their order.

    Sequence n is `[bounds[n], bounds[n + 1])`. It lies on the ranks from its first token to its last one, an empty
    sequence on the first rank whose slice reaches it. Without bounds there is one sequence, on every rank.
    """
    stops = list(accumulate(lengths))
    starts = [stop - length for stop, length in zip(stops, lengths, strict=True)]
    start, stop = starts[rank], stops[rank]
    if bounds is None:
        sequences, cu_seqlens = range(1), (0, stop - start)
        first, last = 0, len(lengths) - 1
    else:
        sequences = _sequences(start, stop, bounds, is_first=rank == 0)
        inside = bounds[sequences.start : sequences.stop + 1]
        cu_seqlens = tuple(min(max(bound, start), stop) - start for bound in inside)
        first = _first_rank(sequences[0], bounds, stops) if sequences else rank
        last = _last_rank(sequences[-1], bounds, stops) if sequences else rank
    before, after = range(first, rank), range(rank + 1, last + 1)
    left, right = (rank - 1 if before else None), (rank + 1 if after else None)
    passed = stop - start if before and after and len(sequences) == 1 else None
    return Slice(
        sequences,
        cu_seqlens,
        state_route=Route(before, tuple(start - stops[i] for i in before), left, right, passed),
        gradient_route=Route(after, tuple(starts[i] - stop for i in after), right, left, passed),
    )


def _sequences(start: int, stop: int, bounds: Sequence[int], is_first: bool) -> range:
    """Sequences on the rank that holds `[start, stop)`: up to the first that begins on a later rank."""
    low = 0 if is_first else bisect_right(bounds, start, lo=1) - 1
    begin_later, end_later = bisect_left(bounds, stop, hi=len(bounds) - 1), bisect_right(bounds, stop, lo=1) - 1
    return range(low, max(low, begin_later, end_later))


def _first_rank(sequence: int, bounds: Sequence[int], stops: Sequence[int]) -> int:
    begin, end = bounds[sequence], bounds[sequence + 1]
    return bisect_right(stops, begin) if begin < end else bisect_left(stops, end)


def _last_rank(sequence: int, bounds: Sequence[int], stops: Sequence[int]) -> int:
    return bisect_left(stops, bounds[sequence + 1])
