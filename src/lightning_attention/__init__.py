"""Lightning Attention: causal linear attention with exponential decay, with a state of constant size."""

from .ops import decay
from .ops.api import (
    LightningAttentionOutput,
    PrefillOutput,
    lightning_attention,
    lightning_attention_prefill,
    lightning_attention_prefill_,
)
from .ops.decoding_api import lightning_attention_commit, lightning_attention_step, lightning_attention_verify
from .ops.decoding_state import DecodingState
from .version import __version__

__all__ = [
    "DecodingState",
    "LightningAttentionOutput",
    "PrefillOutput",
    "__version__",
    "decay",
    "lightning_attention",
    "lightning_attention_commit",
    "lightning_attention_prefill",
    "lightning_attention_prefill_",
    "lightning_attention_step",
    "lightning_attention_verify",
]
