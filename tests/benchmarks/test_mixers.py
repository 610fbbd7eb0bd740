"""The benchmark of attentions measures what it claims. No test here is about speed."""

import json
import math

import pytest

from lightning_attention.models import LightningConfig

SIZES = "--size demo --length 16 --length 32 --tokens 64 --seconds 0 --device cpu"


def test_an_attention_trains_decodes_and_learns(bench, tmp_path, capsys):
    bench("mixers", *SIZES.split(), "--attention", "elu", "--steps", "1", "--output", tmp_path)
    (record,) = json.loads((tmp_path / "mixers.json").read_text())["runs"]["mixers"]["results"]
    config = LightningConfig.from_size("demo", linear_attention="elu", max_position_embeddings=33)
    state_bytes = sum(4 * math.prod(config.layer_state_shape(i)) for i in range(config.num_hidden_layers))
    assert record["training"].keys() == record["decoding"].keys() == {"16", "32"}
    assert all(x["tokens_per_second"] > 0 for x in record["training"].values())
    assert all(x["milliseconds"] > 0 and x["state_bytes"] == state_bytes for x in record["decoding"].values())
    assert 1 < record["held_out_loss"] < math.log(259) + 1
    assert record["trained_tokens"] == 8192
    assert (tmp_path / "mixers.png").stat().st_size > 0
    assert "demo, elu" in capsys.readouterr().out


def test_attentions_are_measured_in_turn(bench, tmp_path):
    names = ["lightning-1", "lightning"]
    chosen = [word for name in names for word in ("--attention", name)]
    bench("mixers", *SIZES.split(), *chosen, "--steps", "0", "--output", tmp_path)
    results = json.loads((tmp_path / "mixers.json").read_text())["runs"]["mixers"]["results"]
    assert [record["attention"] for record in results] == names
    assert "held_out_loss" not in results[0]
    assert results[0]["decoding"]["16"]["state_bytes"] == results[1]["decoding"]["32"]["state_bytes"]


def test_keys_and_values_grow_with_the_context(bench, tmp_path):
    """One layer of four has softmax attention."""
    sizes = "--size demo --length 16 --length 600 --tokens 64 --seconds 0.1 --device cpu"
    bench("mixers", *sizes.split(), "--attention", "3:1", "--steps", "0", "--output", tmp_path)
    (record,) = json.loads((tmp_path / "mixers.json").read_text())["runs"]["mixers"]["results"]
    assert record["decoding"]["600"]["state_bytes"] > record["decoding"]["16"]["state_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--attention", "linformer"],
            "attention must be one of lightning, lightning-1, elu, cosformer, rfa, performer,",
        ),
        (["--length", "1"], "--length must be at least 2"),
        (["--trained-size", "2B"], "--size must be one of"),
    ],
)
def test_options_are_checked(bench, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench("mixers", "--device", "cpu", *arguments, "--output", tmp_path / "out")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
