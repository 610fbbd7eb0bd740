"""The models of the papers' tables, as configurations of ours."""

from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_attention.models import LightningConfig, LinearAttention, register_attention
from lightning_attention.nn import GatedLightningAttention, TokenMixer

LLAMA = {"layer_pattern": "0:1", "block": "llama"}
# Eight layers, so that 7:1 has one of softmax attention; 44.6M parameters with a vocabulary of 32,768.
SIZE = {"num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1408}


@dataclass(frozen=True)
class PaperModel:
    """Row of a table.

    Attributes:
        name: its name here.
        options: options of `LightningConfig`.
        published: the paper's figure, in its own setting; None where it has none.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    published: float | None = None

    def config(self, length: int, **sizes: Any) -> LightningConfig:
        """Configuration for sequences of at most `length` tokens."""
        return LightningConfig(**sizes, **self.options, max_position_embeddings=length)


# Perplexity of a word of WikiText-103's test set: 2405.17381, Table 1.
QUALITY = (
    PaperModel("TNL (lightning)", {}, 24.03),
    PaperModel("TNL with softmax 7:1", {"layer_pattern": "7:1"}),
    PaperModel("LLaMA", LLAMA, 24.78),
    PaperModel("1 + elu", {"linear_attention": "elu"}, 28.05),
    PaperModel("cosFormer", {"linear_attention": "cosformer"}, 27.06),
    PaperModel("RFA", {"linear_attention": "rfa"}),
    PaperModel("Performer", {"linear_attention": "performer"}, 63.16),
)

# Loss of 0.4B parameters after 100K updates, 2K context: 2401.04658, Table 2.
EXACTNESS = (
    PaperModel("Lightning-2", {}, 2.228),
    PaperModel("Lightning-1", {"linear_attention": "lightning-1"}, 2.229),
)


def _without_decay(config: LightningConfig, layer_idx: int) -> TokenMixer:
    zeros = torch.zeros(config.num_attention_heads, device="cpu")
    return GatedLightningAttention(
        config.hidden_size, config.num_attention_heads, zeros, lrpe=False, eps=config.norm_eps
    )


# TNL without decay or LRPE-d, whose positions are embeddings that are added to those of tokens.
LEARNED = "lightning-without-decay"
register_attention(LEARNED, LinearAttention(_without_decay, positions=("learned",)))

_NO_DECAY = [[0.0] * SIZE["num_attention_heads"]] * SIZE["num_hidden_layers"]
# Loss of 385M parameters after 100K updates: 2405.17381, Tables 4 to 9. The first is TNL in each of them.
ABLATIONS = (
    PaperModel("TNL", {}, 2.248),
    PaperModel("positions: learned", {"linear_attention": LEARNED}, 2.387),
    PaperModel("positions: decay alone", {"positions": "decay"}, 2.267),
    PaperModel("positions: LRPE alone", {"positions": "lrpe-d", "log_decay": _NO_DECAY}, 2.287),
    PaperModel("positions: LRPE-d in all layers", {"positions": "lrpe-d"}, 2.236),
    PaperModel("decay: the same in all layers", {"decay_preset": "alibi"}, 2.258),
    PaperModel("gate: none", {"output_gate": False}, 2.263),
    PaperModel("norm: RMSNorm", {"norm": "rms"}, 2.247),
    PaperModel("norm: LayerNorm", {"norm": "layer"}, 2.247),
    PaperModel("activation of q, k: none", {"qk_activation": "none"}, 2.283),
    PaperModel("activation of q, k: 1 + elu", {"qk_activation": "1+elu"}, 2.252),
    PaperModel("activation of GLU: SiLU", {"glu_activation": "silu"}, 2.254),
)
TABLES = {"quality": QUALITY, "exactness": EXACTNESS, "ablations": ABLATIONS}
