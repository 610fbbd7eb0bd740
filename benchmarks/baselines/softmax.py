"""Softmax attention with a KV cache in a model's layers, in place of lightning attention."""

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
    """Shape of a layer's keys and values, `[2, B, H, T, D]`; contiguous per head, as the query of a step reads them."""
    head_dim = config.hidden_size // config.num_attention_heads
    return 2, batch_size, config.num_attention_heads, length, head_dim


class SoftmaxDecoder:
    """Decode steps of a model with softmax attention over a full KV cache.

    Uses the model's weights, norms, gates and channel mixing, without SiLU of queries and keys and LRPE, which only
    linear attention needs. Attention is PyTorch's, without a mask or a copy of the cache. On a GPU, the first step is
    captured as a CUDA graph.

    Args:
        model: model in eval mode.
        cache: tensor of `cache_shape` per layer; a step writes one token and attends to all.
        context: context manager to enter around a step, to choose an implementation of attention.
    """

    def __init__(
        self,
        model: LightningForCausalLM,
        cache: Sequence[Tensor],
        context: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.model, self.cache, self._context = model, cache, context
        self._inputs = torch.zeros(cache[0].shape[1] + 1, dtype=torch.int64, device=model.device)
        self._replay: Callable[[], object] | None = None

    def __call__(self, tokens: Sequence[int], position: int) -> Tensor:
        """Return logits `[B, vocab_size]`, which the next step may overwrite.

        Args:
            tokens: next token of each of B sequences.
            position: position in the cache of their keys and values.
        """
        inputs = torch.tensor([*tokens, position], device="cpu")
        if self.model.device.type == "cpu":
            return self.step(inputs)
        self._inputs.copy_(inputs.pin_memory(), non_blocking=True)
        if self._replay is None:
            self._replay = captured(lambda: self.step(self._inputs))
        logits = self._replay()
        assert isinstance(logits, Tensor)
        return logits

    @torch.no_grad()
    def step(self, inputs: Tensor) -> Tensor:
        """Run a step without a graph, on the tokens followed by the position, `[B + 1]` int64 on the device."""
        tokens, position = inputs[:-1], inputs[-1:]
        body = self.model.model
        x = body.embed_tokens(tokens) * body.config.hidden_size**0.5  # [B, W]
        layers: Any = body.layers  # a ModuleList is not typed by its items
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
