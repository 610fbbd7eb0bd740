"""A model whose tokens are shared learns what it would learn alone."""

import pytest
from distributed import models as jobs

CASES = [(24, [], 24), (41, [], 10), (41, [7, 10, 20, 21], 10), (33, [5, 16], 40), (13, [1, 2, 3], 3)]


@pytest.mark.parametrize("strategy", ["all-gather", "ring"])
@pytest.mark.parametrize("members", [(0, 1), (0, 1, 2, 3)], ids=["two", "four"])
@pytest.mark.parametrize(("T", "starts", "segment_length"), CASES)
def test_gradients_by_segments(ranks, T, starts, segment_length, members, strategy):
    """Sum over the processes, which share every segment; some have no token of the last one."""
    expected = jobs.gradients_of_whole(T, starts)
    parts = ranks(jobs.gradients_by_segments, T, starts, segment_length, strategy, members=members)
    largest = max(x.norm() for x in expected.values())
    for name, exact in expected.items():
        error = (sum(part[name] for part in parts) - exact).norm() / max(exact.norm(), largest / 100)
        assert error < (1e-6 if "theta" in name else 1e-10), name


@pytest.mark.parametrize("members", [(0, 1), (0, 1, 2, 3)], ids=["two", "four"])
def test_gradients_of_a_sharded_model(ranks, members):
    """By segments they are those of the whole rows, which the processes average once."""
    expected = ranks(jobs.gradients_sharded, 29, None, members=members)[0]
    actual = ranks(jobs.gradients_sharded, 29, 8, members=members)[0]
    assert len(expected) > 10
    largest = max(x.norm() for x in expected.values())
    for name, exact in expected.items():
        assert (actual[name] - exact).norm() < 1e-5 * max(exact.norm(), largest / 100), name
