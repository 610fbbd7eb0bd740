"""The token mixers of a configuration."""

from ..nn import (
    CosFormerFeatures,
    EluFeatures,
    FeatureMap,
    GatedLightningAttention,
    NormalizedLinearAttention,
    PositiveRandomFeatures,
    RandomFourierFeatures,
    TokenMixer,
)
from .configuration import LightningConfig


def make_mixer(config: LightningConfig, layer_idx: int) -> TokenMixer:
    """Create the token mixer of a layer."""
    sizes = config.hidden_size, config.num_attention_heads
    if config.linear_attention == "lightning":
        has_lrpe = config.layer_has_lrpe(layer_idx)
        return GatedLightningAttention(*sizes, config.layer_log_decay(layer_idx), lrpe=has_lrpe, eps=config.norm_eps)
    return NormalizedLinearAttention(*sizes, _feature_map(config, layer_idx), eps=config.norm_eps)


def _feature_map(config: LightningConfig, layer_idx: int) -> FeatureMap:
    H, D = config.num_attention_heads, config.head_dim
    seed = config.feature_seed * config.num_hidden_layers + layer_idx
    match config.linear_attention:
        case "elu":
            return EluFeatures(D)
        case "cosformer":
            assert config.max_position_embeddings is not None
            return CosFormerFeatures(D, config.max_position_embeddings)
        case "rfa":
            return RandomFourierFeatures(H, D, config.num_features, seed=seed)
        case "performer":
            return PositiveRandomFeatures(D, config.num_features, seed=seed)
        case name:
            raise ValueError(f"{name} attention has no feature map")
