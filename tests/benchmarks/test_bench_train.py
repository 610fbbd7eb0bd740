"""The benchmark of training measures what it says; no test here is about speed."""

import json

import pytest
import torch
from tiny_model import make_config

from benchmarks import train as bench_train
from benchmarks.cases import TrainingCase
from benchmarks.peers import OURS
from lightning_attention.models import LightningConfig, LightningForCausalLM

CPU = torch.device("cpu")


@pytest.fixture
def model() -> LightningForCausalLM:
    torch.manual_seed(0)
    return LightningForCausalLM(make_config(vocab_size=LightningConfig.from_size("demo").vocab_size)).train()


def raises(model, input_ids, case):
    raise RuntimeError("no memory for\nthat")


def test_a_step_by_segments_and_as_a_whole(model):
    """From the same weights they have the same loss; and each leaves others for the next."""
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for name, (loss_of, most) in bench_train.WAYS.items():
        model.load_state_dict(start, strict=False)
        cases = [TrainingCase(70, 32)]
        ((record,),) = bench_train.measure(cases, model, "demo", {name: (loss_of, most)}, CPU, torch.float32)
        losses.append(record["loss"])
        assert (record["size"], record["length"], record["segment_length"]) == ("demo", 70, 32)
        assert record["tokens_per_second"] == pytest.approx(70 / record["seconds"], rel=1e-2)
        assert any(not torch.equal(start[name], parameter) for name, parameter in model.named_parameters())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_what_is_left_out_or_raises_is_reported(model):
    ways = bench_train.WAYS | {"bad": (raises, 1000)}
    cases = [TrainingCase(64, 16), TrainingCase(65, 16)]
    short, long = bench_train.measure(cases, model, "demo", ways, CPU, torch.float32)
    assert [record.get("not_measured") for record in short] == [None, None, "RuntimeError: no memory for that"]
    assert long[1]["not_measured"] == "not run beyond 4 segments"
    assert long[0]["implementation"] == OURS
    assert long[0]["times_ours"] == 1


def test_bench_train_writes_its_results(bench, model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_train, "random_model", lambda size, device, *, compiled: model)
    sizes = "--length 32 --length 128 --segment-length 16 --device cpu --output"
    bench("train", *sizes.split(), tmp_path)
    results = json.loads((tmp_path / "train.json").read_text())["runs"]["train"]["results"]
    assert [(r["length"], "not_measured" in r) for r in results] == [
        (32, False),
        (32, False),
        (128, False),
        (128, True),
    ]
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")
    assert "128 tokens, segments of 16" in capsys.readouterr().out
