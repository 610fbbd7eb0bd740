"""Softmax attention over a KV cache, in the place of lightning attention in a model's own layers."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attention.models import LightningConfig, LightningForCausalLM
from lightning_attention.nn import GatedLightningAttention

from ..harness import captured


def cache_shape(config: LightningConfig, batch_size: int, length: int) -> tuple[int, ...]:
    """Keys and values of a layer, `[2, B, H, T, D]`: a head's lie one after the other, as its one query reads them."""
    head_dim = config.hidden_size // config.num_attention_heads
    return 2, batch_size, config.num_attention_heads, length, head_dim


class SoftmaxDecoder:
    """Decoding steps of a model whose attention is softmax over a full KV cache.

    Weights, norms, gates and channel mixing are the model's. What only linear attention needs is left out: SiLU of
    queries and keys, and LRPE. Attention is PyTorch's, with no mask and no copy of the cache. On a GPU a step is a CUDA
    graph, recorded at the first one.

    Args:
        model: in eval mode.
        cache: of every layer, of `cache_shape`; a step writes one token of it and attends to all.
        context: entered around a step, to choose an implementation of attention.
    """

    def __init__(
        self,
        model: LightningForCausalLM,
        cache: Sequence[Tensor],
        context: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.model, self.cache, self._context = model, cache, context
        self._rows = torch.zeros(cache[0].shape[1] + 1, dtype=torch.int64, device=model.device)
        self._replay: Callable[[], object] | None = None

    def __call__(self, tokens: Sequence[int], position: int) -> Tensor:
        """Logits `[B, vocab_size]`, which the next step may overwrite.

        Args:
            tokens: B of them, each the next of its sequence.
            position: in the cache, where their keys and values go.
        """
        rows = torch.tensor([*tokens, position], device="cpu")
        if self.model.device.type == "cpu":
            return self.step(rows)
        self._rows.copy_(rows.pin_memory(), non_blocking=True)
        if self._replay is None:
            self._replay = captured(lambda: self.step(self._rows))
        logits = self._replay()
        assert isinstance(logits, Tensor)
        return logits

    @torch.no_grad()
    def step(self, rows: Tensor) -> Tensor:
        """The same without a graph, from the tokens and then the position `[B + 1]` int64 on the device."""
        tokens, position = rows[:-1], rows[-1:]
        body = self.model.model
        x = body.embed_tokens(tokens) * body.config.hidden_size**0.5  # [B, W]
        layers: Any = body.layers  # a ModuleList does not say of what
        with self._context():
            for layer, cache in zip(layers, self.cache, strict=True):
                x = x + _attend(layer.attention, layer.attention_norm(x), cache, position)
                x = x + layer.mlp(layer.mlp_norm(x))
        return self.model.lm_head(body.norm(x))


def _attend(attention: GatedLightningAttention, x: Tensor, cache: Tensor, position: Tensor) -> Tensor:
    heads = attention.qkvu_proj(x).unflatten(-1, (4, attention.num_heads, attention.head_dim))  # [B, 4, H, D]
    q, kv, u = heads[:, 0], heads[:, 1:3], heads[:, 3]
    cache.index_copy_(3, position, kv.transpose(0, 1)[:, :, :, None])
    keys, values = cache
    o = F.scaled_dot_product_attention(q[:, :, None], keys, values)  # [B, H, 1, D]
    return attention.out_proj(attention.norm(o.flatten(1)) * u.flatten(1))
