"""The benchmark of training steps measures what it claims. No test here is about speed."""

import json
import math
from importlib.util import find_spec

import pytest

from benchmarks.report import OURS
from benchmarks.speed import FLOAT8, LLAMA
from lightning_attention.training import byte_tokenizer

RFA = "rfa attention"
VOCABULARY = len(byte_tokenizer())


def test_the_command_measures_both_models_at_every_length(bench, tmp_path, capsys):
    sizes = "--size demo --length 16 --length 32 --tokens 64 --steps 1 --device cpu"
    bench("speed", *sizes.split(), "--attention", "rfa", "--output", tmp_path)
    results = json.loads((tmp_path / "speed.json").read_text())["runs"]["speed"]["results"]
    assert [(r["implementation"], r["batch_size"], r["length"]) for r in results] == [
        (name, batch_size, length) for batch_size, length in ((4, 16), (2, 32)) for name in (OURS, RFA, LLAMA)
    ]
    for record in results:
        assert record["tokens_per_second"] == pytest.approx(64 / record["seconds"], rel=1e-2)
        # Random weights: every symbol is about as likely.
        assert record["loss"] == pytest.approx(math.log(VOCABULARY), rel=0.05)
        assert record["peak_share"] is None
    ours, rfa, llama = (record["parameters"] for record in results[:3])
    assert llama == pytest.approx(ours, rel=0.1)
    assert rfa == ours - 192 + 16 * 192 + 4 * 192  # frequencies of LRPE-d, learned positions, scales of features
    assert "demo, 2 x 32 tokens" in capsys.readouterr().out


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_products_in_float8_are_measured_beside_ours(bench, tmp_path):
    sizes = "--size demo --length 16 --tokens 32 --steps 1 --device cpu --dtype bfloat16 --fp8 --output"
    bench("speed", *sizes.split(), tmp_path)
    results = json.loads((tmp_path / "speed.json").read_text())["runs"]["speed"]["results"]
    ours, float8 = results[:2]
    assert [record["implementation"] for record in results] == [OURS, FLOAT8, LLAMA]
    assert float8["parameters"] == ours["parameters"]
    assert float8["loss"] == pytest.approx(ours["loss"], rel=0.02)
    assert float8["loss"] != ours["loss"]


@pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed")
def test_float8_without_torchao_is_refused(bench, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench("speed", "--size", "demo", "--device", "cpu", "--fp8", "--output", tmp_path)
    assert "--fp8 is not possible on this machine: torchao is not installed" in capsys.readouterr().err
