"""State pool: slots are separate and checked."""

from typing import Any, cast

import pytest
import torch
from tiny_model import make_config

from lightning_attention.inference import PoolExhaustedError, StatePool


@pytest.fixture
def pool() -> StatePool:
    return StatePool(make_config(), 3)


def fill(pool: StatePool, slot: int, value: float) -> None:
    for states in pool.states:
        states[slot] = value


def values(pool: StatePool, slot: int) -> set[float]:
    return {x for states in pool.states for x in states[slot].flatten().tolist()}


def test_states_have_the_shapes_of_the_layers(pool):
    config = make_config()
    assert [states.shape for states in pool.states] == [(3, *config.layer_state_shape(i)) for i in range(3)]
    assert len({states.shape for states in pool.states}) == 2  # the first layer has LRPE-d
    assert pool.nbytes >= sum(states.nbytes for states in pool.states)


def test_slots_are_allocated_until_the_pool_is_exhausted(pool):
    slots = [pool.allocate() for _ in range(3)]
    assert sorted(slots) == [0, 1, 2]
    with pytest.raises(PoolExhaustedError, match="all 3 slots of the state pool are in use"):
        pool.allocate()
    pool.free(slots[1])
    assert pool.num_free == 1
    assert pool.allocate() == slots[1]


def test_operations_change_only_their_slots(pool):
    slots = [pool.allocate() for _ in range(3)]
    for slot in slots:
        fill(pool, slot, slot + 1)
    pool.copy(slots[0], slots[1])
    pool.zero([slots[2]])
    assert [values(pool, slot) for slot in slots] == [{slots[0] + 1}, {slots[0] + 1}, {0}]


def test_a_snapshot_restores_into_any_slot_and_pool(pool):
    first, second = pool.allocate(), pool.allocate()
    fill(pool, first, 7)
    snapshot = pool.snapshot(first)
    fill(pool, first, 8)
    other = StatePool(make_config(), 2)
    assert other.allocate() == 0
    other.restore(0, snapshot)
    pool.restore(second, snapshot)
    assert values(other, 0) == values(pool, second) == {7}
    assert values(pool, first) == {8}


def test_a_bfloat16_pool_takes_half_the_memory():
    pool = StatePool(make_config(), 2, dtype=torch.bfloat16)
    assert 2 * pool.nbytes == StatePool(make_config(), 2).nbytes


REFUSED = {
    "a slot that is not allocated": (lambda pool: pool.zero([1]), "slot 1 is not allocated"),
    "a slot that is not there": (lambda pool: pool.copy(0, 3), r"a slot must be in \[0, 3\), got 3"),
    "a negative slot": (lambda pool: pool.snapshot(-1), r"a slot must be in \[0, 3\), got -1"),
    "freeing twice": (lambda pool: (pool.free(0), pool.free(0)), "slot 0 is not allocated"),
    "another model's snapshot": (lambda pool: pool.restore(0, torch.zeros(5)), r"numbers of torch.float32, got \(5,\)"),
    "another dtype": (lambda pool: pool.restore(0, pool.snapshot(0).double()), "of torch.float32, got"),
    "no slots": (lambda _: StatePool(make_config(), 0), "num_slots must be at least 1, got 0"),
    "a text": (lambda _: StatePool(make_config(), cast(Any, "3")), "num_slots must be an integer, got '3'"),
    "bool states": (
        lambda _: StatePool(make_config(), 1, dtype=torch.bool),
        "dtype must be one of torch.float32, torch.bfloat16, torch.float64, got torch.bool",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_invalid_arguments_are_refused(pool, call, message):
    assert pool.allocate() == 0
    with pytest.raises((ValueError, TypeError), match=message):
        call(pool)
