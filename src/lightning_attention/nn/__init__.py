"""Layers with linear and softmax attention, in plain PyTorch, and the loss of a language model's head."""

from .attention import GatedLightningAttention, QuadraticLightningAttention
from .cross_entropy import linear_cross_entropy
from .feature_maps import CosFormerFeatures, EluFeatures, FeatureMap, PositiveRandomFeatures, RandomFourierFeatures
from .glu import SimpleGLU
from .key_values import KeyValues
from .normalized import NormalizedLinearAttention
from .norms import SimpleRMSNorm, make_norm
from .positions import LRPE, LearnedPositions, RoPE
from .softmax import SoftmaxAttention
from .token_mixer import Slots, TokenMixer

__all__ = [
    "LRPE",
    "CosFormerFeatures",
    "EluFeatures",
    "FeatureMap",
    "GatedLightningAttention",
    "KeyValues",
    "LearnedPositions",
    "NormalizedLinearAttention",
    "PositiveRandomFeatures",
    "QuadraticLightningAttention",
    "RandomFourierFeatures",
    "RoPE",
    "SimpleGLU",
    "SimpleRMSNorm",
    "Slots",
    "SoftmaxAttention",
    "TokenMixer",
    "linear_cross_entropy",
    "make_norm",
]
