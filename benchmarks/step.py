"""Training step of a model on one sequence, with the automatic choice of kernels and with the portable ones.

Steps are eager, and CUDA graphs, which do not depend on the host. Shares of attention are of the graphs.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd.profiler_util import Interval
from torch.profiler import ProfilerActivity, profile

from lightning_attention import lightning_attention
from lightning_attention.models import LightningConfig, LightningForCausalLM
from lightning_attention.nn import token_mixer

from .harness import Call, captured, interleaved_times
from .report import Record

ATTENTION_KERNELS = ("scan_kernel", "gradient_kernel", "interval_state_kernel", "accumulate_kernel")


class Step:
    """Forward and backward of a model in bf16 autocast on random tokens."""

    def __init__(self, size: str, length: int, device: torch.device):
        model: Any = LightningForCausalLM(LightningConfig.from_size(size))
        self.model = model.to(device)
        self.tokens = torch.randint(self.model.config.vocab_size, (1, length), device=device)

    def run(self) -> None:
        with torch.autocast(self.tokens.device.type, torch.bfloat16):
            loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        self.model.zero_grad(set_to_none=False)

    def run_portable(self) -> None:
        with patch.object(token_mixer, "lightning_attention", partial(lightning_attention, backend="triton")):
            self.run()


def measure(size: str, length: int, device: torch.device, *, seconds: float = 2.0) -> dict[str, Record]:
    """Measure the automatic choice, "hopper" on a Hopper GPU, and the portable kernels."""
    step = Step(size, length, device)
    calls: dict[str, Call] = {"hopper": step.run, "portable": step.run_portable}
    graphs = {name: captured(call) for name, call in calls.items()}
    times, graph_times = (_times(timed, seconds, device) for timed in (calls, graphs))
    results = {}
    for name, graph in graphs.items():
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
            graph()
            torch.cuda.synchronize(device)
        spans = [(event.name, event.time_range) for event in profiled.events() or () if event.device_time_total]
        kernels = busy_milliseconds(span for _, span in spans)
        attention_kernels = busy_milliseconds(span for kernel, span in spans if kernel in ATTENTION_KERNELS)
        results[name] = {
            "tokens_per_second": length / times[name],
            "graph_tokens_per_second": length / graph_times[name],
            "attention_milliseconds": attention_kernels,
            "attention_share": attention_kernels / kernels,
        }
    return results


def busy_milliseconds(spans: Iterable[Interval]) -> float:
    """Length of the union of spans in µs, which may overlap, in milliseconds."""
    busy = end = 0.0
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(span.end - max(span.start, end), 0.0)
        end = max(end, span.end)
    return busy / 1e3


def _times(calls: dict[str, Call], seconds: float, device: torch.device) -> dict[str, float]:
    times, failures = interleaved_times(calls, seconds, device, "wall")
    if failures:
        raise RuntimeError(f"a step failed: {failures}")
    return times
