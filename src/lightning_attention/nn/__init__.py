"""Layers with lightning attention, in plain PyTorch, and the loss of a language model's head."""

from .attention import GatedLightningAttention, Slots
from .cross_entropy import linear_cross_entropy
from .glu import SimpleGLU
from .norms import SimpleRMSNorm
from .positions import LRPE

__all__ = ["LRPE", "GatedLightningAttention", "SimpleGLU", "SimpleRMSNorm", "Slots", "linear_cross_entropy"]
