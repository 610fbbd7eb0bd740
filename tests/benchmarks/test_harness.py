"""Times, memory and failures of calls. No test here is about speed."""

import sys

import numpy as np
import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Comparison, captured, interleaved_times, kernel_launches, peak_bytes
from lightning_attention import lightning_attention

CPU = torch.device("cpu")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process is known on Linux only")


@pytest.fixture
def clock(monkeypatch):
    """Function that lets time pass; time stands still otherwise."""
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def take(seconds: float) -> None:
        now[0] += seconds

    return take


@pytest.mark.parametrize(("of", "expected"), [("device", {"a": 2, "b": 3}), ("host", {"a": 1, "b": 3})])
def test_calls_take_turns_and_times_are_medians_and_minima_on_the_host(clock, of, expected):
    calls, took = [], {"a": iter([9, 1, 5, 2]), "b": iter([9, 3, 3, 3])}

    def call(name):
        calls.append(name)
        clock(next(took[name]))

    times, failures = interleaved_times({name: lambda name=name: call(name) for name in took}, 3.0, CPU, of)
    assert (times, failures) == (expected, {})
    assert calls == ["a", "b"] * 4


@pytest.mark.parametrize(
    ("took", "seconds", "runs"), [(0.2, 0.1, 3), (0.01, 0.02, 5), (0.01, 0.095, 10), (0.01, 9.0, 100)], ids=str
)
def test_number_of_runs_follows_the_seconds(clock, took, seconds, runs):
    calls = []
    interleaved_times({"a": lambda: calls.append(clock(took))}, seconds, CPU)
    assert len(calls) == 1 + runs


@pytest.mark.parametrize("failing_run", [1, 3])
def test_a_call_that_raises_does_not_stop_the_others(failing_run):
    runs = []

    def fails():
        runs.append(1)
        if len(runs) == failing_run:
            raise MemoryError("out of\nmemory")

    times, failures = interleaved_times({"fails": fails, "works": lambda: None}, 0.0, CPU)
    assert failures == {"fails": "MemoryError: out of memory"}
    assert list(times) == ["works"]


def test_a_comparison_has_a_record_for_every_implementation():
    def fails():
        raise ValueError("wrong")

    comparison: Comparison[int] = Comparison(CPU)
    comparison.leave_out("long", "too long")
    comparison.prepare("fails at once", fails)
    comparison.prepare("fails later", lambda: 1)
    comparison.prepare("works", lambda: 2)
    times = comparison.times(lambda n: fails if n == 1 else lambda: None, 0.0)
    assert list(times) == ["works"]
    assert comparison.records({"size": 3}, lambda name, n: {"result": n}) == [
        {"implementation": "long", "size": 3, "not_measured": "too long"},
        {"implementation": "fails at once", "size": 3, "not_measured": "ValueError: wrong"},
        {"implementation": "fails later", "size": 3, "not_measured": "ValueError: wrong"},
        {"implementation": "works", "size": 3, "result": 2},
    ]


@needs_linux
def test_peak_memory_counts_freed_memory():
    assert 60e6 < (peak_bytes(lambda: np.ones(8_000_000).sum(), CPU) or 0) < 90e6


@needs_linux
def test_peak_memory_of_a_long_sequence_is_a_small_multiple_of_its_inputs():
    """Forward and backward at 32K tokens take less than 8 times q, results included."""
    q, k, v = (torch.randn(1, 1 << 15, 4, 64, requires_grad=True) for _ in range(3))
    do, log_decay = torch.randn_like(q), torch.full((4,), -0.1)

    def call():
        return torch.autograd.grad(lightning_attention(q, k, v, log_decay).output, (q, k, v), do)

    call()
    assert (peak_bytes(call, CPU) or 0) < 8 * q.nbytes


@pytest.mark.gpu
def test_a_captured_call_is_repeated_by_every_replay():
    x = torch.zeros(3, device="cuda")
    replay = captured(lambda: x.add_(1).clone())
    for expected in (2.0, 3.0):  # 1 is the call before capture
        result = replay()
        assert isinstance(result, torch.Tensor)
        assert result.tolist() == [expected] * 3


@pytest.mark.gpu
def test_kernel_launches_are_counted():
    x = torch.zeros(3, device="cuda")
    assert kernel_launches(lambda: x.add_(1).mul_(2)) == 2
