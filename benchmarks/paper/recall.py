"""Needles in a haystack: keys and values among random tokens, asked for at the end of the sequence.

A model that does not match keys answers with one of the values in the sequence, and finds one needle of all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_attention.models import LightningConfig, LightningForCausalLM, compile_layers
from lightning_attention.models.heads import IGNORED

from ..harness import Comparison
from ..report import Column, Record, Table, rounded
from ..run import Benchmark
from .fit import fit

KIND = "paper-recall"
SYSTEMS: dict[str, dict[str, Any]] = {
    "TNL (lightning)": {},
    "TNL with softmax 7:1": {"layer_pattern": "7:1"},
    "TNL with softmax alone": {"layer_pattern": "0:1"},
}
KEYS, VALUES, FILLERS = 32, 32, 32  # tokens of each kind, in this order; with more of them models learn later
QUESTIONS = 2  # for each needle of a training sequence that has all
TESTED = 64  # sequences of a length


@dataclass(frozen=True)
class RecallCase:
    """Models trained to find needles in sequences of one length, and tested at others.

    Attributes:
        sizes: options of `LightningConfig` that say how large the models are.
        needles: pairs of a key and its value in a sequence, in training at most.
        length: tokens of a training sequence, with the questions.
        tested: lengths to test.
        batch_size: sequences of a step.
        steps: number of steps.
        learning_rate: highest learning rate.
        dtype: "bfloat16" or "float32".
    """

    sizes: dict[str, Any]
    needles: int
    length: int
    tested: tuple[int, ...]
    batch_size: int
    steps: int
    learning_rate: float
    dtype: str


def benchmark(case: RecallCase, systems: Sequence[str], device: torch.device) -> Benchmark:
    """Measure the share of needles that are found by each of `SYSTEMS` that is named, by length."""

    def measure(system: str, bandwidth: float) -> list[Record]:
        comparison: Comparison[dict[int, float]] = Comparison(device)
        comparison.prepare(system, lambda: _accuracies(case, system, device))
        sizes = {"length": case.length, "needles": case.needles, "steps": case.steps, "batch_size": case.batch_size}
        return comparison.records(
            sizes, lambda name, found: {"found": {str(length): rounded(share) for length, share in found.items()}}
        )

    columns = [
        Column(str(length), 9, lambda record, length=length: record["found"][str(length)], ".3f")
        for length in case.tested
    ]
    return Benchmark(KIND, list(systems), measure, lambda system, _: system, Table({"found at": columns}))


def haystacks(
    batch_size: int, length: int, needles: int, questions: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random sequences: needles at random places among fillers, and at the end keys again, each with its value.

    Args:
        questions: `[B, Q]`, numbers of the needles whose keys are at the end, in this order.

    Returns:
        `input_ids` `[B, T]`, and `labels`, the values at the end alone.
    """
    asked = 2 * questions.shape[1]
    places = (length - asked) // 2  # a needle begins at an even index
    if places < needles:
        raise ValueError(f"{needles} needles and their questions need {2 * needles + asked} tokens, got {length}")
    ids = KEYS + VALUES + torch.randint(FILLERS, (batch_size, length), generator=generator)
    keys = _distinct(batch_size, KEYS, needles, generator)
    values = KEYS + torch.randint(VALUES, (batch_size, needles), generator=generator)
    starts = 2 * _distinct(batch_size, places, needles, generator)
    ids.scatter_(1, starts, keys).scatter_(1, starts + 1, values)
    ids[:, length - asked :: 2] = keys.gather(1, questions)
    ids[:, length - asked + 1 :: 2] = values.gather(1, questions)
    labels = torch.full_like(ids, IGNORED)
    labels[:, length - asked + 1 :: 2] = values.gather(1, questions)
    return {"input_ids": ids, "labels": labels}


def _distinct(rows: int, size: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct numbers below `size` in every row."""
    return torch.rand(rows, size, generator=generator).argsort(dim=1)[:, :count]


def _accuracies(case: RecallCase, system: str, device: torch.device) -> dict[int, float]:
    torch.manual_seed(0)
    config = LightningConfig(**case.sizes, **SYSTEMS[system], vocab_size=KEYS + VALUES + FILLERS)
    model = LightningForCausalLM(config).to(device)
    if device.type == "cuda":
        torch.compiler.reset()  # or code of earlier models counts towards the limit of recompilations
        compile_layers(model)
    fit(model, _batches(case), steps=case.steps, learning_rate=case.learning_rate, dtype=case.dtype)
    return {length: accuracy(model, length, case.needles, case.dtype) for length in case.tested}


def _batches(case: RecallCase) -> Iterator[dict[str, Tensor]]:
    """Batches of one needle up to all: few are easier to learn from.

    Needles are asked for at random, at least twice on average, so that no answer follows from those before.
    """
    generator = torch.Generator().manual_seed(1)
    while True:
        needles = int(torch.randint(1, case.needles + 1, (), generator=generator))
        questions = torch.randint(needles, (case.batch_size, QUESTIONS * case.needles), generator=generator)
        yield haystacks(case.batch_size, case.length, needles, questions, generator)


@torch.no_grad()
def accuracy(model: LightningForCausalLM, length: int, needles: int, dtype: str) -> float:
    """Share of the needles in sequences of a length whose values the model finds most probable."""
    generator = torch.Generator().manual_seed(2)
    found = 0
    for _ in range(TESTED):
        questions = _distinct(1, needles, needles, generator)
        batch = {name: x.to(model.device) for name, x in haystacks(1, length, needles, questions, generator).items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(batch["input_ids"], use_cache=False, logits_to_keep=2 * needles).logits
        # Logits of a key's position predict its value.
        found += int((logits[:, 0::2].argmax(dim=-1) == batch["labels"][:, 1 - 2 * needles :: 2]).sum())
    return found / (TESTED * needles)
