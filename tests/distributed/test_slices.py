"""Who holds what, against a list of all tokens."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_attention.distributed.slices import local_slice


@st.composite
def layouts(draw) -> tuple[list[int], list[int]]:
    """The tokens of every rank, and the bounds of documents over as many."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    total = sum(lengths)
    cuts = draw(st.lists(st.integers(0, total), max_size=6)) if total or draw(st.booleans()) else None
    return lengths, [0] if cuts is None else [0, *sorted(cuts), total]


def ranks_of(lengths: list[int]) -> list[int]:
    """Of every token."""
    return [rank for rank, length in enumerate(lengths) for _ in range(length)]


def documents_of(bounds: list[int]) -> list[int]:
    """Of every token."""
    return [n for n, (begin, end) in enumerate(pairwise(bounds)) for _ in range(begin, end)]


@given(layouts())
def test_every_token_is_in_its_document(layout):
    lengths, bounds = layout
    ranks, documents = ranks_of(lengths), documents_of(bounds)
    for rank, length in enumerate(lengths):
        held = local_slice(rank, lengths, bounds)
        assert held.cu_seqlens[0] == 0
        assert held.cu_seqlens[-1] == length
        here = [
            document
            for document, (begin, end) in zip(held.sequences, pairwise(held.cu_seqlens), strict=True)
            for _ in range(begin, end)
        ]
        assert here == [document for token, document in enumerate(documents) if ranks[token] == rank]


@given(layouts())
def test_every_document_begins_once_and_ends_once(layout):
    lengths, bounds = layout
    begun, ended = [], []
    for rank in range(len(lengths)):
        held = local_slice(rank, lengths, bounds)
        begun += held.sequences[held.starts_inside :]
        ended += held.sequences[: len(held.sequences) - held.ends_inside]
    assert begun == ended == list(range(len(bounds) - 1))


@given(layouts())
def test_states_come_from_all_earlier_tokens_of_the_document(layout):
    lengths, bounds = layout
    ranks, documents = ranks_of(lengths), documents_of(bounds)
    starts = [0, *accumulate(lengths)]
    slices = [local_slice(rank, lengths, bounds) for rank in range(len(lengths))]
    for rank, held in enumerate(slices):
        sources = held.state_route.sources
        tails = [token for i in sources for token in range(starts[i + 1] - slices[i].suffix_length, starts[i + 1])]
        if held.prefix_length:
            document = documents[starts[rank]]
            assert tails == [t for t in range(starts[rank]) if documents[t] == document]
            assert held.prefix_length == sum(documents[t] == document for t in range(len(ranks)) if ranks[t] == rank)
        elif lengths[rank]:
            assert not held.starts_inside
        assert list(held.state_route.distances) == [starts[rank] - starts[i + 1] for i in sources]


@given(layouts(), st.booleans())
def test_gradients_go_the_way_of_states_back(layout, packed):
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
def test_a_chain_of_neighbours_gives_the_same_sum(layout):
    """The sources are the ranks that a chain comes from, and the distances what it passes through."""
    lengths, bounds = layout
    chain: dict[int, int] = {}  # of every source, the tokens since
    for rank in range(len(lengths)):
        route = local_slice(rank, lengths, bounds).state_route
        assert chain == dict(zip(route.sources, route.distances, strict=True))
        passed = (
            {} if route.passed_tokens is None else {i: distance + route.passed_tokens for i, distance in chain.items()}
        )
        chain = {**passed, rank: 0} if route.target is not None else {}


@pytest.mark.parametrize("lengths", [[3], [0, 4, 0], [0, 0]], ids=str)
def test_without_bounds_the_document_is_on_every_rank(lengths):
    for rank, length in enumerate(lengths):
        held = local_slice(rank, lengths)
        assert held.sequences == range(1)
        assert held.cu_seqlens == (0, length)
        assert held.starts_inside == (rank > 0)
        assert held.ends_inside == (rank < len(lengths) - 1)


def test_an_empty_document_is_on_the_first_rank_that_reaches_it():
    documents = [local_slice(rank, [0, 2, 0, 3], [0, 0, 2, 2, 5, 5]).sequences for rank in range(4)]
    assert documents == [range(0, 1), range(1, 3), range(3, 3), range(3, 5)]
