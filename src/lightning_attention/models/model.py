"""TransNormerLLM: `x ← x + GLA(SRMSNorm(x))`, `x ← x + SGLU(SRMSNorm(x))`, in every layer.

Shapes: B rows, T tokens, W width, H heads, L layers.
Source: TransNormerLLM (arXiv 2307.14995), figure 1 and section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ..distributed.parallel import SequenceParallel
from ..nn import LRPE, GatedLightningAttention, SimpleGLU, SimpleRMSNorm
from ..nn.attention import Decay, Slots
from ..ops.problem import state_dtype
from .cache import LightningCache
from .configuration import LightningConfig
from .layout import Layout

# Without gradients a long sequence goes through the layers in pieces of so many tokens, so that their activations take
# constant memory. Measured on a CPU: a demo model is 1.4 times faster at 65536 tokens than in one piece.
PIECE = 4096


@dataclass
class LightningModelOutput(BaseModelOutputWithPast):
    """And `states`, of every layer `[B, H, K, V]`, after the last token of every row."""

    states: tuple[Tensor, ...] | None = None


@dataclass
class LightningOutput(CausalLMOutputWithPast):
    """And `states`, likewise."""

    states: tuple[Tensor, ...] | None = None


class LightningDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LightningConfig, layer_idx: int):
        super().__init__()
        self.attention_norm = SimpleRMSNorm(config.norm_eps)
        self.attention = GatedLightningAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.layer_log_decay(layer_idx),
            lrpe=config.layer_has_lrpe(layer_idx),
            eps=config.norm_eps,
        )
        self.mlp_norm = SimpleRMSNorm(config.norm_eps)
        self.mlp = SimpleGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | None,
        state: Tensor | None,
        slots: Slots | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        y, state = self.attention(self.attention_norm(x), positions, cu_seqlens, state, slots)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state


class LightningPreTrainedModel(PreTrainedModel):
    config: LightningConfig
    config_class = LightningConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LightningDecoderLayer"]
    # The state cannot be rolled back, so transformers must not offer assisted generation.
    _is_stateful = True
    _keep_in_fp32_modules_strict = ["theta"]
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """New weights are normal; decays and positions are what the configuration says."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, LRPE):
            init.copy_(module.theta, LRPE.initial_theta(*module.theta.shape))
        elif isinstance(module, Decay):
            init.copy_(module.log_decay, module.initial_log_decay())


