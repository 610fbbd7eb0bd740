"""Configurations: sizes, decays, refused options, and what is saved and loaded."""

import json
import math
from typing import Any

import pytest
import torch
from tiny_model import make_config
from transformers import AutoConfig

from lightning_attention import decay
from lightning_attention.models import SIZES, LightningConfig, LightningForCausalLM

# Millions of parameters: with the vocabulary of 50272 tokens of the paper's 385M model, or 64000 of its larger ones.
COUNTS = {"demo": (259, 2), "45M": (50272, 47), "385M": (50272, 385), "1B": (64000, 1020), "3B": (64000, 2943)}
COUNTS |= {"7B": (64000, 6931), "15B": (64000, 14916)}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    vocab_size, millions = COUNTS[size]
    config = LightningConfig.from_size(size, vocab_size=vocab_size)
    with torch.device("meta"):
        model = LightningForCausalLM(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    W, G, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    assert count == vocab_size * W + L * (5 * W**2 + 3 * W * G) + W
    assert round(count / 1e6) == millions


@pytest.mark.parametrize("preset", decay.PRESETS)
def test_decay_preset_is_saved(preset, tmp_path):
    sizes: dict[str, Any] = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 4}
    LightningConfig(**sizes, decay_preset=preset).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LightningConfig)
    for layer in range(4):
        expected = decay.log_decay(3, layer_idx=layer, num_layers=4, preset=preset)
        assert torch.equal(config.layer_log_decay(layer), expected)


def test_explicit_decays_override_the_preset(tmp_path):
    log_decay = [[-0.5, -0.25], [0.0, -math.log(2)]]
    config = LightningConfig(hidden_size=4, num_attention_heads=2, num_hidden_layers=2, log_decay=log_decay)
    config.save_pretrained(tmp_path)
    config = LightningConfig.from_pretrained(tmp_path)
    model = LightningForCausalLM(config)
    for i, expected in enumerate(torch.tensor(log_decay)):
        assert torch.equal(config.layer_log_decay(i), expected)
        assert torch.equal(model.get_buffer(f"model.layers.{i}.attention.decay.log_decay"), expected)


@pytest.mark.parametrize(
    ("positions", "lrpe"), [("mix", [True, False, False]), ("lrpe-d", [True] * 3), ("decay", [False] * 3)]
)
def test_positions_choose_the_layers_with_lrpe(positions, lrpe):
    config = LightningConfig.from_size("demo", num_hidden_layers=3, positions=positions)
    assert [config.layer_has_lrpe(i) for i in range(3)] == lrpe


def test_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"size must be one of demo, 45M, .* got '2B'"):
        LightningConfig.from_size("2B")


