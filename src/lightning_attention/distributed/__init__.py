"""Lightning Attention over the tokens of several devices: sequence parallelism."""

from .attention import lightning_attention

__all__ = ["lightning_attention"]