class LightningModel(LightningPreTrainedModel):
    """The layers, from tokens to normalised hidden states."""

    def __init__(self, config: LightningConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([LightningDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = SimpleRMSNorm(config.norm_eps)
        self.gradient_checkpointing = False
        self.sequence_parallel: SequenceParallel | None = None
        self.post_init()

    def set_sequence_parallel(self, sequence_parallel: SequenceParallel | None) -> None:
        """From now on inputs are this rank's slice of a row, with `position_ids`, and `cu_seqlens` of the whole row."""
        self.sequence_parallel = sequence_parallel
        for module in self.modules():
            if isinstance(module, GatedLightningAttention):
                module.sequence_parallel = sequence_parallel

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LightningCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        states: Sequence[Tensor] | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> LightningModelOutput:
        """
        Args:
            input_ids: `[B, T]` tokens; or else `inputs_embeds` `[B, T, W]`.
            attention_mask: `[B, T]`, or `[B, past + T]` as transformers passes it: 0 marks padding, anywhere in a row.
            position_ids: `[B, T]`. Where they do not go on by one a new document starts, and sees nothing of the one
                before. By default they go on from the cache, or from 0.
            past_key_values: the state of what came before; advanced in place.
            use_cache: whether to return the state; by default as the configuration says, outside training. Packed
                documents return none.
            cu_seqlens: `[N + 1]`, documents packed in one row (B = 1), as for `lightning_attention`.
            states: of every layer `[B, H, K, V]` float32, before the first token of every row; zero where a document
                starts there. Gradients flow to them. They go with `position_ids`, which may restart within a row.
            output_hidden_states: also return the L + 1 hidden states before and after the layers.

        Raises:
            ValueError: inputs that contradict each other.
            TypeError: the cache is not a `LightningCache`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        checkpointing = self.gradient_checkpointing and self.training
        if past_key_values is not None:
            if not isinstance(past_key_values, LightningCache):
                raise TypeError(f"past_key_values must be a LightningCache, got {type(past_key_values).__name__}")
            if checkpointing:
                raise ValueError("gradient checkpointing would advance past_key_values twice: leave one of them out")
        x = self._scaled(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        batch_size, length = x.shape[:2]
        mask = _local_mask(attention_mask, batch_size, length)
        layout = self._lay_out(x, mask, position_ids, past_key_values, cu_seqlens, states)

        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        is_packed = layout.cu_seqlens is not None and mask is None
        cache = past_key_values
        if cache is None and use_cache and not is_packed and not checkpointing and states is None:
            cache = LightningCache(self.config.num_hidden_layers)

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x, carried = layout.pack(x), cache
        size = x.shape[1]
        if layout.cu_seqlens is None and size > PIECE and not torch.is_grad_enabled() and states is None:
            size, carried = PIECE, LightningCache(self.config.num_hidden_layers) if cache is None else cache
        # A single token without gradients updates its state in place, which must not be the caller's.
        before = None if states is None else [layout.before_sequences(state).clone() for state in states]
        pieces, after = [], []
        for piece, positions in zip(x.split(size, dim=1), layout.positions.split(size, dim=1), strict=True):
            if carried is not None:
                before = self._states_of(carried, batch_size, x)
            hidden_states, after = self._through_layers(
                piece, positions, layout.cu_seqlens, before, bool(output_hidden_states)
            )
            if carried is not None:
                carried.put(after)
            pieces.append(hidden_states)
        hidden_states = pieces[0] if len(pieces) == 1 else [torch.cat(x, dim=1) for x in zip(*pieces, strict=True)]
        if cache is not None:
            cache.advance(length, length if mask is None else mask.sum(dim=1), batch_size, x.device)
        return LightningModelOutput(
            last_hidden_state=layout.unpack(self.norm(hidden_states[-1])),
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(map(layout.unpack, hidden_states)) if output_hidden_states else None,
            states=None if states is None else tuple(map(layout.after_rows, after)),
        )

    @torch.no_grad()
    def advance(
        self, input_ids: Tensor, positions: Tensor, states: list[Tensor], slots: Slots, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """For serving: the next tokens of sequences whose states are slots of a pool, which advance in place.

        Args:
            input_ids: `[N, 1]`, a token each; or `[1, T]`, some tokens of each, packed.
            positions: the shape of `input_ids`, each token's in its sequence.
            states: of every layer `[num_slots, H, K, V]`.
            slots: whose turn it is.
            cu_seqlens: `[N + 1]`, where they are packed.

        Returns:
            `[N, W]`, the normalised hidden states of the last token of every sequence.
        """
        x = self._scaled(self.embed_tokens(input_ids))
        for layer, state in zip(self.layers, states, strict=True):
            x, _ = layer(x, positions, cu_seqlens, state, slots)
        return self.norm(x[:, -1] if cu_seqlens is None else x[0, cu_seqlens[1:] - 1])

    def _scaled(self, embeddings: Tensor) -> Tensor:
        return embeddings * self.config.hidden_size**0.5

    def _through_layers(
        self,
        x: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | None,
        states: list[Tensor] | None,
        keep_all: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What comes out of the last layer, or the hidden states before and after every layer; and the states after."""
        hidden_states, after = [x], []
        for layer, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            x, state = layer(x, positions, cu_seqlens, state)
            hidden_states = [*hidden_states, x] if keep_all else [x]
            after.append(state)
        return hidden_states, after

    def _states_of(self, cache: LightningCache, batch_size: int, x: Tensor) -> list[Tensor]:
        states = [
            cache.state(i, (batch_size, *self.config.layer_state_shape(i)), state_dtype(x.dtype), x.device)
            for i in range(len(self.layers))
        ]
        # What a backward pass may need must not be overwritten.
        return [state.clone() for state in states] if torch.is_grad_enabled() else states

    def _lay_out(
        self,
        x: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cache: LightningCache | None,
        cu_seqlens: Tensor | None,
        states: Sequence[Tensor] | None,
    ) -> Layout:
        is_sliced = self.sequence_parallel is not None
        if states is not None:
            if position_ids is None or not (mask is cache is None) or (cu_seqlens is not None and not is_sliced):
                raise ValueError("states go with position_ids, and with no padding, cache or cu_seqlens")
            if len(states) != len(self.layers):
                raise ValueError(f"states must be one for each of {len(self.layers)} layers, got {len(states)}")
        if not is_sliced:
            return _layout_of(x, mask, position_ids, cache, cu_seqlens)
        if x.shape[0] != 1 or position_ids is None or cu_seqlens is None or not (mask is cache is None):
            raise ValueError(
                "sequence parallelism takes a slice of one row (B = 1) with position_ids, and the cu_seqlens of the "
                "whole row, and no padding or cache"
            )
        return Layout((1, x.shape[1]), position_ids, cu_seqlens.cpu())


class LightningForCausalLM(LightningPreTrainedModel, GenerationMixin):
    """The language model: `LightningModel`, and logits over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LightningConfig):
        super().__init__(config)
        self.model = LightningModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:  # stored once, under the name of the embedding
            self._keys_to_ignore_on_save = list(self._tied_weights_keys)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LightningCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        states: Sequence[Tensor] | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> LightningOutput:
        """
        Args:
            labels: `[B, T]` tokens, usually `input_ids`: they are shifted here, so that token t predicts t + 1. -100
                is left out of the loss.
            logits_to_keep: compute the logits of the last so many tokens only, or of these indices; 0 is all.
            others: as for `LightningModel`.

        Returns:
            Logits `[B, T, vocab_size]`, the mean loss in nats a token where labels are given, the cache, and the states
            after these tokens where those before were given.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            states=states,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return LightningOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            states=outputs.states,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """transformers' generate() calls this; the cache of this model is `LightningCache` and no other."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation must be None: the state of this model has one form, "
                f"got {generation_config.cache_implementation!r}"
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LightningCache(self.config.num_hidden_layers)


def _local_mask(attention_mask: Tensor | None, batch_size: int, length: int) -> Tensor | None:
    """`[B, T]` for the tokens of this call, true where they are real; None where all are."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size or attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask must be [B, T] = [{batch_size}, {length}], or longer by the tokens in the cache, "
            f"got shape {tuple(attention_mask.shape)}"
        )
    mask = attention_mask[:, attention_mask.shape[1] - length :].bool()
    return None if mask.all() else mask


def _layout_of(
    x: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    cache: LightningCache | None,
    cu_seqlens: Tensor | None,
) -> Layout:
    batch_size, length = x.shape[:2]
    if cu_seqlens is not None:
        if batch_size != 1 or mask is not None or cache is not None or position_ids is not None:
            raise ValueError("cu_seqlens goes with one row (B = 1), and no padding, position_ids or cache")
        return Layout.of_packed(cu_seqlens, length)
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch_size) or position_ids.shape[1] != length:
            raise ValueError(
                f"position_ids must be [B, T] = [{batch_size}, {length}], got shape {tuple(position_ids.shape)}"
            )
        position_ids = position_ids.expand(batch_size, -1)
        if mask is None and length > 1 and not (position_ids.diff(dim=1) == 1).all():
            if cache is not None:
                raise ValueError("position_ids that restart are packed documents, which a cache cannot hold")
            return Layout.of_documents(position_ids)
    else:
        start = 0 if cache is None or cache.positions is None else cache.positions[:, None]
        counted = torch.arange(length, device=x.device)[None] if mask is None else mask.cumsum(dim=1) - 1
        position_ids = start + counted
    return Layout((batch_size, length), position_ids) if mask is None else Layout.of_padded(mask, position_ids)
