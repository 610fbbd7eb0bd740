"""Attention over several processes equals one process with all tokens."""

import inspect
from itertools import pairwise, zip_longest

import pytest
import torch
import torch.distributed as dist
from distributed import ranks as jobs
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, assert_accurate, attention, definition, error, make_inputs, needs_two_gpus, run
from torch import Tensor

from lightning_attention.distributed.exchange import RING_BLOCKS
from lightning_attention.ops.chunked import CHUNK_SIZE
from lightning_attention.ops.problem import DTYPES

C = CHUNK_SIZE
STRATEGIES = ("all-gather", "ring")
EVERYONE = range(jobs.WORLD_SIZE)

CASES = [
    (Case(T=40), (10, 10, 10, 10)),
    (Case(), (3, 0, 30, 4)),
    (Case(), (0, 37, 0, 0)),
    (Case(), (0, 0, 0, 37)),
    (Case(T=0), (0, 0, 0, 0)),
    (Case(state=False, V=5), (20, 1, 1, 15)),
    (Case(K=5, V=1, H=1, B=1), (9, 9, 9, 10)),
    (Case(slope=None, scale=0.3), (9, 9, 9, 10)),
    (Case(slope=100.0), (9, 9, 9, 10)),
    (Case(slope=float("inf")), (9, 0, 18, 10)),
    (Case(slope=1e-3, T=3 * C, K=4, V=4), (C, 5, C + 20, C - 25)),
    (Case(K=3, V=0), (9, 9, 9, 10)),
    (Case(lengths=(37,)), (10, 10, 10, 7)),
    (Case(lengths=(10, 10, 10, 7)), (10, 10, 10, 7)),
    (Case(lengths=(0, 0, 12, 0, 20, 0, 5, 0)), (12, 0, 20, 5)),
    (Case(lengths=(3, 4, 25, 2, 3), state=False), (5, 6, 6, 20)),
    (Case(lengths=(1, 30, 6), slope=50.0), (0, 10, 10, 17)),
    (Case(lengths=(20, 17), slope=None), (30, 0, 0, 7)),
    (Case(lengths=(20, 17), slope=float("inf")), (5, 5, 15, 12)),
    (Case(lengths=(0, 0)), (0, 0, 0, 0)),
]


