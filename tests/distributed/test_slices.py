"""Partition of the tokens over ranks, compared with a list of all tokens."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_attention.distributed.slices import local_slice


@st.composite
def layouts(draw) -> tuple[list[int], list[int]]:
    """Number of tokens of every rank, and bounds of sequences over the sum."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    total = sum(lengths)
    cuts = draw(st.lists(st.integers(0, total), max_size=6)) if total or draw(st.booleans()) else None
    return lengths, [0] if cuts is None else [0, *sorted(cuts), total]


def ranks_of(lengths: list[int]) -> list[int]:
    """Rank of every token."""
    return [rank for rank, length in enumerate(lengths) for _ in range(length)]


def sequences_of(bounds: list[int]) -> list[int]:
    """Sequence of every token."""
    return [n for n, (begin, end) in enumerate(pairwise(bounds)) for _ in range(begin, end)]


@given(layouts())
def test_every_token_lies_in_its_sequence(layout):
    lengths, bounds = layout
    ranks, sequences = ranks_of(lengths), sequences_of(bounds)
    for rank, length in enumerate(lengths):
        local = local_slice(rank, lengths, bounds)
        assert local.cu_seqlens[0] == 0
        assert local.cu_seqlens[-1] == length
        here = [
            sequence
            for sequence, (begin, end) in zip(local.sequences, pairwise(local.cu_seqlens), strict=True)
            for _ in range(begin, end)
        ]
        assert here == [sequence for token, sequence in enumerate(sequences) if ranks[token] == rank]


@given(layouts())
def test_every_sequence_begins_and_ends_once(layout):
    lengths, bounds = layout
    begun, ended = [], []
    for rank in range(len(lengths)):
        local = local_slice(rank, lengths, bounds)
        begun += local.sequences[local.starts_inside :]
        ended += local.sequences[: len(local.sequences) - local.ends_inside]
    assert begun == ended == list(range(len(bounds) - 1))


@given(layouts())
def test_states_come_from_all_earlier_tokens_of_their_sequence(layout):
    lengths, bounds = layout
    ranks, sequences = ranks_of(lengths), sequences_of(bounds)
    starts = [0, *accumulate(lengths)]
    slices = [local_slice(rank, lengths, bounds) for rank in range(len(lengths))]
    for rank, local in enumerate(slices):
        sources = local.state_route.sources
        tails = [token for i in sources for token in range(starts[i + 1] - slices[i].suffix_length, starts[i + 1])]
        if local.prefix_length:
            sequence = sequences[starts[rank]]
            assert tails == [t for t in range(starts[rank]) if sequences[t] == sequence]
            assert local.prefix_length == sum(sequences[t] == sequence for t in range(len(ranks)) if ranks[t] == rank)
        elif lengths[rank]:
            assert not local.starts_inside
        assert list(local.state_route.distances) == [starts[rank] - starts[i + 1] for i in sources]


@given(layouts(), st.booleans())
def test_gradients_take_the_reverse_route_of_states(layout, packed):
    lengths, bounds = layout
    slices = [local_slice(rank, lengths, bounds if packed else None) for rank in range(len(lengths))]
    for left, right in pairwise(slices):
        assert left.ends_inside == right.starts_inside
    for i, earlier in enumerate(slices):
        for j, later in enumerate(slices):
            assert (i in later.state_route.sources) == (j in earlier.gradient_route.sources)
            if i in later.state_route.sources:
                distance = later.state_route.distances[later.state_route.sources.index(i)]
                assert distance == earlier.gradient_route.distances[earlier.gradient_route.sources.index(j)] >= 0


@given(layouts())
def test_chain_of_neighbours_has_the_same_sources_and_distances(layout):
    lengths, bounds = layout
    chain: dict[int, int] = {}  # distance of every source
    for rank in range(len(lengths)):
        route = local_slice(rank, lengths, bounds).state_route
        assert chain == dict(zip(route.sources, route.distances, strict=True))
        passed = (
            {} if route.passed_tokens is None else {i: distance + route.passed_tokens for i, distance in chain.items()}
        )
        chain = {**passed, rank: 0} if route.target is not None else {}


@pytest.mark.parametrize("lengths", [[3], [0, 4, 0], [0, 0]], ids=str)
def test_sequence_without_bounds_lies_on_every_rank(lengths):
    for rank, length in enumerate(lengths):
        local = local_slice(rank, lengths)
        assert local.sequences == range(1)
        assert local.cu_seqlens == (0, length)
        assert local.starts_inside == (rank > 0)
        assert local.ends_inside == (rank < len(lengths) - 1)


def test_empty_sequence_lies_on_the_first_rank_that_reaches_it():
    sequences = [local_slice(rank, [0, 2, 0, 3], [0, 0, 2, 2, 5, 5]).sequences for rank in range(4)]
    assert sequences == [range(0, 1), range(1, 3), range(3, 3), range(3, 5)]
