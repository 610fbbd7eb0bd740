"""The benchmark of the operator measures what it claims. No test here is about speed."""

import json

import pytest
import torch

from benchmarks import cases, op, report
from benchmarks.cases import BACKWARD, FORWARD, OpCase
from benchmarks.implementations import IMPLEMENTATIONS, Calls, Implementation, Inputs
from benchmarks.oracles import Oracles
from benchmarks.plot import plot_sweep
from benchmarks.report import OURS
from lightning_attention import lightning_attention

CPU = torch.device("cpu")
CASE = OpCase(batch_size=2, length=150, num_heads=3, head_dim=8, dtype=torch.float32)
SOFTMAX = "scaled_dot_product_attention"
ON_CPU = {found.name: found for found in IMPLEMENTATIONS if found.device == "cpu"}


@pytest.mark.parametrize(
    ("direction", "tensors", "linear", "pairwise"),
    [(FORWARD, 4, lambda C, D: 4 * C * D + 4 * D**2, 2), (BACKWARD, 7, lambda C, D: 10 * C * D + 10 * D**2, 5)],
    ids=["forward", "backward"],
)
def test_counts_of_operations_and_bytes(direction, tensors, linear, pairwise):
    case = OpCase(batch_size=2, length=10, num_heads=3, head_dim=4, dtype=torch.float16)
    assert case.tensor_bytes == 2 * 10 * 3 * 4 * 2
    assert case.minimal_bytes(direction) == tensors * case.tensor_bytes
    assert case.linear_flops(direction, chunk_size=8) == 60 * linear(8, 4)
    # 2 D operations of a product for each of T² / 2 pairs.
    assert case.quadratic_flops(direction) == pairwise * 2 * 4 * (10**2 // 2) * 6


@pytest.mark.parametrize("implementation", ON_CPU.values(), ids=ON_CPU)
@pytest.mark.parametrize("length", [150, 700])
def test_oracles_agree_with_correct_implementations(implementation, length):
    inputs = Inputs(OpCase(2, length, 3, 8, torch.float32), CPU)
    assert Oracles(inputs).error(Calls(implementation, inputs)) < 1e-5


def test_packed_sequences_are_separate():
    inputs = Inputs(OpCase(1, 100, 2, 8, torch.float32, packed_sequences=3), CPU)
    assert inputs.cu_seqlens is not None
    assert inputs.cu_seqlens.tolist() == [0, 33, 66, 100]
    assert Oracles(inputs).error(Calls(ON_CPU[OURS], inputs)) < 1e-5


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


def measure(implementations: list[Implementation], softmax_up_to: int = 0) -> list[report.Record]:
    options = {"device": CPU, "softmax_up_to": softmax_up_to, "seconds": 0.0}
    return op.measure(CASE, 1e9, implementations=implementations, **options)


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
def test_a_wrong_or_failing_implementation_is_reported_and_not_timed(build, why):
    bad, good = measure([Implementation("bad", "cpu", build), ON_CPU[OURS]])
    assert why in bad["not_measured"]
    assert not bad.keys() & {"forward", "backward", "peak_bytes"}
    assert good["forward"]["milliseconds"] > 0
    assert any(why in line for line in op.TABLE.lines("", [bad, good]))


def test_long_sequences_are_left_out_where_they_take_too_long():
    quadratic = Implementation("quadratic", "cpu", _scaled(1.0), is_quadratic=True)
    short = Implementation("short", "cpu", _scaled(1.0), max_length=9)
    reasons = [record["not_measured"] for record in measure([quadratic, short], softmax_up_to=149)]
    assert reasons == ["not run beyond 149 tokens", "not run beyond 9 tokens"]


def test_the_command_writes_results_and_a_plot(bench, tmp_path, capsys):
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


def test_a_run_keeps_results_of_the_other_kind(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(cases, "TABLE", [(1, 8, 1, 4, None), (1, 9, 1, 4, 2)])
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
def test_results_of_another_device_or_commit_are_dropped(tmp_path, field):
    here = {"device": "a", "commit": "b", "torch": "c"}
    report.write({"machine": {**here, field: "another"}, "runs": {"table": {}}}, tmp_path / "op.json")
    kept = {"table": {}} if field == "torch" else {}
    assert report.start(tmp_path / "op.json", here) == {"machine": here, "runs": kept}


@pytest.mark.parametrize("peak_bytes", [None, 0, 1 << 20])
def test_the_plot_needs_only_the_document(tmp_path, peak_bytes):
    sizes = {"batch_size": 1, "num_heads": 1, "head_dim": 4, "dtype": "float32"}
    passes = {"forward": {"milliseconds": 1.0}, "backward": {"milliseconds": 2.0}, "peak_bytes": peak_bytes}
    results = [
        {"implementation": "a", "length": 1024, **sizes, **passes},
        {"implementation": "b", "length": 1024, **sizes, "not_measured": "why"},
    ]
    plot_sweep({"machine": {"device": "a"}, "runs": {"sweep": {"results": results}}}, tmp_path / "op.png")
    assert (tmp_path / "op.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_keeps_finished_cases(bench, monkeypatch, tmp_path):
    def fails(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(report.Table, "lines", fails)
    sizes = "--length 16 --length 32 --heads 1 --head-dim 4 --seconds 0 --device cpu --output"
    with pytest.raises(SystemExit):
        bench("op", *sizes.split(), tmp_path)
    results = json.loads((tmp_path / "op.json").read_text())["runs"]["sweep"]["results"]
    assert {record["length"] for record in results} == {32}
