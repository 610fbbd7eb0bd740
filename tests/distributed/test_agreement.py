"""A fault on one rank raises on every rank without a timeout, and the group stays usable."""

import pytest
import torch
from distributed import faults
from distributed.faults import DIFFERENT, LENGTHS, RAISED
from distributed.ranks import WORLD_SIZE

from lightning_attention import distributed

SECONDS = 20  # the timeout of the group is 90
OPTIONS = {
    f"{strategy}{', lengths' if lengths else ''}": {"strategy": strategy, "lengths": lengths}
    for strategy in ("all-gather", "ring")
    for lengths in (None, LENGTHS)
}
KINDS = ("ValueError", "TypeError", "NotImplementedError")
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def remote_error(error: str, rank: int) -> str:
    """Error that the other ranks raise: of the same type, or a RuntimeError."""
    kind = error.partition(":")[0]
    return f"{kind if kind in KINDS else 'RuntimeError'}: rank {rank} raised {error}"


def assert_usable(outcomes) -> None:
    """Check that the right call after the wrong one equals one process."""
    output, final_state = faults.expected()
    torch.testing.assert_close(torch.cat([o for _, _, o, _ in outcomes], dim=1), output)
    torch.testing.assert_close(sum(state for *_, state in outcomes), final_state)


@options
@pytest.mark.parametrize("name", RAISED)
def test_error_of_one_rank_raises_on_every_rank(ranks, name, options):
    _, message = RAISED[name]
    outcomes = ranks(faults.outcome, name, (1,), options)
    for rank, (error, seconds, *_) in enumerate(outcomes):
        assert error.startswith(message if rank == 1 else remote_error(message, 1)), rank
        assert seconds < SECONDS
    assert_usable(outcomes)


@options
@pytest.mark.parametrize("name", DIFFERENT)
def test_difference_between_ranks_raises_on_every_rank(ranks, name, options):
    _, message = DIFFERENT[name]
    outcomes = ranks(faults.outcome, name, (1,), options)
    for error, seconds, *_ in outcomes:
        assert error.startswith(f"ValueError: {message}")
        assert error.endswith("rank 1 differs from rank 0")
        assert seconds < SECONDS
    assert_usable(outcomes)


@pytest.mark.parametrize(
    ("faulty", "message"),
    [((0,), "ranks 1, 2, 3 differ"), ((3,), "rank 3 differs"), ((1, 2), "ranks 1, 2 differ")],
    ids=str,
)
@pytest.mark.parametrize("changes", [{"scale": 3.0}, {"strategy": "ring"}, {"lengths": LENGTHS}], ids="-".join)
def test_error_names_the_ranks_that_differ(ranks, faulty, message, changes):
    outcomes = ranks(faults.outcome, changes, faulty, {})
    for error, *_ in outcomes:
        assert error.startswith(f"ValueError: {next(iter(changes))} must be the same on every rank of the group")
        assert error.endswith(f"{message} from rank 0")
    assert_usable(outcomes)


def test_errors_of_several_ranks_are_all_named(ranks):
    outcomes = ranks(faults.outcome_with_two_errors)
    for rank in (0, 2):
        error = outcomes[rank][0]
        assert error.startswith("ValueError: rank 1 raised ValueError: strategy must be one of")
        assert error.endswith("; rank 3 raised TypeError: q must be a dense tensor, got NoneType")
    assert outcomes[1][0].startswith("ValueError: strategy must be")
    assert outcomes[3][0].startswith("TypeError: q must be")
    assert_usable(outcomes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "tree"}, "ValueError: strategy must be one of 'all-gather', 'ring', got 'tree'"),
        ({"cu_seqlens": torch.tensor([0, 4, 5])}, "ValueError: cu_seqlens must run from 0 to T = 9, got 0 to 5"),
        ({"cu_seqlens": torch.tensor([0, 10, 9])}, "ValueError: cu_seqlens must not decrease"),
    ],
    ids=["strategy", "cu_seqlens too short", "cu_seqlens falling"],
)
def test_common_error_is_raised_by_every_rank_itself(ranks, changes, message):
    outcomes = ranks(faults.outcome, changes, range(WORLD_SIZE), {})
    assert all(error.startswith(message) for error, *_ in outcomes)
    assert_usable(outcomes)


def test_process_outside_the_group_is_refused(ranks):
    message = "ValueError: group must contain this process, got one without rank"
    assert ranks(faults.error_outside_the_group)[2:] == [f"{message} 2", f"{message} 3"]


def test_uninitialised_process_group_is_refused():
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group first"):
        distributed.lightning_attention(**faults.all_arguments())


@pytest.mark.parametrize("members", [(0, 1), (1, 3)], ids=str)
def test_ranks_outside_the_group_take_no_part(ranks, members):
    error = "ValueError: strategy must be one of 'all-gather', 'ring', got 'tree'"
    errors = ranks(faults.error_in_a_group_of_two, {"strategy": "tree"}, members=members)
    assert errors == [f"ValueError: rank 1 raised {error}", error]


def test_bad_group_is_refused(ranks):
    message = "TypeError: group must be a torch.distributed.ProcessGroup or None, got str"
    assert ranks(faults.error_of_bad_group, "world") == [message] * WORLD_SIZE


@pytest.mark.parametrize(
    ("given", "count"),
    [({}, 1), ({"lengths": LENGTHS}, 1), ({"lengths": LENGTHS, "check": False}, 0)],
    ids=["checked", "lengths", "unchecked"],
)
def test_check_is_one_collective(ranks, given, count):
    assert ranks(faults.collectives, given) == [count] * WORLD_SIZE


def test_group_of_one_makes_no_collective(ranks):
    assert ranks(faults.collectives, {}, members=(2,)) == [0]


@pytest.mark.parametrize("strategy", ["all-gather", "ring"])
def test_unchecked_equals_checked(ranks, strategy):
    with_checks, without = (ranks(faults.results_by_check, check, strategy) for check in (True, False))
    for one, other in zip(with_checks, without, strict=True):
        assert all(map(torch.equal, one, other))


def test_unchecked_calls_need_lengths(ranks):
    for rank, (error, *_) in enumerate(ranks(faults.outcome, {"check": False}, range(WORLD_SIZE), {})):
        assert error.startswith("ValueError: lengths must be given with check=False"), rank


def test_unchecked_calls_do_not_wait_for_other_ranks(ranks):
    error, seconds = ranks(faults.error_of_one_rank)[1]
    assert error.startswith("ValueError: strategy must be one of")
    assert seconds < SECONDS
