"""Presets of decays against formulas written without the library."""

import math

import pytest
import torch

from lightning_attention import decay

HEADS = [1, 2, 3, 8, 12, 20, 40, 64]
LAYERS = [(0, 1), (0, 2), (1, 2), (0, 24), (7, 24), (23, 24)]


def alibi(H: int) -> list[float]:
    """Slopes by the recursion of ALiBi's own code."""
    if math.log2(H).is_integer():
        start = 2 ** (-(2 ** -(math.log2(H) - 3)))
        return [start * start**i for i in range(H)]
    below = 2 ** math.floor(math.log2(H))
    return alibi(below) + alibi(2 * below)[0::2][: H - below]


def transnormer(H: int, layer: int, L: int) -> list[float]:
    return [s * (1 - layer / (L - 1) + 1e-5) if L > 1 else s * (1 + 1e-5) for s in alibi(H)]


FORMULAS = {
    "transnormer": transnormer,
    "minimax": transnormer,
    "minimax-hf": lambda H, layer, L: [2 ** (-8 * (h + 1) / H) * (1 - layer / (L - 1 + 1e-5) + 1e-5) for h in range(H)],
    "ling": lambda H, layer, L: [s * (1 - (layer - 1) / (L - 1) + 1e-5) for s in alibi(H)],
    "paper": lambda H, layer, L: [8 * h / H * (1 - layer / L) for h in range(H)],
    "alibi": lambda H, layer, L: alibi(H),
    "retnet": lambda H, layer, L: [-math.log(1 - 2.0 ** (-5 - h)) if h < 45 else 2.0 ** (-5 - h) for h in range(H)],
}


@pytest.mark.parametrize("H", HEADS)
@pytest.mark.parametrize(("layer", "L"), LAYERS)
@pytest.mark.parametrize("preset", FORMULAS)
def test_presets_equal_their_formulas(preset, layer, L, H):
    if preset == "ling" and L == 1:
        with pytest.raises(ValueError, match="not defined for one layer"):
            decay.log_decay(H, layer_idx=layer, num_layers=L, preset=preset)
        return
    actual = decay.log_decay(H, layer_idx=layer, num_layers=L, preset=preset)
    expected = -torch.tensor(FORMULAS[preset](H, layer, L), dtype=torch.float64)
    assert actual.dtype == torch.float32
    assert (actual <= 0).all()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)


def test_every_preset_has_a_formula():
    assert set(FORMULAS) == set(decay.PRESETS)


@pytest.mark.parametrize("H", HEADS)
def test_alibi_slopes_equal_their_formula(H):
    slopes = decay.alibi_slopes(H)
    assert slopes.shape == (H,)
    torch.testing.assert_close(slopes.double(), torch.tensor(alibi(H), dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("preset", decay.LAYERLESS_PRESETS)
def test_layerless_presets_need_no_layer(preset):
    assert decay.log_decay(4, preset=preset).shape == (4,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0, "preset": "alibi"}, "num_heads must be at least 1, got 0"),
        ({"num_heads": 4, "preset": "lightning"}, "preset must be one of transnormer, .*, got 'lightning'"),
        ({"num_heads": 4}, "preset 'transnormer' depends on the layer"),
        ({"num_heads": 4, "layer_idx": 0}, "depends on the layer"),
        ({"num_heads": 4, "layer_idx": 2, "num_layers": 2}, r"layer_idx must be in \[0, num_layers = 2\), got 2"),
        ({"num_heads": 4, "layer_idx": -1, "num_layers": 2}, "layer_idx must be in"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        decay.log_decay(**arguments)
