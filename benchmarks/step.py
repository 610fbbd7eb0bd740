"""A training step of the 385M model on one sequence of 8192 tokens, with the kernels for Hopper and the portable ones.

python benchmarks/step.py results.json
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import patch

import torch
from torch.autograd.profiler_util import Interval
from torch.profiler import ProfilerActivity, profile

from lightning_attention.bench.harness import interleaved_times
from lightning_attention.bench.machine import machine
from lightning_attention.models import LightningConfig, LightningForCausalLM
from lightning_attention.ops import hopper, library

DEVICE = torch.device("cuda")
LENGTH = 8192
ATTENTION = ("scan_kernel", "gradient_kernel", "interval_state_kernel", "accumulate_kernel")


class Step:
    """Forward and backward in bf16."""

    def __init__(self) -> None:
        self.model = LightningForCausalLM(LightningConfig.from_size("385M")).to(DEVICE)
        self.tokens = torch.randint(self.model.config.vocab_size, (1, LENGTH), device=DEVICE)

    def hopper(self) -> None:
        self._run(is_slow=False)

    def portable(self) -> None:
        self._run(is_slow=True)

    def _run(self, is_slow: bool) -> None:
        is_chosen_anew = patch.dict(library._replays, clear=True)
        with patch.object(hopper, "is_slow", lambda problem: is_slow), is_chosen_anew:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
            loss.backward()
        self.model.zero_grad(set_to_none=False)


def busy_milliseconds(spans: Iterable[Interval]) -> float:
    """For which one of them runs at least; kernels overlap."""
    busy = end = 0.0
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(span.end - max(span.start, end), 0.0)
        end = max(end, span.end)
    return busy / 1e3


def main(output: Path) -> None:
    step = Step()
    calls = {"hopper": step.hopper, "portable": step.portable}
    times, failures = interleaved_times(calls, 2.0, DEVICE, "wall")
    assert not failures, failures
    results = {}
    for name, call in calls.items():
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            call()
        spans = [(event.name, event.time_range) for event in profiled.events() if event.device_time_total]
        everything = busy_milliseconds(span for _, span in spans)
        attention = busy_milliseconds(span for name, span in spans if name in ATTENTION)
        results[name] = {
            "tokens_per_second": LENGTH / times[name],
            "attention_milliseconds": attention,
            "attention_share": attention / everything,
        }
    document = {"machine": machine(DEVICE), "command": "python benchmarks/step.py results.json", "results": results}
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
