"""Who holds what: the tokens and documents of one rank, and the ways of the states, in plain integers."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Route:
    """How states come to a rank: from its left in the forward pass, from its right in the backward pass.

    Attributes:
        sources: the ranks whose states make up the one that comes here; none where nothing comes.
        distances: tokens between each of them and this rank, over which its state decays on the way.
        source: the neighbour from which a state comes, or None.
        target: the neighbour to which one goes, or None.
        passing: the tokens of this rank, if what comes goes on to the target, decayed by them; else None.
    """

    sources: range
    distances: tuple[int, ...]
    source: int | None
    target: int | None
    passing: int | None


@dataclass(frozen=True)
class Slice:
    """What one rank holds.

    Attributes:
        documents: those that are here, in part or whole.
        cu_seqlens: where they begin and end in the slice.
        from_left: the route of states.
        from_right: the route of their gradients.
    """

    documents: range
    cu_seqlens: tuple[int, ...]
    from_left: Route
    from_right: Route

    @property
    def continues(self) -> bool:
        """Whether the first document begins on an earlier rank."""
        return self.from_left.source is not None

    @property
    def goes_on(self) -> bool:
        """Whether the last document ends on a later rank."""
        return self.from_left.target is not None

    @property
    def head(self) -> int:
        """Tokens of the document that continues."""
        return self.cu_seqlens[1] if self.continues else 0

    @property
    def tail(self) -> int:
        """Tokens of the document that goes on."""
        return self.cu_seqlens[-1] - self.cu_seqlens[-2] if self.goes_on else 0


def slice_of(rank: int, lengths: Sequence[int], bounds: Sequence[int] | None = None) -> Slice:
    """What `rank` holds, where the ranks hold `lengths` tokens in turn.

    Document n is `[bounds[n], bounds[n + 1])`. It lies on the ranks from that of its first token to that of its last
    one; an empty one on the first rank whose slice reaches it. Without bounds there is one document, on every rank.
    """
    stops = list(accumulate(lengths))
    starts = [stop - length for stop, length in zip(stops, lengths, strict=True)]
    start, stop = starts[rank], stops[rank]
    if bounds is None:
        documents, cu_seqlens = range(1), (0, stop - start)
        first, last = 0, len(lengths) - 1
    else:
        documents = _documents(start, stop, bounds, is_first=rank == 0)
        inside = bounds[documents.start : documents.stop + 1]
        cu_seqlens = tuple(min(max(bound, start), stop) - start for bound in inside)
        first = _first_rank(documents[0], bounds, stops) if documents else rank
        last = _last_rank(documents[-1], bounds, stops) if documents else rank
    before, after = range(first, rank), range(rank + 1, last + 1)
    left, right = (rank - 1 if before else None), (rank + 1 if after else None)
    passing = stop - start if before and after and len(documents) == 1 else None
    return Slice(
        documents,
        cu_seqlens,
        from_left=Route(before, tuple(start - stops[i] for i in before), left, right, passing),
        from_right=Route(after, tuple(starts[i] - stop for i in after), right, left, passing),
    )


def _documents(start: int, stop: int, bounds: Sequence[int], is_first: bool) -> range:
    """Those on the rank that holds `[start, stop)`: up to the first that begins on a later one."""
    low = 0 if is_first else bisect_right(bounds, start, lo=1) - 1
    begin_later, end_later = bisect_left(bounds, stop, hi=len(bounds) - 1), bisect_right(bounds, stop, lo=1) - 1
    return range(low, max(low, begin_later, end_later))


def _first_rank(document: int, bounds: Sequence[int], stops: Sequence[int]) -> int:
    begin, end = bounds[document], bounds[document + 1]
    return bisect_right(stops, begin) if begin < end else bisect_left(stops, end)


def _last_rank(document: int, bounds: Sequence[int], stops: Sequence[int]) -> int:
    return bisect_left(stops, bounds[document + 1])
