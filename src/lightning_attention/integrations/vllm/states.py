"""States of one layer in vLLM's cache, and attention from them.

vLLM keeps the states of a layer in blocks, `[blocks, H, K, V]`: of each request the one that is updated, with drafts
one per draft too, and those of cached prefixes. Block 0 is nobody's. Shapes: N requests, T tokens, H heads of a rank.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.linear import minimax_linear_attn  # noqa: F401  # registers the operator
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.short_conv_attn import (
    ShortConvAttentionBackend,
    ShortConvAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from ...nn.attention import Decay
from ...ops.api import lightning_attention_prefill_
from ...ops.decoding_api import lightning_attention_step

NOBODY = -1  # slot of our operator that reads and writes nothing


class MetadataBuilder(ShortConvAttentionMetadataBuilder):
    """Describes a batch. vLLM tells classes that it knows by name, and those derived from them, of accepted drafts."""

    needs_causal_conv1d_metadata = False


class Backend(ShortConvAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "LIGHTNING_ATTENTION"

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        return MetadataBuilder


class States(MambaBase, nn.Module):
    """States `[H, D, D]` of a layer, in float32, and attention to all earlier tokens of a request.

    vLLM gives all layers blocks of one size. A layer with LRPE-d, whose states have twice the rows, has two of these.

    Args:
        log_decay: `[H]`, of the heads of this rank.
        head_dim: D.
        prefix: name of this module in the model.
    """

    def __init__(self, log_decay: Tensor, head_dim: int, prefix: str):
        super().__init__()
        self.decay = Decay(log_decay)
        self.shape = len(log_decay), head_dim, head_dim
        self.prefix = prefix
        self.kv_cache: tuple[Tensor, ...] = (torch.tensor([]),)  # vLLM sets it
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"there is a layer {prefix!r} already")
        layers[prefix] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return (self.shape,)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.float32,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.SHORT_CONV

    def get_attn_backend(self) -> type[Backend]:
        return Backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention `[T, H, D]` of the tokens of a step, which vLLM has sorted: decoded ones first, then prompts."""
        o, positions = torch.empty_like(v), v.new_empty(0, dtype=torch.int64)  # positions are not read
        # vLLM's own operator, at which it divides compiled graphs: it calls `_forward`.
        torch.ops.vllm.linear_attention(torch.stack([q, k, v]), o, positions, self.prefix)
        return o

    def _forward(self, hidden_states: Tensor, output: Tensor, positions: Tensor) -> None:
        by_layer: Any = get_forward_context().attn_metadata
        if by_layer is None:  # vLLM measures memory
            output.zero_()
            return
        batch = by_layer[self.prefix]
        decoded = batch.num_decode_tokens
        q, k, v = hidden_states
        if batch.num_decodes:
            decode = self._decode if batch.num_accepted_tokens is None else self._verify
            decode(q, k, v, output, batch)
        if batch.num_prefills:
            tokens = slice(decoded, decoded + batch.num_prefill_tokens)
            output[tokens] = self._prefill(q[tokens], k[tokens], v[tokens], batch)

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Tensor:
        """Read prompts, or the next parts of prompts."""
        o = lightning_attention_prefill_(
            q[None],
            k[None],
            v[None],
            self.decay.log_decay,
            state=self.kv_cache[0],
            state_indices=batch.state_indices_tensor_p,
            has_initial_state=batch.has_initial_states_p,
            cu_seqlens=batch.query_start_loc_p,
        )
        return o[0]

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, batch: Any) -> None:
        """Read a token of each request. In a CUDA graph there may be more rows than requests."""
        slots = _somebodys(batch.state_indices_tensor_d[:, 0])
        n, options = len(slots), {"state": self.kv_cache[0], "state_indices": slots}
        output[:n] = lightning_attention_step(q[:n], k[:n], v[:n], self.decay.log_decay, **options)

    def _verify(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, batch: Any) -> None:
        """Read a token of each request and its drafts, and keep the state after each of them in a block of its own.

        The state before them is in the block of the last token that was accepted.
        """
        blocks = _somebodys(batch.state_indices_tensor_d)
        bounds, num_tokens = batch.query_start_loc_d.long(), batch.num_decode_tokens
        before = blocks.gather(1, batch.num_accepted_tokens[:, None].long() - 1)[:, 0]
        tokens = bounds[:-1, None] + torch.arange(blocks.shape[1], device=blocks.device)
        # A request with fewer drafts has other tokens after its last one, whose states and outputs nobody reads.
        after = torch.where(tokens < bounds[1:, None], blocks, NOBODY)
        tokens = tokens.clamp_max(len(q) - 1)
        options = {"state": self.kv_cache[0], "state_indices": before, "saved_indices": after}
        o = lightning_attention_step(q[tokens], k[tokens], v[tokens], self.decay.log_decay, **options)
        token = torch.arange(num_tokens, device=blocks.device)
        request = (torch.searchsorted(bounds, token, right=True) - 1).clamp_max(len(o) - 1)
        output[:num_tokens] = o[request, (token - bounds[request]).clamp_max(o.shape[1] - 1)]


def _somebodys(blocks: Tensor) -> Tensor:
    return torch.where(blocks == NULL_BLOCK_ID, NOBODY, blocks)
