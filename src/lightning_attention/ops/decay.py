"""Per-head decay rates, one named preset for each checkpoint family.

A decay is given as a slope > 0: the state is multiplied by exp(-slope) at every token. Training with one preset and
serving with another yields garbage without an error, so a model stores the name of its preset in its configuration.
Decays are constants: they are computed in float64 on the CPU, whatever the default device.
"""

import math
from numbers import Integral

import torch
from torch import Tensor

PRESETS = ("transnormer", "minimax", "minimax-hf", "ling", "paper", "alibi", "retnet")
LAYERLESS_PRESETS = ("alibi", "retnet")


def alibi_slopes(num_heads: int) -> Tensor:
    """ALiBi's slopes: `2^(-8 i / H)` for `i = 1..H`.

    When `num_heads` is not a power of two: the slopes of the power of two below, then every other slope of the power
    of two above.

    Args:
        num_heads: number of heads H, at least 1.

    Returns:
        `[H]` float32 on the CPU, > 0.

    Raises:
        ValueError: `num_heads` is less than 1.
        TypeError: `num_heads` is not an integer.

    Source: Train Short, Test Long (arXiv 2108.12409), section 3.
    """
    return _alibi(num_heads).float()


def log_decay(
    num_heads: int, *, layer_idx: int | None = None, num_layers: int | None = None, preset: str = "transnormer"
) -> Tensor:
    """Natural logarithm of the decay per token of every head, as a checkpoint family defines it.

    With `h = 0..H-1`, layer `l = 0..L-1` and `ALiBi` as in `alibi_slopes`, `log_decay = -slope`:

    | preset | slope | used by |
    |---|---|---|
    | `transnormer`, `minimax` | `ALiBi (1 - l / (L - 1) + 1e-5)` | TransNormerLLM; MiniMax-Text-01 and M1 as served |
    | `minimax-hf` | `2^(-8 (h + 1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5)` | transformers' MiniMax |
    | `ling` | `ALiBi (1 - (l - 1) / (L - 1) + 1e-5)` | Ling and Ring 2.x, as ports quote it |
    | `paper` | `(8 h / H) (1 - l / L)` | arXiv 2401.04658; the first head does not decay |
    | `alibi` | `ALiBi` | no layer term |
    | `retnet` | `-log(1 - 2^(-5 - h))` | RetNet; no layer term |

    Args:
        num_heads: number of heads H, at least 1.
        layer_idx: index l of the layer; needed unless the preset has no layer term.
        num_layers: number of layers L; needed likewise. With one layer, `transnormer` keeps `ALiBi (1 + 1e-5)`.
        preset: a name from the table.

    Returns:
        `[H]` float32 on the CPU, <= 0.

    Raises:
        ValueError: the preset is unknown or lacks a layer, or a number is out of range.
        TypeError: a number is not an integer, or the preset no string.
    """
    _check_integer("num_heads", num_heads)
    if layer_idx is not None:
        _check_integer("layer_idx", layer_idx)
    if num_layers is not None:
        _check_integer("num_layers", num_layers)
    if not isinstance(preset, str):
        raise TypeError(f"preset must be a string, got {type(preset).__name__}")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if num_layers is not None and num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    if layer_idx is not None and (layer_idx < 0 or (num_layers is not None and layer_idx >= num_layers)):
        bound = "" if num_layers is None else f" = {num_layers}"
        raise ValueError(f"layer_idx must be in [0, num_layers{bound}), got {layer_idx}")
    if preset == "alibi":
        return -_alibi(num_heads).float()
    heads = torch.arange(_checked(num_heads), dtype=torch.float64, device="cpu")
    if preset == "retnet":
        return torch.log1p(-torch.exp2(-5 - heads)).float()
    if layer_idx is None or num_layers is None:
        raise ValueError(f"preset {preset!r} depends on the layer: give layer_idx and num_layers")
    if preset == "paper":
        return -(8 * heads / num_heads * (1 - layer_idx / num_layers)).float()
    if preset == "minimax-hf":
        slopes = torch.exp2(-8 * (heads + 1) / num_heads)
        return -(slopes * (1 - layer_idx / (num_layers - 1 + 1e-5) + 1e-5)).float()
    if preset == "ling" and num_layers == 1:
        raise ValueError("preset 'ling' is not defined for one layer")
    depth = layer_idx - 1 if preset == "ling" else layer_idx
    return -(_alibi(num_heads) * (1 - depth / max(num_layers - 1, 1) + 1e-5)).float()


def _alibi(num_heads: int) -> Tensor:
    below = 2 ** int(math.log2(_checked(num_heads)))
    slopes, above = (
        torch.exp2(-8 * torch.arange(1, count + 1, dtype=torch.float64, device="cpu") / count)
        for count in (below, 2 * below)
    )
    return torch.cat([slopes, above[::2][: num_heads - below]])


def _check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def _checked(num_heads: int) -> int:
    _check_integer("num_heads", num_heads)
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    return num_heads
