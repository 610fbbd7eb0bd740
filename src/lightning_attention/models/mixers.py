"""The linear attentions that a configuration may name, and their token mixers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..nn import (
    CosFormerFeatures,
    EluFeatures,
    FeatureMap,
    GatedLightningAttention,
    NormalizedLinearAttention,
    PositiveRandomFeatures,
    QuadraticLightningAttention,
    RandomFourierFeatures,
    TokenMixer,
)

if TYPE_CHECKING:
    from .configuration import LightningConfig

MakeMixer = Callable[["LightningConfig", int], TokenMixer]
# Positions that any attention may have: none, or learned embeddings added to those of tokens.
COMMON_POSITIONS = ("learned", "none")
# Positions of lightning attention: decay, and LRPE-d in the first layer, in all or in none.
DECAY_POSITIONS = ("mix", "lrpe-d", "decay")


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


def check_is_linear(name: str, purpose: str) -> None:
    """Check that an attention is computed from states.

    Raises:
        ValueError: it is not; the error says for what that is needed.
    """
    if not ATTENTIONS[name].is_linear:
        raise ValueError(f"{purpose} pass on states, which {name} attention does not compute: train it without")


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
    return {"eps": config.norm_eps, "norm": config.norm, "gate": config.output_gate}


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
