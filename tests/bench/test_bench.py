"""The benchmark measures what it says; no test here is about speed."""

import json
import sys

import numpy as np
import pytest
import torch

from lightning_attention import lightning_attention
from lightning_attention.bench.cases import OpCase
from lightning_attention.bench.harness import interleaved_times, machine, peak_bytes
from lightning_attention.cli import main

CPU = torch.device("cpu")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak memory")


def test_operations_and_bytes():
    case = OpCase(batch_size=2, length=10, num_heads=3, head_dim=4, dtype=torch.float16)
    assert case.tensor_bytes == 2 * 10 * 3 * 4 * 2
    assert case.minimal_bytes() == 11 * case.tensor_bytes
    C, D, tokens_and_heads = 8, 4, 60
    assert case.linear_flops(C) == tokens_and_heads * (4 * C * D + 4 * D**2 + 10 * C * D + 10 * D**2)
    # 2 products forward, 5 backward, 2 D operations for each of T² / 2 pairs.
    assert case.softmax_flops() == 7 * 2 * 4 * (10**2 // 2) * 6


def test_times_are_medians_taken_in_turns(monkeypatch):
    clock, calls = iter(range(1000)), []
    monkeypatch.setattr("lightning_attention.bench.harness.time.perf_counter", lambda: next(clock))
    times = interleaved_times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3.0, CPU)
    assert times == {"a": 1, "b": 1}
    assert calls == ["a", "b"] * 4


@needs_linux
def test_peak_memory_is_seen():
    assert 60e6 < (peak_bytes(lambda: np.ones(8_000_000), CPU) or 0) < 90e6


@needs_linux
def test_memory_of_a_long_sequence():
    """Forward and backward at 64K tokens: below 8 times q, results included."""
    q, k, v = (torch.randn(1, 1 << 16, 4, 64, requires_grad=True) for _ in range(3))
    do, log_decay = torch.randn_like(q), -torch.rand(4)

    def call():
        return torch.autograd.grad(lightning_attention(q, k, v, log_decay).output, (q, k, v), do)

    call()
    assert (peak_bytes(call, CPU) or 0) < 8 * q.nbytes


def test_the_machine_is_named():
    described = machine(CPU)
    assert described["torch"] == torch.__version__
    assert described["device"]


def test_bench_op_writes_its_results(monkeypatch, tmp_path, capsys):
    arguments = "bench op --length 64 --length 128 --heads 2 --head-dim 8 --softmax-up-to 64 --seconds 0.01 --output"
    monkeypatch.setattr(sys, "argv", ["lightning-attention", *arguments.split(), str(tmp_path)])
    main()
    written = json.loads((tmp_path / "op.json").read_text())
    found = [(record["length"], record["implementation"]) for record in written["results"]]
    softmax, lightning = "scaled_dot_product_attention", "lightning_attention"
    assert found == [(64, lightning), (64, softmax), (128, lightning)]
    assert all(record["milliseconds"] > 0 for record in written["results"])
    assert written["command"].startswith("lightning-attention bench op --length 64")
    assert (tmp_path / "op.png").read_bytes().startswith(b"\x89PNG")
    assert "µs/token" in capsys.readouterr().out
