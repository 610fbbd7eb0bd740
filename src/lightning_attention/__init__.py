"""Lightning Attention: causal linear attention with exponential decay, at constant time and memory per token."""

from .ops import decay
from .ops.api import LightningAttentionOutput, lightning_attention, lightning_attention_step
from .version import __version__

__all__ = ["LightningAttentionOutput", "__version__", "decay", "lightning_attention", "lightning_attention_step"]
