"""The benchmark of attentions measures what it claims. No test here is about speed."""

import json
import math

import pytest

from lightning_attention.models import LightningConfig

SIZES = "--size demo --length 16 --length 32 --device cpu"


def runs(folder):
    return json.loads((folder / "mixers.json").read_text())["runs"]


@pytest.mark.slow
def test_an_attention_trains_decodes_and_learns(bench, tmp_path, capsys):
    options = ["--attention", "elu", "--tokens", "64", "--steps", "1", "--seconds", "0"]
    bench("mixers", *SIZES.split(), *options, "--output", tmp_path)
    found = {kind: run["results"] for kind, run in runs(tmp_path).items()}
    config = LightningConfig.from_size("demo", linear_attention="elu", max_position_embeddings=33)
    state_bytes = sum(4 * math.prod(config.layer_state_shape(i)) for i in range(config.num_hidden_layers))
    for kind in ("mixers-training", "mixers-decoding"):
        assert [(record["implementation"], record["length"]) for record in found[kind]] == [("elu", 16), ("elu", 32)]
    assert [record["batch_size"] for record in found["mixers-training"]] == [4, 2]
    assert all(record["tokens_per_second"] > 0 for record in found["mixers-training"])
    assert all(x["milliseconds"] > 0 and x["state_bytes"] == state_bytes for x in found["mixers-decoding"])
    (learned,) = found["mixers-loss"]
    assert 1 < learned["held_out_loss"] < math.log(259) + 1
    assert learned["trained_tokens"] == 8192
    assert (tmp_path / "mixers.png").stat().st_size > 0
    assert "demo, 32 tokens" in capsys.readouterr().out


def test_attentions_are_measured_side_by_side(bench, tmp_path):
    names = ["lightning-1", "lightning"]
    chosen = [word for name in names for word in ("--attention", name)]
    bench("mixers", *SIZES.split(), *chosen, "--only", "decoding", "--seconds", "0", "--output", tmp_path)
    found = runs(tmp_path)
    assert list(found) == ["mixers-decoding"]
    results = found["mixers-decoding"]["results"]
    assert [(x["length"], x["implementation"]) for x in results] == [(n, name) for n in (16, 32) for name in names]
    assert len({record["state_bytes"] for record in results}) == 1


def test_parts_that_are_measured_later_join_the_others(bench, tmp_path):
    for options in ("decoding --seconds 0", "training --tokens 64"):
        bench("mixers", *SIZES.split(), "--attention", "rfa", "--only", *options.split(), "--output", tmp_path)
    assert list(runs(tmp_path)) == ["mixers-decoding", "mixers-training"]


def test_keys_and_values_grow_with_the_context(bench, tmp_path):
    """One layer of four has softmax attention."""
    sizes = "--size demo --length 16 --length 600 --seconds 0 --device cpu --only decoding"
    bench("mixers", *sizes.split(), "--attention", "3:1", "--output", tmp_path)
    short, long = runs(tmp_path)["mixers-decoding"]["results"]
    assert long["state_bytes"] > short["state_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--attention", "linformer"],
            "attention must be one of lightning, lightning-1, elu, cosformer, rfa, performer,",
        ),
        (["--length", "1"], "--length must be at least 2"),
        (["--trained-size", "2B"], "--size must be one of"),
        (["--only", "speed"], "--only must be training, decoding or loss"),
        (["--only", "loss", "--length", "64"], "--only loss does not go with --length"),
        (["--only", "decoding", "--steps", "5"], "--only decoding does not go with --steps"),
        (["--steps", "0"], "--steps must be at least 1"),
    ],
)
def test_options_are_checked(bench, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench("mixers", "--device", "cpu", *arguments, "--output", tmp_path / "out")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
