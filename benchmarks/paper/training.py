"""Tokens a second and GPU of training: Table 1 and Figure 1 of 2401.04658."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lightning_attention.models import LightningForCausalLM

from ..report import Column, Record, Table, field, rounded
from ..run import Benchmark
from ..speed import SpeedCase, Step, Steps, compare_steps, config_of, random_step
from .models import LLAMA

KIND = "paper-training"
LENGTHS: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 81920, 94208)
OURS, LIGHTNING1, SOFTMAX = "TNL, Lightning-2", "TNL, Lightning-1", "LLaMA, softmax"
SYSTEMS: dict[str, dict[str, Any]] = {OURS: {}, LIGHTNING1: {"linear_attention": "lightning-1"}, SOFTMAX: LLAMA}

# Tokens a second and GPU on 2 A100s of 80 GB, at LENGTHS; None is out of memory.
PUBLISHED: dict[tuple[str, str], tuple[int | None, ...]] = {
    ("385M", OURS): (38615, 38680, 38714, 38172, 37755, 37364, 38278, 38457, 38596),
    ("385M", LIGHTNING1): (41789, 39043, 34894, 28627, 21112, 13852, 8247, 6824, 6012),
    ("385M", SOFTMAX): (35931, 32453, 28184, 21996, 15479, 9715, 5643, 4604, 4078),
    ("1B", OURS): (20052, 19967, 20009, 19841, 19805, 19691, 20077, 20186, None),
    ("1B", LIGHTNING1): (21195, 20128, 18553, 16012, 12594, 8848, 5611, 4625, None),
    ("1B", SOFTMAX): (14897, 13990, 12644, 10887, 8468, 5836, 3820, 3167, None),
    ("3B", OURS): (7524, 7593, 7599, 7559, 7545, 7545, None, None, None),
    ("3B", LIGHTNING1): (8001, 7649, 7117, 6152, 4859, 3512, None, None, None),
    ("3B", SOFTMAX): (7117, 6708, 6008, 4968, 3755, 2558, None, None, None),
}


def benchmark(
    cases: Sequence[SpeedCase], device: torch.device, dtype: torch.dtype, *, compiled: bool, steps: int
) -> Benchmark:
    """Measure training steps of every system: `tokens_per_second` and `peak_bytes`, beside what was published."""

    def measure(case: SpeedCase, bandwidth: float) -> list[Record]:
        makers = {name: partial(_make_step, case, name, device, dtype, compiled) for name in SYSTEMS}
        sizes = {"size": case.size, "length": case.length, "batch_size": case.batch_size, "compiled": compiled}

        def results(name: str, steps: Steps) -> Record:
            return {
                "tokens_per_second": rounded(case.tokens / steps.seconds),
                "peak_bytes": steps.peak_bytes,
                "published": published(case, name),
            }

        return compare_steps(makers, device, steps).records(sizes, results)

    columns = [
        Column("tokens/s", 11, field("tokens_per_second"), ".4g"),
        Column("A100, paper", 13, field("published"), ".5g"),
        Column("GiB", 8, field("peak_bytes", scale=2**-30), ".3g"),
    ]
    return Benchmark(KIND, cases, measure, _title, Table({"": columns}))


def published(case: SpeedCase, system: str) -> int | None:
    """Published tokens a second and GPU."""
    figures = dict(zip(LENGTHS, PUBLISHED.get((case.size, system), ()), strict=False))
    return figures.get(case.length)


def _make_step(case: SpeedCase, system: str, device: torch.device, dtype: torch.dtype, compiled: bool) -> Step:
    torch.manual_seed(0)
    with device:
        model = LightningForCausalLM(config_of(case.size, **SYSTEMS[system])).train()
    return random_step(model, case.batch_size, case.length, device, dtype, compiled=compiled)


def _title(case: SpeedCase, bandwidth: float) -> str:
    return f"{case.size}, {case.batch_size} x {case.length} tokens"
