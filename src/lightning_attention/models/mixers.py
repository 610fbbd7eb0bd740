"""The attentions that a configuration may name, and their token mixers."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..nn import (
    CosFormerFeatures,
    EluFeatures,
    FeatureMap,
    GatedLightningAttention,
    NormalizedLinearAttention,
    PositiveRandomFeatures,
    QuadraticLightningAttention,
    RandomFourierFeatures,
    RoPE,
    SoftmaxAttention,
    TokenMixer,
)

if TYPE_CHECKING:
    from .configuration import LightningConfig

MakeMixer = Callable[["LightningConfig", int], TokenMixer]
# Positions that any attention may have: none, or learned embeddings added to those of tokens.
COMMON_POSITIONS = ("learned", "none")
# Positions of lightning attention: decay, and LRPE-d in the first layer, in all or in none.
DECAY_POSITIONS = ("mix", "lrpe-d", "decay")
# Positions of models of softmax attention alone.
SOFTMAX_POSITIONS = ("rope", *COMMON_POSITIONS)
LINEAR, FULL, SLIDING = LAYER_TYPES = ("linear_attention", "full_attention", "sliding_attention")
PATTERN = r"(\d{1,6}):(\d{1,6})"
# From this width on PyTorch shares the sum of one row among threads, on a CPU, but not the sums of several rows.
NORM_LIMIT = 32768
SOFTMAX = "softmax"  # name of full attention beside those of the linear ones


@dataclass(frozen=True)
class LinearAttention:
    """A linear attention by its name in `LightningConfig.linear_attention`.

    Attributes:
        make: function from a configuration and a layer's index to the token mixer.
        positions: values of `LightningConfig.positions` that it takes; the first is the default.
        has_limit: whether positions must be below `max_position_embeddings`, also if none are learned.
        has_random_features: whether it reads `num_features` and `feature_seed`.
        has_decay: whether it reads decays and `qk_activation`.
        is_linear: whether it is computed from states, which training segments and ranks pass on.
    """

    make: MakeMixer
    positions: tuple[str, ...] = COMMON_POSITIONS
    has_limit: bool = False
    has_random_features: bool = False
    has_decay: bool = False
    is_linear: bool = True


def register_attention(name: str, attention: LinearAttention) -> None:
    """Let configurations name an attention of your own, in this process.

    Raises:
        ValueError: there is another attention of this name.

    Example:
        >>> from lightning_attention import nn
        >>> from lightning_attention.models import LightningConfig, LinearAttention, register_attention
        >>> class Squared(nn.FeatureMap):
        ...     def __init__(self, head_dim):
        ...         super().__init__()
        ...         self.num_features = head_dim
        ...
        ...     def forward(self, x, positions, *, is_query):
        ...         return x.square()
        >>> def make(config, layer_idx):
        ...     features = Squared(config.hidden_size // config.num_attention_heads)
        ...     return nn.NormalizedLinearAttention(config.hidden_size, config.num_attention_heads, features)
        >>> register_attention("squared", LinearAttention(make))
        >>> LightningConfig.from_size("demo", linear_attention="squared", positions="none").layer_state_shape(0)
        (4, 48, 49)
    """
    if ATTENTIONS.get(name, attention) != attention:
        raise ValueError(f"there is an attention {name!r} already")
    ATTENTIONS[name] = attention


def check_is_linear(config: "LightningConfig", purpose: str) -> None:
    """Check that every layer is computed from states.

    Raises:
        ValueError: one is not; the error says for what that is needed.
    """
    if config.invariant:
        raise ValueError(f"{purpose} pass on states, which do not say where chunks began: they need invariant=False")
    for i, kind in enumerate(config.layer_types or ()):
        if kind != LINEAR:
            raise ValueError(f"{purpose} pass on states of constant size, and layer {i} has {kind}, which has none")
    if not ATTENTIONS[config.linear_attention].is_linear:
        name = config.linear_attention
        raise ValueError(f"{purpose} pass on states, which {name} attention does not compute: train it without")


def check_is_invariant(config: "LightningConfig") -> None:
    """Check that a model computes a token with the same bits whatever else is in the batch.

    Raises:
        ValueError: a layer does not.
    """
    for i, kind in enumerate(config.layer_types or ()):
        if kind != LINEAR:
            raise ValueError(f"invariant must be False: layer {i} has {kind}, whose bits depend on the batch")
    with torch.device("meta"):
        if not ATTENTIONS[config.linear_attention].make(config, 0).can_be_invariant:
            raise ValueError(
                f"invariant must be False for {config.linear_attention} attention: bits depend on the batch"
            )
    if config.hidden_size >= NORM_LIMIT:
        raise ValueError(f"invariant needs a hidden_size below {NORM_LIMIT}, got {config.hidden_size}")


def layer_types(pattern: str, num_layers: int) -> list[str]:
    """Types of layers by a pattern "n:m": n of linear attention, m of full attention, and again from the start.

    Raises:
        ValueError: the pattern is not of this form, has no layer, or has full attention after the last layer alone.

    Example:
        >>> layer_types("2:1", 4)
        ['linear_attention', 'linear_attention', 'full_attention', 'linear_attention']
    """
    found = re.fullmatch(PATTERN, pattern) if isinstance(pattern, str) else None
    numbers = [int(number) for number in found.groups()] if found else [0, 0]
    if not any(numbers):
        raise ValueError(f'layer_pattern must be two numbers, such as "7:1", got {pattern!r}')
    if all(numbers) and num_layers <= numbers[0]:
        layers = f"{numbers[0] + 1} layers, the model has {num_layers}"
        raise ValueError(f"layer_pattern {pattern!r} needs at least {layers}: there would be no softmax attention")
    return [LINEAR if i % sum(numbers) < numbers[0] else FULL for i in range(num_layers)]


def attention_options(name: str) -> dict[str, Any]:
    """Options of `LightningConfig` for a linear attention, "softmax", or a pattern of lightning and softmax attention.

    Raises:
        ValueError: there is no such attention.

    Example:
        >>> attention_options("elu"), attention_options("7:1")
        ({'linear_attention': 'elu'}, {'layer_pattern': '7:1'})
    """
    if name in ATTENTIONS:
        return {"linear_attention": name}
    if name != SOFTMAX and not re.fullmatch(PATTERN, name):
        names = ", ".join([*ATTENTIONS, SOFTMAX])
        raise ValueError(f'attention must be one of {names}, or a pattern of layers such as "7:1", got {name!r}')
    return {"layer_pattern": "0:1" if name == SOFTMAX else name}


def make_softmax(config: "LightningConfig", layer_idx: int) -> TokenMixer:
    """Make the mixer of a layer of full or sliding attention."""
    rope = config.checked_rope()
    norm = {"norm": None} if config.block == "llama" else {}
    return SoftmaxAttention(
        config.hidden_size,
        config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        rope=None if rope is None else RoPE(_head_dim(config), base=rope["rope_theta"], factor=rope.get("factor", 1.0)),
        window=config.sliding_window if (config.layer_types or [])[layer_idx] == SLIDING else None,
        **{**_common(config), **norm},
    )


def _head_dim(config: "LightningConfig") -> int:
    return config.hidden_size // config.num_attention_heads


def _lightning(kind: type[GatedLightningAttention]) -> MakeMixer:
    """Function that makes the mixers of a kind of lightning attention."""

    def make(config: "LightningConfig", layer_idx: int) -> TokenMixer:
        return kind(
            config.hidden_size,
            config.num_attention_heads,
            config.layer_log_decay(layer_idx),
            lrpe=config.layer_has_lrpe(layer_idx),
            activation=config.qk_activation,
            **_common(config),
        )

    return make


def _common(config: "LightningConfig") -> dict[str, Any]:
    return {"eps": config.norm_eps, "norm": config.norm, "gate": bool(config.output_gate)}


def _normalized(features: Callable[["LightningConfig", int], FeatureMap]) -> MakeMixer:
    """Function that makes the mixers of a feature map, which is made from a configuration and a seed."""

    def make(config: "LightningConfig", layer_idx: int) -> TokenMixer:
        feature_map = features(config, config.feature_seed * config.num_hidden_layers + layer_idx)
        return NormalizedLinearAttention(config.hidden_size, config.num_attention_heads, feature_map, **_common(config))

    return make


def _rfa(config: "LightningConfig", seed: int) -> FeatureMap:
    return RandomFourierFeatures(config.num_attention_heads, _head_dim(config), config.num_features, seed=seed)


ATTENTIONS = {
    "lightning": LinearAttention(_lightning(GatedLightningAttention), DECAY_POSITIONS, has_decay=True),
    "lightning-1": LinearAttention(
        _lightning(QuadraticLightningAttention), DECAY_POSITIONS, has_decay=True, is_linear=False
    ),
    "elu": LinearAttention(_normalized(lambda config, _: EluFeatures(_head_dim(config)))),
    "cosformer": LinearAttention(
        _normalized(lambda config, _: CosFormerFeatures(_head_dim(config), config.max_position_embeddings or 0)),
        ("none",),
        has_limit=True,
    ),
    "rfa": LinearAttention(_normalized(_rfa), has_random_features=True),
    "performer": LinearAttention(
        _normalized(lambda config, seed: PositiveRandomFeatures(_head_dim(config), config.num_features, seed=seed)),
        has_random_features=True,
    ),
}
