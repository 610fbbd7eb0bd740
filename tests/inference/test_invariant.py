"""An engine on an invariant model gives the log-probabilities of one forward pass, to the last bit, on a CPU."""

from typing import Any

import pytest
import torch
from tiny_model import make_model, tokens

from lightning_attention.inference import Engine, SamplingOptions
from lightning_attention.models import LightningForCausalLM

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
ENGINES = {
    "all at once": {},
    "one request at a time": {"max_requests": 1},
    "two requests at a time": {"max_requests": 2},
    "small prompt chunks": {"prefill_tokens": 7},
    "prefix cache": {"prefix_slots": 5, "prefix_block": 16, "prefill_tokens": 50},
}
LENGTHS = 1, 5, 31, 32, 70
NEW_TOKENS = 40


def prompts() -> list[list[int]]:
    """Prompts with a common prefix."""
    return [[*tokens(max(LENGTHS)).tolist()[: length - 1], 3 + length % 40] for length in LENGTHS]


def sample(model: LightningForCausalLM, **options: Any) -> list[tuple[list[int], list[float]]]:
    """Prompts with their new tokens, and the log-probabilities of these."""
    engine, found = Engine(model, **options), {}
    for seed, prompt in enumerate([*prompts(), *prompts()]):  # the second time from cached prefixes
        chosen = SamplingOptions(max_new_tokens=NEW_TOKENS, seed=seed)
        found[engine.submit(prompt, chosen, stop_token_ids=(), logprobs=0)] = prompt, []
    while engine.has_work:
        for output in engine.step():
            assert output.token is not None
            assert output.logprobs is not None
            found[output.request][0].append(output.token)
            found[output.request][1].append(output.logprobs.chosen)
    return list(found.values())


def logprobs(model: LightningForCausalLM, *sequences: list[int]) -> list[torch.Tensor]:
    """Log-probabilities of new tokens, in a training pass over sequences that are packed in one batch row."""
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    logits = model.train()(ids[None], position_ids=positions[None]).logits[0, :-1]
    of_next = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0].detach()
    ends = torch.tensor([len(sequence) for sequence in sequences]).cumsum(0) - 1
    return [of_next[end - NEW_TOKENS : end] for end in ends.tolist()]


@DTYPES
@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
def test_sampled_equals_forward(options, dtype):
    model = make_model(dtype, invariant=True)
    found = sample(model, **options)
    packed = logprobs(model, *(sequence for sequence, _ in found))
    for (sequence, sampled), trained in zip(found, packed, strict=True):
        assert torch.equal(torch.tensor(sampled, dtype=dtype), trained)
        assert torch.equal(trained, logprobs(model, sequence)[0])


@DTYPES
def test_every_engine_samples_the_same(dtype):
    model = make_model(dtype, invariant=True)
    expected, *others = (sample(model, **options) for options in ENGINES.values())
    assert all(found == expected for found in others)