ONE_HEAD = {"num_hidden_layers": 1, "num_attention_heads": 1}
ONE_LAYER = {"num_hidden_layers": 1}
SLIDING = ONE_LAYER | {"layer_types": ["sliding_attention"]}
ROPE = {"layer_pattern": "0:1"}
UNKNOWN = [
    "attention",
    "head_dim",
    "rope_theta",
    "temperature",
    "max_length",
    "hiden_size",
    "per_layer_config",
]


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_options_are_refused_by_name(name, tmp_path):
    options: dict[str, Any] = {name: 32}
    with pytest.raises(TypeError, match=f"LightningConfig has no option {name}"):
        LightningConfig(**options)
    LightningConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    with pytest.raises(TypeError, match=f"LightningConfig has no option {name}"):
        LightningConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"hidden_size": 10, "num_attention_heads": 3}, ValueError, "must be a multiple of .* = 3, got 10"),
        ({"num_hidden_layers": 0}, ValueError, "num_hidden_layers must be at least 1, got 0"),
        ({"vocab_size": -1}, ValueError, "vocab_size must be at least 1, got -1"),
        ({"positions": "rope"}, ValueError, "positions must be one of mix, lrpe-d, decay, got 'rope'"),
        ({"decay_preset": "lightning"}, ValueError, "decay_preset must be one of .* got 'lightning'"),
        ({"log_decay": [[-1.0]]}, ValueError, "log_decay must be 24 lists of 8 numbers"),
        ({"log_decay": 5}, TypeError, "log_decay must be lists of numbers"),
        ({"log_decay": [-1.0]}, TypeError, "log_decay must be lists of numbers"),
        (ONE_HEAD | {"log_decay": [["-1"]]}, TypeError, "log_decay must be lists of numbers"),
        ({"tie_word_embeddings": "false"}, TypeError, "tie_word_embeddings must be True or False, got 'false'"),
        ({"use_cache": "no"}, TypeError, "use_cache must be True or False, got 'no'"),
        ({"dtype": ["float32"]}, TypeError, "dtype must be a dtype of torch or its name"),
        ({"dtype": "foo"}, ValueError, "dtype must be the name of a dtype of torch, got 'foo'"),
        ({"torch_dtype": "nn"}, ValueError, "torch_dtype must be the name of a dtype of torch, got 'nn'"),
        (ONE_HEAD | {"log_decay": [[1.0]]}, ValueError, "log_decay must be <= 0"),
        ({"layer_types": ["full_attention"] * 23}, ValueError, "layer_types must be 24 of linear_attention, full_"),
        ({"layer_types": ["full_attention", "nonsense"]}, ValueError, "layer_types must be 24 of"),
        ({"layer_types": ["full_attention"] * 23 + ["nonsense"]}, ValueError, "layer_types must be 24 of"),
        ({"layer_types": ["linear_attention"]}, ValueError, "layer_types must be 24 of"),
        ({"layer_types": "full_attention"}, TypeError, "layer_types must be a list, got 'full_attention'"),
        ({"layer_types": 24}, TypeError, "layer_types must be a list, got 24"),
        ({"layer_pattern": "7"}, ValueError, "layer_pattern must be two numbers, such as \"7:1\", got '7'"),
        ({"layer_pattern": "0:0"}, ValueError, "layer_pattern must be two numbers"),
        ({"layer_pattern": 7}, ValueError, "layer_pattern must be two numbers"),
        ({"layer_pattern": "1:1", "layer_types": ["full_attention"] * 24}, ValueError, "differ: give one of them"),
        ({"layer_pattern": "0:1", "sliding_window": 4}, ValueError, "sliding_window goes with layers of sliding_att"),
        (ONE_LAYER | {"layer_types": ["sliding_attention"]}, ValueError, "sliding_window goes with layers of sliding"),
        (SLIDING | {"sliding_window": 0}, ValueError, "sliding_window must be at least 1"),
        ({"num_key_value_heads": 4}, ValueError, "num_key_value_heads goes with layers of full_attention or sliding"),
        ({"layer_pattern": "1:1", "num_key_value_heads": 3}, ValueError, "must divide num_attention_heads = 8, got 3"),
        ({"layer_pattern": "0:1", "positions": "mix"}, ValueError, "positions must be one of rope, learned, none, got"),
        ({"layer_pattern": "0:1", "linear_attention": "elu"}, ValueError, "goes with layers of linear_attention, and"),
        ({"layer_pattern": "0:1", "decay_preset": "alibi"}, ValueError, "softmax has no decay"),
        (
            {"layer_pattern": "0:1", "qk_activation": "none"},
            ValueError,
            "qk_activation goes with lightning attention, not with softmax",
        ),
        ({"layer_pattern": "0:1", "num_features": 8}, ValueError, "num_features goes with rfa and performer, not with"),
        ({"layer_pattern": "0:1", "positions": "learned"}, ValueError, "max_position_embeddings is needed by softmax"),
        ({"rope_parameters": {"rope_theta": 1e4}}, ValueError, "rope_parameters go with softmax attention"),
        ({"layer_pattern": "0:1", "positions": "none", "rope_parameters": {}}, ValueError, "rope_parameters go with"),
        (ROPE | {"rope_parameters": {"rope_type": "yarn"}}, ValueError, 'rope_type must be "default" or "linear"'),
        (ROPE | {"rope_parameters": {"rope_type": "linear"}}, ValueError, "are factor, rope_theta, rope_type, got"),
        (ROPE | {"rope_parameters": {"factor": 2.0}}, ValueError, "of type 'default' are rope_theta, rope_type, got"),
        (ROPE | {"rope_parameters": {"rope_theta": 1}}, ValueError, "rope_theta must be above 1, got 1"),
        (ROPE | {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, ValueError, "factor must be at least 1"),
        (ROPE | {"rope_parameters": {"rope_theta": "1e4"}}, TypeError, "rope_theta must be a number"),
        (ROPE | {"rope_parameters": 4}, TypeError, "rope_parameters must be a dictionary, got 4"),
        (ROPE | {"hidden_size": 24}, ValueError, "rotary positions need heads of an even size"),
        ({"block": "gpt"}, ValueError, "block must be one of transnormer, llama, got 'gpt'"),
        ({"is_encoder_decoder": True}, ValueError, "is_encoder_decoder must be False"),
        ({"pad_token_id": -1}, ValueError, r"pad_token_id must be None or in \[0, vocab_size = 64000\), got -1"),
        ({"pad_token_id": 64000}, ValueError, "pad_token_id must be None or in"),
        ({"eos_token_id": [2, 70000]}, ValueError, "eos_token_id must be None or in .* got 70000"),
        ({"bos_token_id": "1"}, TypeError, "bos_token_id must be an integer, got '1'"),
        ({"hidden_size": 1024.0}, TypeError, "hidden_size must be an integer, got 1024.0"),
        ({"num_hidden_layers": True}, TypeError, "num_hidden_layers must be an integer, got True"),
        ({"max_position_embeddings": 0}, ValueError, "max_position_embeddings must be at least 1"),
        ({"norm_eps": math.nan}, ValueError, "norm_eps must be finite and not negative, got nan"),
        ({"initializer_range": -0.1}, ValueError, "initializer_range must be finite and not negative"),
        ({"norm_eps": "1e-6"}, TypeError, "norm_eps must be a number, got '1e-6'"),
    ],
    ids=str,
)
def test_bad_values_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        LightningConfig(**options)


