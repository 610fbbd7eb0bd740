"""Something wrong on one rank is an error on every rank, at once, and the group stays usable."""

import pytest
import torch
from distributed import faults
from distributed.faults import DIFFERENT, LENGTHS, RAISED
from distributed.ranks import WORLD_SIZE

SECONDS = 20  # the timeout of the group is 90
OPTIONS = {
    f"{strategy}{', lengths' if lengths else ''}": {"strategy": strategy, "lengths": lengths}
    for strategy in ("all-gather", "ring")
    for lengths in (None, LENGTHS)
}
KINDS = ("ValueError", "TypeError", "NotImplementedError")
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def heard(error: str, rank: int) -> str:
    """What the other ranks say of an error: of its type, or a RuntimeError."""
    kind = error.partition(":")[0]
    return f"{kind if kind in KINDS else 'RuntimeError'}: rank {rank} raised {error}"


def assert_usable(outcomes) -> None:
    """The right call after the wrong one gives what one process gets."""
    output, final_state = faults.expected()
    torch.testing.assert_close(torch.cat([o for _, _, o, _ in outcomes], dim=1), output)
    torch.testing.assert_close(sum(state for *_, state in outcomes), final_state)


@options
@pytest.mark.parametrize("name", RAISED)
def test_an_error_on_one_rank_is_raised_on_all(ranks, name, options):
    _, message = RAISED[name]
    outcomes = ranks(faults.outcome, name, (1,), options)
    for rank, (complaint, seconds, *_) in enumerate(outcomes):
        assert complaint.startswith(message if rank == 1 else heard(message, 1)), rank
        assert seconds < SECONDS
    assert_usable(outcomes)


@options
@pytest.mark.parametrize("name", DIFFERENT)
def test_a_difference_between_ranks_is_an_error_on_all(ranks, name, options):
    _, message = DIFFERENT[name]
    outcomes = ranks(faults.outcome, name, (1,), options)
    for complaint, seconds, *_ in outcomes:
        assert complaint.startswith(f"ValueError: {message}")
        assert complaint.endswith("rank 1 differs from rank 0")
        assert seconds < SECONDS
    assert_usable(outcomes)


@pytest.mark.parametrize(
    ("faulty", "told"),
    [((0,), "ranks 1, 2, 3 differ"), ((3,), "rank 3 differs"), ((1, 2), "ranks 1, 2 differ")],
    ids=str,
)
@pytest.mark.parametrize("changes", [{"scale": 3.0}, {"strategy": "ring"}, {"lengths": LENGTHS}], ids="-".join)
def test_any_rank_may_differ(ranks, faulty, told, changes):
    outcomes = ranks(faults.outcome, changes, faulty, {})
    for complaint, *_ in outcomes:
        assert complaint.startswith(f"ValueError: {next(iter(changes))} must be the same on every rank of the group")
        assert complaint.endswith(f"{told} from rank 0")
    assert_usable(outcomes)


def test_several_errors_are_all_told(ranks):
    outcomes = ranks(faults.outcome_with_two_errors)
    for rank in (0, 2):
        complaint = outcomes[rank][0]
        assert complaint.startswith("ValueError: rank 1 raised ValueError: strategy must be one of")
        assert complaint.endswith("; rank 3 raised TypeError: q must be a dense tensor, got NoneType")
    assert outcomes[1][0].startswith("ValueError: strategy must be")
    assert outcomes[3][0].startswith("TypeError: q must be")
    assert_usable(outcomes)


@pytest.mark.parametrize("members", [(0, 1), (1, 3)], ids=str)
def test_ranks_of_other_groups_are_not_asked(ranks, members):
    error = "ValueError: strategy must be one of 'all-gather', 'ring', got 'tree'"
    complaints = ranks(faults.complaint_of_two, {"strategy": "tree"}, members=members)
    assert complaints == [f"ValueError: rank 1 raised {error}", error]


def test_what_is_no_group_is_refused(ranks):
    message = "TypeError: group must be a torch.distributed.ProcessGroup or None, got str"
    assert ranks(faults.complaint_about_group, "world") == [message] * WORLD_SIZE


@pytest.mark.parametrize(
    ("given", "count"),
    [({}, 1), ({"lengths": LENGTHS}, 1), ({"lengths": LENGTHS, "check": False}, 0)],
    ids=["checked", "lengths", "unchecked"],
)
def test_a_check_is_one_collective(ranks, given, count):
    assert ranks(faults.collectives, given) == [count] * WORLD_SIZE


def test_a_process_alone_makes_no_collective(ranks):
    assert ranks(faults.collectives, {}, members=(2,)) == [0]


@pytest.mark.parametrize("strategy", ["all-gather", "ring"])
def test_results_are_the_same_bits_without_checks(ranks, strategy):
    with_checks, without = (ranks(faults.results_by_check, check, strategy) for check in (True, False))
    for one, other in zip(with_checks, without, strict=True):
        assert all(map(torch.equal, one, other))


def test_without_checks_lengths_are_needed(ranks):
    for rank, (complaint, *_) in enumerate(ranks(faults.outcome, {"check": False}, range(WORLD_SIZE), {})):
        assert complaint.startswith("ValueError: lengths must be given with check=False"), rank


def test_without_checks_no_rank_waits_for_another(ranks):
    complaint, seconds = ranks(faults.complaint_of_one_rank)[1]
    assert complaint.startswith("ValueError: strategy must be one of")
    assert seconds < SECONDS
