import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_attention.inference import SamplingOptions
from lightning_attention.inference.sampling import Sampler, choose

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
    """transformers' own."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(options.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(options.temperature))
    processors.append(TopKLogitsWarper(options.top_k or VOCAB))
    processors.append(TopPLogitsWarper(options.top_p))
    return processors(torch.tensor([prompt]), logits[None].clone()).softmax(dim=-1)[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_are_as_likely_as_in_transformers(options):
    generator = torch.Generator().manual_seed(0)
    logits, prompt, count = 2 * torch.randn(VOCAB, generator=generator), [1, 5, 5, 7], 4000
    expected = probabilities(options, prompt, logits)
    samplers = []
    for seed in range(count):
        samplers.append(Sampler(options, prompt, VOCAB, CPU))
        samplers[-1]._generator.manual_seed(seed)
    tokens = torch.tensor(choose(logits.expand(count, -1), samplers))
    frequencies = tokens.bincount(minlength=VOCAB) / count
    assert (frequencies[expected == 0] == 0).all()
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((frequencies - expected).abs() <= 5 * deviation + 1e-9).all()


def test_each_row_has_its_own_options_and_numbers():
    """A row chooses the same alone and among others."""
    generator = torch.Generator().manual_seed(1)
    options = [SamplingOptions(**vars(x) | {"seed": i}) for i, x in enumerate(OPTIONS)]
    options += [SamplingOptions(temperature=0), SamplingOptions(temperature=0, repetition_penalty=3.0)]
    together = [Sampler(x, [2, 3], VOCAB, CPU) for x in options]
    alone = [Sampler(x, [2, 3], VOCAB, CPU) for x in options]
    for _ in range(20):
        logits = torch.randn(len(options), VOCAB, generator=generator)
        expected = [choose(row[None], [sampler])[0] for row, sampler in zip(logits, alone, strict=True)]
        assert choose(logits, together) == expected


def test_what_has_been_chosen_is_avoided():
    sampler = Sampler(SamplingOptions(temperature=0, repetition_penalty=2.0), [0], 3, CPU)
    logits = torch.tensor([[3.0, 2.0, 1.6]])
    assert [choose(logits, [sampler])[0] for _ in range(3)] == [1, 2, 0]


def test_the_options_are_those_of_generate():
    GenerationConfig(**SamplingOptions(top_k=3, top_p=0.5).for_generate()).validate()
