"""Engines that decode from decoding states, and the log-probabilities of invariant models."""

from collections import defaultdict
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import make_config, make_model, tokens

from lightning_attention import DecodingState
from lightning_attention.inference import Engine, Output, SamplingOptions, StatePool
from lightning_attention.models import LightningForCausalLM

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="invariant models need MKL on a CPU")
GREEDY = SamplingOptions(max_new_tokens=40, temperature=0)
SAMPLED = SamplingOptions(max_new_tokens=40, temperature=1.0, seed=1)
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


def answers(engine: Engine, given: list[list[int]], options: SamplingOptions) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of every prompt; a prompt is submitted after each step."""
    outputs: dict[int, list[Output]] = defaultdict(list)
    requests = []
    waiting = list(given)
    while waiting or engine.has_work:
        if waiting:
            requests.append(engine.submit(waiting.pop(0), options, stop_token_ids=[], logprobs=0))
        for output in engine.step():
            outputs[output.request].append(output)
    found = []
    for request in requests:
        of_tokens = [output for output in outputs[request] if output.token is not None]
        assert all(output.logprobs is not None for output in of_tokens)
        found.append(
            ([o.token or 0 for o in of_tokens], [o.logprobs.chosen for o in of_tokens if o.logprobs is not None])
        )
    return found


def forward_logprobs(model: LightningForCausalLM, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities of every token but the first, by one training forward over packed sequences."""
    bounds = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    ids = torch.tensor([list(chain.from_iterable(sequences))])
    logits = model(ids, cu_seqlens=bounds, use_cache=False).logits[0]
    parts = zip(logits.split([len(x) for x in sequences]), sequences, strict=True)
    return [part[:-1].log_softmax(-1).gather(1, torch.tensor(x)[1:, None])[:, 0] for part, x in parts]


@needs_mkl
@every_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logprobs_of_an_invariant_engine_equal_those_of_a_training_forward(options, dtype):
    model = make_model(dtype, invariant=True, eos_token_id=None)
    engine = Engine(model, **options)
    given = prompts()
    found = answers(engine, given, SAMPLED)
    model.train()
    expected = forward_logprobs(model, [prompt + new for prompt, (new, _) in zip(given, found, strict=True)])
    for prompt, (new, logprobs), of_forward in zip(given, found, expected, strict=True):
        assert len(new) == 40
        assert logprobs == of_forward[len(prompt) - 1 :].tolist()


@needs_mkl
@settings(max_examples=5, deadline=None)
@given(
    max_requests=st.integers(1, 5), prefill_tokens=st.integers(1, 90), slots=st.integers(0, 4), block=st.integers(1, 70)
)
def test_answers_of_an_invariant_engine_do_not_depend_on_its_sizes(max_requests, prefill_tokens, slots, block):
    model = make_model(torch.float32, invariant=True, eos_token_id=None)
    given = prompts()[2:6]
    options = {"max_requests": max_requests, "prefill_tokens": prefill_tokens, "prefix_block": block}
    engine = Engine(model, prefix_slots=slots, **options)
    assert answers(engine, given, SAMPLED) == answers(Engine(model), given, SAMPLED)


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
    with pytest.raises(ValueError, match=r"states of torch.float32 and rings of torch.bfloat16"):
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
