"""Sequence parallelism: Lightning Attention over tokens on several devices."""

from .attention import lightning_attention

__all__ = ["lightning_attention"]
