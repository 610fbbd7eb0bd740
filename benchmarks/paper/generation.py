"""Tokens a second of generation in the largest batch: Figure 5 of 2405.17381."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_attention.models import LightningForCausalLM

from ..harness import Comparison, release
from ..report import Column, Record, Table, field, rounded
from ..run import Benchmark
from ..speed import config_of
from .models import LLAMA

KIND = "paper-generation"
SYSTEMS: dict[str, dict[str, Any]] = {"TNL": {}, "LLaMA": LLAMA}
# Tokens a second of 7B parameters on an A100, with prompts of 512 tokens and 1024 new ones.
PUBLISHED = {("7B", "TNL"): 2819.6, ("7B", "LLaMA"): 538.0}


@dataclass(frozen=True)
class GenerationCase:
    """Answers of `new` tokens to `batch_sizes` prompts of `prompt` tokens, by a model of random weights."""

    size: str
    prompt: int
    new: int
    batch_sizes: tuple[int, ...]


def benchmark(cases: Sequence[GenerationCase], device: torch.device, dtype: torch.dtype) -> Benchmark:
    """Measure new `tokens_per_second` of `generate()`, prompts included, at every batch size that fits in memory."""

    def measure(case: GenerationCase, bandwidth: float) -> list[Record]:
        comparison: Comparison[dict[int, float]] = Comparison(device)
        for name in SYSTEMS:
            comparison.prepare(name, lambda name=name: _rates(case, name, device, dtype))

        def results(name: str, rates: dict[int, float]) -> Record:
            best = max(rates, key=lambda batch_size: rates[batch_size])
            return {
                "batch_size": best,
                "tokens_per_second": rounded(rates[best]),
                "published": PUBLISHED.get((case.size, name)),
                "by_batch_size": {str(size): rounded(rate) for size, rate in rates.items()},
            }

        return comparison.records({"size": case.size, "prompt": case.prompt, "new": case.new}, results)

    columns = [
        Column("tokens/s", 11, field("tokens_per_second"), ".4g"),
        Column("A100, paper", 13, field("published"), ".5g"),
        Column("sequences", 11, field("batch_size"), ".0f"),
    ]
    return Benchmark(KIND, cases, measure, _title, Table({"": columns}))


@torch.inference_mode()
def _rates(case: GenerationCase, system: str, device: torch.device, dtype: torch.dtype) -> dict[int, float]:
    """New tokens a second by batch size, up to the first that does not fit in memory."""
    torch.manual_seed(0)
    with device:
        model: Any = LightningForCausalLM(config_of(case.size, **SYSTEMS[system])).to(dtype).eval()
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    rates: dict[int, float] = {}
    for batch_size in case.batch_sizes:
        prompts = torch.randint(model.config.vocab_size, (batch_size, case.prompt), device=device)
        try:
            model.generate(prompts, max_new_tokens=2, **options)  # tunes and compiles
            _wait(device)
            start = time.perf_counter()
            answers = model.generate(prompts, max_new_tokens=case.new, **options)
            _wait(device)
        except torch.OutOfMemoryError:
            if not rates:
                raise
            break
        assert answers.shape[1] == case.prompt + case.new
        rates[batch_size] = batch_size * case.new / (time.perf_counter() - start)
        release(device)
    return rates


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _title(case: GenerationCase, bandwidth: float) -> str:
    return f"{case.size}, prompts of {case.prompt} tokens, {case.new} new tokens"