def joined(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate tokens over the ranks, and sum states, which are zero except on one rank."""
    tokens = {name: torch.cat([result[name] for result in results], dim=1) for name in ("o", "dq", "dk", "dv")}
    states = (name for name in ("final_state", "dinitial_state") if name in results[0])
    return tokens | {name: torch.stack([result[name] for result in results]).sum(0) for name in states}


def assert_exact(results: list[dict[str, Tensor]], exact: dict[str, Tensor]) -> None:
    actual = joined(results)
    for name, value in exact.items():
        assert actual[name].shape == value.shape, name
        assert error(actual[name], value) < 1e-12, name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("case", "lengths"), CASES, ids=str)
def test_ranks_equal_one_process(ranks, case, lengths, strategy):
    results = ranks(jobs.results, case, torch.float64, lengths, {"strategy": strategy})
    assert_exact(results, run(definition, make_inputs(case)))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("case", "lengths"), [(Case(T=2 * C), (C, 0, C - 7, 7)), (Case(lengths=(3, 50, 1)), (20, 20, 12, 2))], ids=str
)
def test_every_dtype_is_as_accurate_as_plain_pytorch(ranks, case, lengths, strategy, dtype):
    actual = joined(ranks(jobs.results, case, dtype, lengths, {"strategy": strategy}))
    assert actual["o"].dtype == dtype
    assert_accurate(actual, make_inputs(case, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("case", "lengths"), [(Case(T=2 * C), (C, 0, C - 7, 7)), (Case(lengths=(3, 250, 1)), (80, 80, 72, 22))], ids=str
)
def test_one_gpu_is_as_accurate_as_plain_pytorch(ranks, case, lengths, strategy, dtype):
    actual = joined(ranks(jobs.results_on_a_gpu, case, dtype, lengths, strategy))
    assert_accurate(actual, make_inputs(case, dtype))


@pytest.mark.gpu
@pytest.mark.nccl
@needs_two_gpus
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("case", "lengths"),
    [
        (Case(T=3 * C), (C, 0, C - 7, C + 7)),
        (Case(lengths=(3, 250, 1)), (80, 80, 72, 22)),
        (Case(B=1, T=700, H=8, K=64, V=64, slope=0.01), (350, 120, 230, 0)),
    ],
    ids=str,
)
def test_nccl_is_as_accurate_as_plain_pytorch(ranks, case, lengths, strategy, dtype):
    """Tokens of ranks without a GPU go to the last rank with one."""
    count = min(torch.cuda.device_count(), jobs.WORLD_SIZE)
    lengths = [*lengths[: count - 1], sum(lengths[count - 1 :])]
    for known in ({}, {"lengths": lengths}):
        options = {"strategy": strategy} | known
        actual = joined(ranks(jobs.results_over_nccl, case, dtype, lengths, options, members=range(count)))
        assert_accurate(actual, make_inputs(case, dtype))


@pytest.mark.gpu
@pytest.mark.nccl
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nccl_group_of_one_equals_one_process(tmp_path, strategy):
    inputs = make_inputs(Case(lengths=(3, 250, 1)), torch.float32).on("cuda")
    expected = run(attention(), inputs)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        actual = run(jobs.attention(None, strategy=strategy), inputs)
    finally:
        dist.destroy_process_group()
    for name, value in expected.items():
        assert error(actual[name], value.double()) < 1e-6, name


@st.composite
def layouts(draw) -> tuple[Case, list[int]]:
    lengths = draw(st.lists(st.integers(0, 12), min_size=4, max_size=4))
    total = sum(lengths)
    bounds = [0, *sorted(draw(st.lists(st.integers(0, total), max_size=5))), total]
    sequences = tuple(end - begin for begin, end in pairwise(bounds))
    slope = draw(st.sampled_from([None, 0.1, 3.0, 200.0]))
    return Case(lengths=sequences, K=3, V=4, H=2, slope=slope, state=draw(st.booleans())), lengths


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), strategy=st.sampled_from(STRATEGIES))
def test_any_partition_of_sequences_equals_one_process(ranks, layout, strategy):
    case, lengths = layout
    results = ranks(jobs.results, case, torch.float64, lengths, {"strategy": strategy})
    assert_exact(results, run(definition, make_inputs(case)))


CAN_REORDER = "sort_ranks" in inspect.signature(dist.new_group).parameters


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("members", "lengths"),
    [
        ((2,), (37,)),
        ((0, 1), (20, 17)),
        ((1, 3), (20, 17)),
        ((0, 2, 3), (20, 0, 17)),
        pytest.param((3, 1), (20, 17), marks=pytest.mark.skipif(not CAN_REORDER, reason="groups are sorted")),
    ],
    ids=str,
)
def test_ranks_follow_the_order_of_the_group(ranks, members, lengths, strategy):
    case = Case()
    results = ranks(jobs.results, case, torch.float64, lengths, {"strategy": strategy}, members=members)
    assert_exact(results, run(definition, make_inputs(case)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "detached",
    [("o",), ("final_state",), ("q",), ("k", "v"), ("q", "k", "v"), ("k", "v", "initial_state"), ("initial_state",)],
    ids="-".join,
)
@pytest.mark.parametrize(
    ("case", "lengths"), [(Case(), (9, 9, 0, 19)), (Case(lengths=(9, 20, 0, 8)), (9, 9, 9, 10))], ids=str
)
def test_partial_gradients_equal_one_process(ranks, case, lengths, detached, strategy):
    """Every rank joins the exchange, also if it needs no gradient itself."""
    results = ranks(jobs.results, case, torch.float64, lengths, {"strategy": strategy}, detached)
    assert_exact(results, run(jobs.without(definition, detached), make_inputs(case)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_long_slices_equal_one_process(ranks, strategy):
    case, lengths = Case(), (10, 11, 12, 4)
    results = ranks(jobs.results, case, torch.float64, lengths, {"strategy": strategy}, (), 5)
    assert_exact(results, run(definition, make_inputs(case)))


PACKED = Case(lengths=(0, 12, 0, 20, 5))
PACKED_RANKS = (5, 10, 0, 22)


@pytest.mark.parametrize(
    ("case", "lengths", "begin", "end"),
    [
        (Case(), (0, 18, 19, 0), [0, 0], [3, 3]),
        (PACKED, PACKED_RANKS, [0, 0, 1, 1, 3], [0, 1, 1, 3, 3]),
    ],
    ids=["batch", "packed"],
)
def test_states_lie_where_sequences_begin_and_end(ranks, case, lengths, begin, end):
    results = ranks(jobs.results, case, torch.float64, lengths, {})
    gradients = ranks(jobs.gradients, case, lengths, {})
    for rank in EVERYONE:
        assert results[rank]["final_state"].flatten(1).any(dim=1).tolist() == [owner == rank for owner in end]
        assert gradients[rank]["initial_state"].flatten(1).any(dim=1).tolist() == [owner == rank for owner in begin]
        assert gradients[rank]["k"].shape[1] == lengths[rank]


@pytest.mark.parametrize("given", [{"strategy": "ring"}, {"lengths": PACKED_RANKS}, {"backend": "reference"}], ids=str)
def test_options_keep_results(ranks, given):
    default = joined(ranks(jobs.results, PACKED, torch.float64, PACKED_RANKS, {}))
    assert_exact(ranks(jobs.results, PACKED, torch.float64, PACKED_RANKS, given), default)


def test_checkpointed_equals_one_process(ranks):
    results = ranks(jobs.results_checkpointed, Case(), (9, 9, 9, 10), {})
    assert_exact(results, run(definition, make_inputs(Case())))


def test_autocast_equals_cast_inputs(ranks):
    for under, plain in ranks(jobs.output_under_autocast, Case(), (9, 9, 9, 10)):
        assert torch.equal(under, plain)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_results_are_deterministic(ranks, strategy):
    job = jobs.results, Case(T=200, B=3), torch.float32, (60, 50, 50, 40), {"strategy": strategy}
    for first, second in zip(ranks(*job), ranks(*job), strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def state_bytes(case: Case, dtype: torch.dtype) -> int:
    batch = case.B if case.lengths is None else 1
    return batch * case.H * case.K * case.V * (8 if dtype == torch.float64 else 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 50])
def test_only_states_are_sent(ranks, tokens, dtype):
    case, lengths = Case(T=4 * tokens), [tokens] * 4
    S = state_bytes(case, dtype)
    assert ranks(jobs.bytes_sent, case, dtype, lengths, "all-gather") == [(3 * S, 3 * S)] * 4
    assert ranks(jobs.bytes_sent, case, dtype, lengths, "ring") == [(S, 0), (S, S), (S, S), (0, S)]


def test_ring_sends_only_where_sequences_cross(ranks):
    case = Case(lengths=(10, 20, 10))
    S = state_bytes(case, torch.float64)
    sent = ranks(jobs.bytes_sent, case, torch.float64, (10, 10, 10, 10), "ring")
    assert sent == [(0, 0), (S, 0), (0, S), (0, 0)]


def batches(left: int | None, right: int | None, passes: bool) -> list[list[tuple[str, int]]]:
    """Batches of a rank: receives from the left, sends to the right, one batch later if the state passes through."""
    received = [] if left is None else [[("irecv", left)]] * RING_BLOCKS
    sent = [] if right is None else [[]] * passes + [[("isend", right)]] * RING_BLOCKS
    return [receives + sends for receives, sends in zip_longest(received, sent, fillvalue=[])]


@pytest.mark.parametrize("members", [(0, 1, 2, 3), (0, 2, 3)], ids=str)
def test_ring_sends_and_receives_at_once(ranks, members):
    """Also if a sequence begins and ends inside a slice, so that no state passes through its rank."""
    last = len(members) - 1
    for case, passes in ((Case(B=1, T=10 * len(members)), True), (Case(lengths=(15, 10 * last - 5)), False)):
        made = ranks(jobs.batches, case, [10] * len(members), members=members)
        for rank, found in enumerate(made):
            left, right = (rank - 1 if rank else None), (rank + 1 if rank < last else None)
            goes_through = left is not None and right is not None and (passes or rank > 1)
            assert found == batches(left, right, goes_through) + batches(right, left, goes_through), rank


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_directions_overlap_the_local_work(ranks, strategy):
    layer = ["launch", "forward", "wait"]
    layer_backward = ["launch", "backward", "wait"]
    for happened in ranks(jobs.events, Case(), (9, 9, 9, 10), strategy):
        assert happened == layer * 2 + layer_backward * 2