def test_options_of_transformers_are_accepted():
    options: dict[str, Any] = {"num_labels": 3, "output_attentions": False, "torch_dtype": "float16"}
    options["name_or_path"] = "here"
    config = LightningConfig(**options)
    assert config.num_labels == 3
    assert config.dtype == torch.float16
    assert config.max_position_embeddings is None


@pytest.mark.parametrize("auto", [LightningConfig, AutoConfig])
@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"layer_types": ["full_attention"] * 23}, ValueError, "layer_types must be 24 of"),
        ({"positions": "rope"}, ValueError, "positions must be one of"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id must be None or in"),
        ({"attention": "softmax"}, TypeError, "LightningConfig has no option attention"),
        ({"head_dim": 32}, TypeError, "LightningConfig has no option head_dim"),
        ({"position_limit": 32}, TypeError, "LightningConfig has no option position_limit"),
        ({"layer_state_shape": 32}, TypeError, "LightningConfig has no option layer_state_shape"),
    ],
    ids=str,
)
def test_bad_options_of_from_pretrained_are_refused(auto, options, kind, message, tmp_path):
    LightningConfig().save_pretrained(tmp_path)
    with pytest.raises(kind, match=message):
        auto.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize("auto", [LightningConfig, AutoConfig])
def test_options_of_from_pretrained_are_applied(auto, tmp_path):
    LightningConfig().save_pretrained(tmp_path)
    config = auto.from_pretrained(tmp_path, positions="decay", num_labels=5, dtype=torch.float16, pad_token_id=7)
    assert (config.positions, config.num_labels, config.dtype, config.pad_token_id) == ("decay", 5, torch.float16, 7)
    loader: dict[str, Any] = {"revision": "main", "gguf_file": None, "subfolder": "", "token": None}
    loader |= {"trust_remote_code": True, "code_revision": None, "local_files_only": True}
    assert auto.from_pretrained(tmp_path, **loader).num_labels == 2
    _, unused = auto.from_pretrained(tmp_path, made_up=1, return_unused_kwargs=True)
    assert unused == {"made_up": 1}


def test_decays_may_be_tensors(tmp_path):
    layers = [decay.log_decay(2, layer_idx=i, num_layers=3, preset="transnormer") for i in range(3)]
    options: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 2}
    for given in (layers, torch.stack(layers), [x.tolist() for x in layers], tuple(layers)):
        chosen: dict[str, Any] = options | {"log_decay": given}
        LightningConfig(**chosen).save_pretrained(tmp_path)
        loaded = LightningConfig.from_pretrained(tmp_path)
        assert all(torch.equal(loaded.layer_log_decay(i), layers[i]) for i in range(3))


def test_a_pattern_longer_than_the_model_is_refused():
    with pytest.raises(ValueError, match="layer_pattern '7:1' needs at least 8 layers, the model has 4"):
        LightningConfig.from_size("demo", layer_pattern="7:1")


@pytest.mark.parametrize("kinds", [{}, {"layer_pattern": "1:1"}, {"layer_pattern": "0:1"}], ids=str)
def test_the_number_of_layers_may_change(tmp_path, kinds):
    config = make_config(**kinds)
    config.save_pretrained(tmp_path)
    expected = make_config(**kinds, num_hidden_layers=5).layer_types
    assert LightningConfig.from_pretrained(tmp_path, num_hidden_layers=5).layer_types == expected
    config.num_hidden_layers = 5
    assert config.layer_types == expected
    assert len(LightningForCausalLM(config).model.layers) == 5


def test_types_of_layers_replace_a_saved_pattern(tmp_path):
    make_config(layer_pattern="1:1").save_pretrained(tmp_path)
    types = ["full_attention", "full_attention", "linear_attention"]
    assert LightningConfig.from_pretrained(tmp_path, layer_types=types).layer_types == types


def test_a_preset_replaces_saved_decays(tmp_path):
    make_config(log_decay=[[-0.1, -0.2, -0.3]] * 3).save_pretrained(tmp_path)
    assert LightningConfig.from_pretrained(tmp_path).log_decay is not None
    config = LightningConfig.from_pretrained(tmp_path, decay_preset="alibi")
    assert (config.log_decay, config.decay_preset) == (None, "alibi")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sliding_window", None, "sliding_window goes with layers of sliding_attention"),
        ("layer_types", ["lnear_attention"] * 3, "layer_types must be 3 of"),
        ("layer_pattern", "0:1", "layer_pattern '0:1' and layer_types differ"),
    ],
)
def test_values_set_later_are_checked_by_the_model(name, value, message):
    types = ["linear_attention", "sliding_attention", "full_attention"]
    config = make_config(layer_types=types, sliding_window=4)
    setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        LightningForCausalLM(config)
