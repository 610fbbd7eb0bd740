"""Sequence parallelism gives the same bits for the same number of ranks and the same inputs."""

import pytest
import torch
from distributed.ranks import results
from oracle import Case

CASE = Case(lengths=(50, 30), H=2, K=16, V=16)
SLICES = {"halves": (40, 40), "others": (13, 67)}


@pytest.mark.parametrize("strategy", ["all-gather", "ring"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", SLICES.values(), ids=SLICES)
def test_repeated_runs_of_two_ranks_are_equal(ranks, lengths, dtype, strategy):
    first, second = (ranks(results, CASE, dtype, lengths, {"strategy": strategy}, members=(0, 1)) for _ in range(2))
    for found, expected in zip(first, second, strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
