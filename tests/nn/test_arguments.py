"""Layers check the arguments of their constructors."""

import math
from typing import Any

import pytest
import torch

from lightning_attention import decay
from lightning_attention.nn import (
    LRPE,
    CosFormerFeatures,
    EluFeatures,
    GatedLightningAttention,
    NormalizedLinearAttention,
    PositiveRandomFeatures,
    RandomFourierFeatures,
    SimpleGLU,
    SimpleRMSNorm,
    TokenMixer,
)

GOOD: dict[str, Any] = {"hidden_size": 24, "num_heads": 3, "log_decay": -torch.ones(3)}
BAD_ATTENTION = [
    ({"hidden_size": 24.0}, TypeError, "hidden_size must be an integer, got 24.0"),
    ({"hidden_size": "24"}, TypeError, "hidden_size must be an integer, got '24'"),
    ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
    ({"hidden_size": 25}, ValueError, "hidden_size must be a multiple of num_heads = 3, got 25"),
    ({"num_heads": True}, TypeError, "num_heads must be an integer, got True"),
    ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    ({"log_decay": [-1.0] * 3}, TypeError, "log_decay must be a dense tensor, got list"),
    ({"log_decay": None}, TypeError, "log_decay must be a dense tensor, got NoneType"),
    ({"log_decay": -torch.ones(4)}, ValueError, r"log_decay must be \[H\] = \[3\], got shape \(4,\)"),
    ({"log_decay": -torch.ones(3, 1)}, ValueError, r"log_decay must be \[H\], got shape \(3, 1\)"),
    ({"log_decay": -torch.ones(3).bfloat16()}, TypeError, "log_decay must be torch.float32, got torch.bfloat16"),
    ({"log_decay": torch.ones(3)}, ValueError, "log_decay must be <= 0, got a maximum of 1.0.*pass -slopes"),
    ({"log_decay": torch.full((3,), math.nan)}, ValueError, "log_decay must be <= 0, got a maximum of nan"),
    ({"log_decay": torch.zeros(3, requires_grad=True)}, ValueError, "log_decay must not require a gradient"),
    ({"eps": -1e-6}, ValueError, "eps must be finite and >= 0, got -1e-06"),
    ({"gate": "no"}, TypeError, "gate must be True or False, got 'no'"),
    ({"gate": None}, TypeError, "gate must be True or False, got None"),
    ({"lrpe": "no"}, TypeError, "lrpe must be True or False, got 'no'"),
    ({"lrpe": 1}, TypeError, "lrpe must be True or False, got 1"),
]


BAD_LAYERS = [
    (SimpleRMSNorm, (-1.0,), ValueError, "eps must be finite and >= 0, got -1.0"),
    (SimpleRMSNorm, (math.nan,), ValueError, "eps must be finite and >= 0, got nan"),
    (SimpleRMSNorm, ("1e-6",), TypeError, "eps must be a number, got '1e-6'"),
    (SimpleRMSNorm, (None,), TypeError, "eps must be a number, got None"),
    (LRPE, (0, 4), ValueError, "num_heads must be at least 1, got 0"),
    (LRPE, (2, 4.0), TypeError, "head_dim must be an integer, got 4.0"),
    (SimpleGLU, (0, 4), ValueError, "hidden_size must be at least 1, got 0"),
    (SimpleGLU, (4, "8"), TypeError, "intermediate_size must be an integer, got '8'"),
    (NormalizedLinearAttention, (32, 2, "elu"), TypeError, "feature_map must be a FeatureMap, got 'elu'"),
    (NormalizedLinearAttention, (32, 2, EluFeatures), TypeError, "feature_map must be a FeatureMap, got <class"),
]
# Feature maps that do not fit 2 heads of 16 channels.
BAD_MAPS = [
    (lambda: EluFeatures(8), "feature_map must be made for heads of 16 channels, got 8"),
    (lambda: CosFormerFeatures(32, 100), "feature_map must be made for heads of 16 channels, got 32"),
    (lambda: PositiveRandomFeatures(8), "feature_map must be made for heads of 16 channels, got 8"),
    (lambda: RandomFourierFeatures(2, 8), "feature_map must be made for heads of 16 channels, got 8"),
    (lambda: RandomFourierFeatures(1, 16), "feature_map must be made for 2 heads, got 1"),
]
BAD_DECAYS: list[tuple[dict[str, Any], str]] = [
    ({"layer_idx": 99, "num_layers": 3}, r"layer_idx must be in \[0, num_layers = 3\), got 99"),
    ({"layer_idx": -5}, r"layer_idx must be in \[0, num_layers\), got -5"),
    ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD_ATTENTION, ids=lambda x: str(x)[:40])
def test_bad_arguments_of_attention_are_refused(change, kind, message):
    with pytest.raises(kind, match=message):
        GatedLightningAttention(**GOOD | change)


@pytest.mark.parametrize(("layer", "arguments", "kind", "message"), BAD_LAYERS)
def test_bad_arguments_of_other_layers_are_refused(layer, arguments, kind, message):
    with pytest.raises(kind, match=message):
        layer(*arguments)


@pytest.mark.parametrize(("make", "message"), BAD_MAPS)
def test_feature_maps_of_other_heads_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        NormalizedLinearAttention(32, 2, make())


def test_gate_of_any_token_mixer_is_checked():
    with pytest.raises(TypeError, match="gate must be True or False, got 0"):
        TokenMixer(24, 3, 1e-6, gate=0)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("preset", decay.PRESETS)
@pytest.mark.parametrize(("layer", "message"), BAD_DECAYS)
def test_layers_out_of_range_are_refused_by_every_preset(preset, layer, message):
    with pytest.raises(ValueError, match=message):
        decay.log_decay(4, preset=preset, **layer)
