"""The benchmark of training measures what it claims. No test here is about speed."""

import json

import pytest
import torch
from tiny_model import make_config

from benchmarks import train
from benchmarks.cases import TrainingCase
from benchmarks.report import OURS
from lightning_attention.models import LightningConfig, LightningForCausalLM


@pytest.fixture
def model() -> LightningForCausalLM:
    torch.manual_seed(0)
    return LightningForCausalLM(make_config(vocab_size=LightningConfig.from_size("demo").vocab_size)).train()


def raises(model, input_ids, case):
    raise RuntimeError("no memory for\nthat")


def test_segments_and_the_sequence_at_once_have_the_same_loss(model):
    """Each step starts from the same weights, and changes them."""
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for name, loss in train.LOSSES.items():
        model.load_state_dict(start, strict=False)
        (record,) = train.measure(TrainingCase(70, 32), train.Trainer(model, torch.float32), "demo", {name: loss})
        losses.append(record["loss"])
        assert (record["size"], record["length"], record["segment_length"]) == ("demo", 70, 32)
        assert record["tokens_per_second"] == pytest.approx(70 / record["seconds"], rel=1e-2)
        assert any(not torch.equal(start[name], parameter) for name, parameter in model.named_parameters())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_losses_that_raise_or_take_too_long_are_reported(model):
    losses, trainer = train.LOSSES | {"bad": (raises, 1000)}, train.Trainer(model, torch.float32)
    short, long = (train.measure(TrainingCase(length, 16), trainer, "demo", losses) for length in (64, 65))
    assert [record.get("not_measured") for record in short] == [None, None, "RuntimeError: no memory for that"]
    assert long[1]["not_measured"] == "not run beyond 4 segments"
    assert long[0]["implementation"] == OURS
    assert long[0]["times_ours"] == 1


def test_the_command_writes_results_and_a_plot(bench, model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "random_model", lambda size, device, *, compiled: model)
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
