"""Engines and pools with decoding states."""

from typing import Any

import pytest
import torch
from tiny_model import make_config, make_model, tokens

from lightning_attention import DecodingState
from lightning_attention.inference import Engine, SamplingOptions, StatePool

GREEDY = SamplingOptions(max_new_tokens=40, temperature=0)
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one request at a time": {"max_requests": 1},
    "small prompt chunks": {"prefill_tokens": 7},
    "prefix cache": {"prefix_slots": 6, "prefix_block": 4, "prefill_tokens": 50},
    "prefix cache and small prompt chunks": {"prefix_slots": 3, "prefix_block": 40, "prefill_tokens": 11},
}
every_engine = pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)


def prompts(seed: int = 0) -> list[list[int]]:
    """Prompts that end within chunks and at their edges, some with a common prefix."""
    common = tokens(40, seed=seed).tolist()
    lengths = (1, 3, 31, 32, 33, 64, 70)
    return [[*common[: n // 2], *tokens(n - n // 2, seed=seed + n).tolist()] for n in lengths]


@every_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_greedy_answers_equal_generate(options, dtype):
    model = make_model(dtype, eos_token_id=[3, 4]).eval()
    engine = Engine(model, ring=True, **options)
    assert all(isinstance(state, DecodingState) for state in engine.pool.states)
    for prompt, completion in zip(prompts(), engine.run(prompts(), GREEDY), strict=True):
        expected = model.generate(torch.tensor([prompt]), **GREEDY.for_generate())[0, len(prompt) :]
        assert completion.tokens == expected.tolist()


def test_a_snapshot_holds_the_ring():
    model = make_model(torch.float32).eval()
    pool = StatePool(model.config, 2, ring_dtype=torch.float32)
    first, second = pool.allocate(), pool.allocate()
    for state in pool.states:
        assert isinstance(state, DecodingState)
        for part in state:
            part[first] = 5
    pool.restore(second, pool.snapshot(first))
    for state in pool.states:
        assert all((part[second] == 5).all() for part in state)
    pool.zero([second])
    for state in pool.states:
        assert all((part[second] == 0).all() and (part[first] == 5).all() for part in state)


@pytest.mark.parametrize("other", [{}, {"dtype": torch.bfloat16}, {"ring_dtype": torch.float16}], ids=str)
def test_snapshots_of_pools_with_other_dtypes_are_refused(other):
    config = make_config()
    pool = StatePool(config, 1, ring_dtype=torch.bfloat16)
    source = StatePool(config, 1, **({"ring_dtype": torch.bfloat16} if "dtype" in other else {}), **other)
    slot, snapshot = pool.allocate(), source.snapshot(source.allocate())
    with pytest.raises(ValueError, match=r"whose states or rings have other dtypes|a snapshot of this pool is"):
        pool.restore(slot, snapshot)


@pytest.mark.parametrize(
    ("options", "ring", "error", "message"),
    [
        ({"invariant": True}, False, ValueError, "ring must be True for a model with invariant=True"),
        ({}, 1, TypeError, "ring must be True or False"),
    ],
    ids=["an invariant model without", "no bool"],
)
def test_a_ring_that_is_not_possible_is_refused(options, ring, error, message):
    with pytest.raises(error, match=message):
        Engine(make_model(torch.float32, **options), ring=ring)


def test_states_on_a_cpu_are_plain_unless_asked_for():
    assert all(isinstance(states, torch.Tensor) for states in Engine(make_model(torch.float32)).pool.states)
