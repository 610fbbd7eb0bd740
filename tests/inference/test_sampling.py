"""Choice of tokens: transformers' probabilities, and no dependence on other sequences."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_attention.inference import SamplingOptions
from lightning_attention.inference.sampling import Sampler, choose, choose_each

VOCAB = 12
CPU = torch.device("cpu")

OPTIONS = [
    SamplingOptions(),
    SamplingOptions(temperature=0.5),
    SamplingOptions(top_k=3),
    SamplingOptions(top_p=0.6),
    SamplingOptions(top_p=1e-6),
    SamplingOptions(temperature=2.0, top_k=7, top_p=0.8),
    SamplingOptions(repetition_penalty=1.7),
    SamplingOptions(repetition_penalty=0.5, top_p=0.9, temperature=0.7),
]


def probabilities(options: SamplingOptions, prompt: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Probabilities in transformers."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(options.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(options.temperature))
    processors.append(TopKLogitsWarper(options.top_k or VOCAB))
    processors.append(TopPLogitsWarper(options.top_p))
    input_ids: Any = torch.tensor([prompt])
    scores: Any = logits[None].clone()
    return processors(input_ids, scores).softmax(dim=-1)[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_have_the_probabilities_of_transformers(options):
    generator = torch.Generator().manual_seed(0)
    logits, prompt, count = 2 * torch.randn(VOCAB, generator=generator), [1, 5, 5, 7], 4000
    expected = probabilities(options, prompt, logits)
    samplers = [Sampler(replace(options, seed=seed), prompt, VOCAB, CPU) for seed in range(count)]
    tokens = torch.tensor(choose(logits.expand(count, -1), samplers))
    frequencies = tokens.bincount(minlength=VOCAB) / count
    assert (frequencies[expected == 0] == 0).all()
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((frequencies - expected).abs() <= 5 * deviation + 1e-9).all()


def test_a_sequence_chooses_equally_alone_and_in_a_batch():
    generator = torch.Generator().manual_seed(1)
    options = [SamplingOptions(**vars(x) | {"seed": i}) for i, x in enumerate(OPTIONS)]
    options += [SamplingOptions(temperature=0), SamplingOptions(temperature=0, repetition_penalty=3.0)]
    together = [Sampler(x, [2, 3], VOCAB, CPU) for x in options]
    alone = [Sampler(x, [2, 3], VOCAB, CPU) for x in options]
    for _ in range(20):
        logits = torch.randn(len(options), VOCAB, generator=generator)
        expected = [choose(row[None], [sampler])[0] for row, sampler in zip(logits, alone, strict=True)]
        assert choose(logits, together) == expected


def test_repetition_penalty_applies_to_chosen_tokens():
    sampler = Sampler(SamplingOptions(temperature=0, repetition_penalty=2.0), [0], 3, CPU)
    logits = torch.tensor([[3.0, 2.0, 1.6]])
    assert [choose(logits, [sampler])[0] for _ in range(3)] == [1, 2, 0]


def test_generate_accepts_the_options():
    GenerationConfig(**SamplingOptions(top_k=3, top_p=0.5).for_generate()).validate()


TINY = {"1e-300": 1e-300, "the least float": 5e-324, "1e-40": 1e-40}


@pytest.mark.parametrize("temperature", TINY.values(), ids=TINY)
@pytest.mark.parametrize("others", [{}, {"top_p": 0.5, "top_k": 4}, {"repetition_penalty": 1.3}], ids=str)
def test_a_tiny_temperature_equals_greedy(temperature, others):
    logits = 1e3 * torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = float("-inf")
    greedy, sampled = (
        [Sampler(SamplingOptions(temperature=x, **others), [1], VOCAB, CPU) for _ in logits] for x in (0, temperature)
    )
    assert choose(logits, sampled) == choose(logits, greedy)


EXTREME = {
    "a huge temperature": {"temperature": 1e300},
    "a tiny top_p": {"top_p": 1e-320},
    "top_k above the vocabulary": {"top_k": 10**400},
    "a tiny penalty": {"repetition_penalty": 1e-320},
    "a huge penalty": {"repetition_penalty": 1e308},
}


@pytest.mark.parametrize("options", EXTREME.values(), ids=EXTREME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_excluded_token_is_never_chosen(options, dtype):
    logits = torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, [0, VOCAB - 1]] = float("-inf")
    tokens = choose(logits, [Sampler(SamplingOptions(**options, seed=i), [1, 2], VOCAB, CPU) for i in range(200)])
    assert set(tokens) <= set(range(1, VOCAB - 1))
    assert len(set(tokens)) > 1


BROKEN = {
    "a NaN": lambda row: row.index_fill(0, torch.tensor([5]), float("nan")),
    "all NaN": lambda row: torch.full_like(row, float("nan")),
    "inf": lambda row: row.index_fill(0, torch.tensor([5]), float("inf")),
    "all -inf": lambda row: torch.full_like(row, float("-inf")),
}


@pytest.mark.parametrize("break_", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("options", [*OPTIONS, SamplingOptions(temperature=0)], ids=str)
def test_nonfinite_logits_affect_only_their_batch_row(break_, options):
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2))
    samplers = [[Sampler(replace(options, seed=i), [2], VOCAB, CPU) for i in range(3)] for _ in range(2)]
    expected = choose(logits, samplers[0])
    logits[1] = break_(logits[1])
    assert choose_each(logits, samplers[1]) == [expected[0], None, expected[2]]
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        choose(logits, samplers[1])


REFUSED = {
    "temperature inf": ({"temperature": float("inf")}, "temperature must be finite, got inf"),
    "temperature nan": ({"temperature": float("nan")}, "temperature must be finite, got nan"),
    "temperature 10^400": ({"temperature": 10**400}, "temperature must be finite, got 1000"),
    "temperature below 0": ({"temperature": -1e-9}, "temperature must be at least 0"),
    "top_p nan": ({"top_p": float("nan")}, "top_p must be finite"),
    "penalty inf": ({"repetition_penalty": float("inf")}, "repetition_penalty must be finite"),
    "penalty 10^400": ({"repetition_penalty": 10**400}, "repetition_penalty must be finite"),
    "penalty 0": ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
    "max_new_tokens 10^400": ({"max_new_tokens": 10**400}, r"max_new_tokens must be below 2\^63"),
    "seed 10^400": ({"seed": 10**400}, r"seed must be at least -2\^63 and below 2\^64"),
    "seed -10^400": ({"seed": -(10**400)}, r"seed must be at least -2\^63 and below 2\^64"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)


NO_NUMBERS = {
    "max_new_tokens": (2.5, "a whole number, got 2.5"),
    "top_k": (True, "a whole number, got True"),
    "seed": ("1", "a whole number, got '1'"),
    "temperature": ("1", "a number, got '1'"),
    "top_p": (None, "a number, got None"),
    "repetition_penalty": (False, "a number, got False"),
}


@pytest.mark.parametrize(("name", "value", "message"), [(name, *case) for name, case in NO_NUMBERS.items()])
def test_options_that_are_no_numbers_are_refused(name, value, message):
    with pytest.raises(TypeError, match=f"{name} must be {message}"):
        SamplingOptions(**{name: value})
