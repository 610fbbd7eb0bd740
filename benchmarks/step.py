"""A training step of the 385M model on one sequence of 8192 tokens, with the kernels for Hopper and the portable ones.

Eager, and as a CUDA graph, which does not wait for the host. What attention takes of the time of all kernels is of the
graph.

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

from benchmarks.harness import Call, captured, interleaved_times
from benchmarks.machine import machine
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

    def run(self) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        self.model.zero_grad(set_to_none=False)

    def portable(self) -> None:
        is_chosen_anew = patch.dict(library._replays, clear=True)
        with patch.object(hopper, "unsupported_reasons", lambda problem: ["left out"]), is_chosen_anew:
            self.run()


def busy_milliseconds(spans: Iterable[Interval]) -> float:
    """For which one of them runs at least; kernels overlap."""
    busy = end = 0.0
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(span.end - max(span.start, end), 0.0)
        end = max(end, span.end)
    return busy / 1e3


def main(output: Path) -> None:
    step = Step()
    calls = {"hopper": step.run, "portable": step.portable}
    graphs = {name: captured(call) for name, call in calls.items()}
    times, graph_times = (_times(of_these) for of_these in (calls, graphs))
    results = {}
    for name, graph in graphs.items():
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            graph()
            torch.cuda.synchronize()
        spans = [(event.name, event.time_range) for event in profiled.events() if event.device_time_total]
        everything = busy_milliseconds(span for _, span in spans)
        attention = busy_milliseconds(span for name, span in spans if name in ATTENTION)
        results[name] = {
            "tokens_per_second": LENGTH / times[name],
            "graph_tokens_per_second": LENGTH / graph_times[name],
            "attention_milliseconds": attention,
            "attention_share": attention / everything,
        }
    document = {"machine": machine(DEVICE), "command": "python benchmarks/step.py results.json", "results": results}
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def _times(calls: dict[str, Call]) -> dict[str, float]:
    times, failures = interleaved_times(calls, 2.0, DEVICE, "wall")
    assert not failures, failures
    return times


if __name__ == "__main__":
    main(Path(sys.argv[1]))
