"""Layers with lightning attention, in plain PyTorch."""

from .attention import GatedLightningAttention, Slots
from .glu import SimpleGLU
from .norms import SimpleRMSNorm
from .positions import LRPE

__all__ = ["LRPE", "GatedLightningAttention", "SimpleGLU", "SimpleRMSNorm", "Slots"]
