"""The benchmark measures what it says; no test here is about speed."""

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import op, report
from benchmarks.cases import BACKWARD, FORWARD, OpCase
from benchmarks.harness import copy_bandwidth, interleaved_times, peak_bytes
from benchmarks.machine import machine
from benchmarks.op import measure
from benchmarks.oracles import Oracles
from benchmarks.peers import OURS, PEERS, Calls, Inputs, Peer
from benchmarks.plot import plot_sweep
from lightning_attention import lightning_attention

CPU = torch.device("cpu")
CASE = OpCase(batch_size=2, length=150, num_heads=3, head_dim=8, dtype=torch.float32)
SOFTMAX = "scaled_dot_product_attention"
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak memory")


@pytest.mark.parametrize(
    ("direction", "tensors", "linear", "pairwise"),
    [(FORWARD, 4, lambda C, D: 4 * C * D + 4 * D**2, 2), (BACKWARD, 7, lambda C, D: 10 * C * D + 10 * D**2, 5)],
    ids=["forward", "backward"],
)
def test_operations_and_bytes(direction, tensors, linear, pairwise):
    case = OpCase(batch_size=2, length=10, num_heads=3, head_dim=4, dtype=torch.float16)
    assert case.tensor_bytes == 2 * 10 * 3 * 4 * 2
    assert case.minimal_bytes(direction) == tensors * case.tensor_bytes
    assert case.linear_flops(direction, chunk_size=8) == 60 * linear(8, 4)
    # 2 D operations of a product for each of T² / 2 pairs.
    assert case.quadratic_flops(direction) == pairwise * 2 * 4 * (10**2 // 2) * 6


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only in calls of `clock`."""
    now = [0.0]
    monkeypatch.setattr("benchmarks.harness.time.perf_counter", lambda: now[0])

    def take(seconds):
        now[0] += seconds

    return take


@pytest.mark.parametrize(("of", "expected"), [("device", {"a": 2, "b": 3}), ("host", {"a": 1, "b": 3})])
def test_times_are_taken_in_turns(clock, of, expected):
    """Their medians; of the host, the least."""
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
def test_how_often_a_call_runs(clock, took, seconds, runs):
    calls = []
    interleaved_times({"a": lambda: calls.append(clock(took))}, seconds, CPU)
    assert len(calls) == 1 + runs


@pytest.mark.parametrize("failing_run", [1, 3])
def test_a_call_that_raises_leaves_the_others(failing_run):
    runs = []

    def fails():
        runs.append(1)
        if len(runs) == failing_run:
            raise MemoryError("out of\nmemory")

    times, failures = interleaved_times({"fails": fails, "works": lambda: None}, 0.0, CPU)
    assert failures == {"fails": "MemoryError: out of memory"}
    assert list(times) == ["works"]


@needs_linux
def test_peak_memory_is_seen():
    assert 60e6 < (peak_bytes(lambda: np.ones(8_000_000), CPU) or 0) < 90e6


@needs_linux
def test_memory_of_a_long_sequence():
    """Forward and backward at 32K tokens: below 8 times q, results included."""
    q, k, v = (torch.randn(1, 1 << 15, 4, 64, requires_grad=True) for _ in range(3))
    do, log_decay = torch.randn_like(q), torch.full((4,), -0.1)

    def call():
        return torch.autograd.grad(lightning_attention(q, k, v, log_decay).output, (q, k, v), do)

    call()
    assert (peak_bytes(call, CPU) or 0) < 8 * q.nbytes


def test_the_machine_is_named():
    described = machine(CPU)
    assert described["torch"] == torch.__version__
    assert described["device"]


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.device == "cpu"], ids=lambda peer: peer.name)
@pytest.mark.parametrize("length", [150, 700])
def test_oracles_agree_with_what_is_right(peer, length):
    inputs = Inputs(OpCase(2, length, 3, 8, torch.float32), CPU)
    assert Oracles(inputs).error(Calls(peer, inputs)) < 1e-5


def test_documents_are_kept_apart():
    peer = next(peer for peer in PEERS if (peer.name, peer.device) == (OURS, "cpu"))
    inputs = Inputs(OpCase(1, 100, 2, 8, torch.float32, documents=3), CPU)
    assert inputs.cu_seqlens is not None
    assert inputs.cu_seqlens.tolist() == [0, 33, 66, 100]
    assert Oracles(inputs).error(Calls(peer, inputs)) < 1e-5


def _scaled(factor):
    def build(log_decay, cu_seqlens):
        return lambda q, k, v: lightning_attention(q, k, v, log_decay, scale=factor).output

    return build


def _wrong_gradient(log_decay, cu_seqlens):
    right = _scaled(1.0)(log_decay, cu_seqlens)
    return lambda q, k, v: right(q, k, 1.1 * v) + right(q, k, v.detach()) * -0.1


def _nan(log_decay, cu_seqlens):
    return lambda q, k, v: (q + k + v) * float("nan")


def _not_installed(log_decay, cu_seqlens):
    import no_such_package  # noqa: F401  # pyright: ignore[reportMissingImports]


def _refuses(log_decay, cu_seqlens):
    def call(q, k, v):
        raise AssertionError

    return call


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (_scaled(1.1), "wrong: relative error of o is 1.0e-01, above 3e-03"),
        (_wrong_gradient, "wrong: relative error of dv is 1.0e-01, above 3e-03"),
        (_nan, "wrong: relative error of o is nan"),
        (_not_installed, "ModuleNotFoundError: No module named 'no_such_package'"),
        (_refuses, "AssertionError:"),
    ],
    ids=["output", "gradient", "nan", "import", "assertion"],
)
def test_what_is_wrong_or_raises_is_reported_and_not_timed(build, why):
    ours = next(peer for peer in PEERS if (peer.name, peer.device) == (OURS, "cpu"))
    peers = [Peer("bad", "cpu", build), ours]
    (records,) = measure([CASE], peers, CPU, bandwidth=1e9, softmax_up_to=0, seconds=0.0)
    bad, good = records
    assert why in bad["not_measured"]
    assert not bad.keys() & {"forward", "backward", "peak_bytes"}
    assert good["forward"]["milliseconds"] > 0
    assert any(why in line for line in op.TABLE.lines("", records))


def test_lengths_beyond_a_limit_are_left_out():
    peers = [
        Peer("quadratic", "cpu", _scaled(1.0), is_quadratic=True),
        Peer("short", "cpu", _scaled(1.0), max_length=9),
    ]
    (records,) = measure([CASE], peers, CPU, bandwidth=1e9, softmax_up_to=149, seconds=0.0)
    assert [r["not_measured"] for r in records] == ["not run beyond 149 tokens", "not run beyond 9 tokens"]


def test_copy_bandwidth():
    assert 1e8 < copy_bandwidth(CPU) < 1e13


def test_bench_op_writes_its_results(bench, tmp_path, capsys):
    sizes = "--length 64 --length 128 --heads 2 --head-dim 8 --softmax-up-to 64 --seconds 0.001 --device cpu --output"
    command = bench("op", *sizes.split(), tmp_path)
    written = json.loads((tmp_path / "op.json").read_text())
    sweep = written["runs"]["sweep"]
    assert sweep["command"] == " ".join(command)
    assert sweep["copy_bytes_per_second"] == 1e9
    found = [(r["length"], r["implementation"], "not_measured" in r) for r in sweep["results"]]
    assert found == [(128, OURS, False), (128, SOFTMAX, True), (64, OURS, False), (64, SOFTMAX, False)]
    for record in sweep["results"]:
        for direction in ("forward", "backward") if "not_measured" not in record else ():
            assert record[direction]["milliseconds"] > 0
            assert record[direction]["times_floor"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"op.json", "op.png"}
    out = capsys.readouterr().out
    assert "B 1, T 128, H 2, D 8" in out
    assert "not run beyond 64 tokens" in out


def test_table_and_sweep_are_kept_together(bench, monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.cases.TABLE", [(1, 8, 1, 4, None), (1, 9, 1, 4, 2)])
    options = ["--seconds", 0, "--device", "cpu", "--output", tmp_path]
    bench("op", "--only", "table", *options)
    assert {path.name for path in tmp_path.iterdir()} == {"op.json"}
    bench("op", "--length", 16, "--heads", 1, "--head-dim", 4, *options)
    document = json.loads((tmp_path / "op.json").read_text())
    lengths = {kind: {record["length"] for record in run["results"]} for kind, run in document["runs"].items()}
    assert lengths == {"table": {8, 9}, "sweep": {16}}
    packed = [record for record in document["runs"]["table"]["results"] if record["documents"]]
    found = [(record["implementation"], "not_measured" in record) for record in packed]
    assert found == [(OURS, False), (SOFTMAX, True)]


@pytest.mark.parametrize("field", ["device", "commit", "torch"])
def test_only_runs_of_one_device_and_commit_are_kept(tmp_path, field):
    here = {"device": "a", "commit": "b", "torch": "c"}
    report.write({"machine": {**here, field: "another"}, "runs": {"table": {}}}, tmp_path / "op.json")
    kept = {"table": {}} if field == "torch" else {}
    assert report.start(tmp_path / "op.json", here) == {"machine": here, "runs": kept}


@pytest.mark.parametrize("peak_bytes", [None, 0, 1 << 20])
def test_a_picture_is_drawn_from_the_document_alone(tmp_path, peak_bytes):
    sizes = {"batch_size": 1, "num_heads": 1, "head_dim": 4, "dtype": "float32"}
    passes = {"forward": {"milliseconds": 1.0}, "backward": {"milliseconds": 2.0}, "peak_bytes": peak_bytes}
    results = [
        {"implementation": "a", "length": 1024, **sizes, **passes},
        {"implementation": "b", "length": 1024, **sizes, "not_measured": "why"},
    ]
    plot_sweep({"machine": {"device": "a"}, "runs": {"sweep": {"results": results}}}, tmp_path / "op.png")
    assert (tmp_path / "op.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_cut_off_keeps_what_it_has(bench, monkeypatch, tmp_path):
    def cut_off(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr("benchmarks.report.Table.lines", cut_off)
    sizes = "--length 16 --length 32 --heads 1 --head-dim 4 --seconds 0 --device cpu --output"
    with pytest.raises(SystemExit):
        bench("op", *sizes.split(), tmp_path)
    results = json.loads((tmp_path / "op.json").read_text())["runs"]["sweep"]["results"]
    assert {record["length"] for record in results} == {32}
