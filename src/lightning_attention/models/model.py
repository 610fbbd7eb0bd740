"""TransNormerLLM: `x ← x + GLA(SRMSNorm(x))`, `x ← x + SGLU(SRMSNorm(x))`, in every layer.

Shapes: B batch rows, T tokens, W width, H heads, L layers.
Source: TransNormerLLM (arXiv 2307.14995), figure 1 and section 3.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import CONFIG_NAME, logging
from transformers.utils.generic import can_return_tuple

from ..distributed.agreement import Agreement
from ..distributed.parallel import SequenceParallel
from ..nn import LRPE, GatedLightningAttention, SimpleGLU, SimpleRMSNorm
from ..nn.attention import Decay, Slots
from ..ops.problem import state_dtype
from ..paths import to_path
from .cache import CACHE, LightningCache, one_cache
from .configuration import LightningConfig
from .layout import Layout, layout_of
from .remote_code import is_ours
from .sequence_parallel import fails_on_every_rank, settle

logger = logging.get_logger(__name__)

# Without gradients a long sequence goes through the layers in pieces of so many tokens, so that their activations take
# constant memory. Measured on a CPU: a demo model is 1.4 times faster at 65536 tokens than in one piece.
PIECE = 4096


@dataclass
class LightningModelOutput(BaseModelOutputWithPast):
    """transformers' output, and `states` of every layer `[B, H, K, V]` after the last token of every batch row.

    The cache is there as `cache` and as `past_key_values`, whichever of them transformers calls it.
    """

    states: tuple[Tensor, ...] | None = None

    if CACHE == "past_key_values":

        @property
        def cache(self) -> Cache | None:
            return self.past_key_values


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
    # In transformers' sense, within generate() and with its static cache: this model has a cache of its own.
    # torch.compile(model, fullgraph=True) works.
    _can_compile_fullgraph = False

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """For classes derived from these: save their source with them. Their own needs none, see `remote_code`."""
        if not is_ours(cls):
            super().register_for_auto_class(auto_class)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """New weights are normal; decays and positions are what the configuration says."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if (bias := getattr(module, "bias", None)) is not None:
                init.zeros_(bias)
        elif isinstance(module, LRPE):
            init.copy_(module.theta, LRPE.initial_theta(*module.theta.shape, device=module.theta.device))
        elif isinstance(module, Decay):
            init.copy_(module.log_decay, module.initial_log_decay(module.log_decay.device))

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As transformers', with every weight: a head that is the embedding once, any other head as its own."""
        if (head := self.get_output_embeddings()) is not None:
            is_tied = head.weight is self.get_input_embeddings().weight
            self.config.tie_word_embeddings = is_tied
            self._keys_to_ignore_on_save = list(self._tied_weights_keys or ()) if is_tied else None
        super().save_pretrained(save_directory, *args, **kwargs)
        _share_mode(to_path(save_directory, "save_directory"))

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers'.

        Raises:
            ValueError: the vocabulary would be too small for a special token of the configuration.
        """
        if new_num_tokens is not None:
            self.config.check_token_ids(new_num_tokens)
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)


def _share_mode(folder: Path) -> None:
    """Give weights the mode of the configuration beside them: safetensors lets nobody but their owner read them."""
    config = folder / CONFIG_NAME
    for weights in folder.glob("model*.safetensors") if config.is_file() else []:
        weights.chmod(stat.S_IMODE(config.stat().st_mode))


class LightningModel(LightningPreTrainedModel):
    """The layers, from tokens to normalised hidden states."""

    def __init__(self, config: LightningConfig):
        super().__init__(config)
        # Without padding_idx: padding is left out anyway, and a token that also pads must be learned.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([LightningDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = SimpleRMSNorm(config.norm_eps)
        self.gradient_checkpointing = False
        self.sequence_parallel: SequenceParallel | None = None
        self.agreement: Agreement | None = None
        self.post_init()

    def set_sequence_parallel(self, sequence_parallel: SequenceParallel | None) -> None:
        """From now on inputs are this rank's slice of one sequence of documents, with `position_ids`, and the
        `cu_seqlens` of the whole.

        Every forward pass compares the ranks before the layers: an error or a difference raises on every rank.
        """
        self.sequence_parallel = sequence_parallel
        for module in self.modules():
            if isinstance(module, GatedLightningAttention):
                module.sequence_parallel = sequence_parallel

    @can_return_tuple
    @fails_on_every_rank
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LightningCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        states: Sequence[Tensor] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: LightningCache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        **kwargs: Any,
    ) -> LightningModelOutput:
        """
        Args:
            input_ids: `[B, T]` tokens; or else `inputs_embeds` `[B, T, W]`.
            attention_mask: `[B, T]` bool or integers, or `[B, past + T]` as transformers passes it: 0 marks padding,
                anywhere in a batch row. Numbers above 1 tell documents apart (1, 1, 2, 2).
            position_ids: `[B, T]`. Where they do not go on by one a new document starts, and sees nothing of the one
                before; across padding they may also go on by the columns in between. By default they go on from the
                cache, or from 0.
            cache: the state of what came before; advanced in place. Also as `past_key_values`.
            use_cache: whether to return the state; by default as the configuration says, outside training and for
                batch rows of one document each.
            cu_seqlens: `[N + 1]`, documents packed in one batch row (B = 1), as for `lightning_attention`.
            seq_idx: `[B, T]`, the number of the document of every token, as for Mamba-2.
            states: of every layer `[B, H, K, V]` float32, before the first token of every batch row; zero where a
                document starts there. Gradients flow to them. They go with `position_ids`, which may restart.
            output_hidden_states: also return the L + 1 hidden states: embeddings, after every layer but the last, and
                the normalised ones after the last.
            output_attentions: refused if true; there are no attention weights.
            cu_seq_lens_q, cu_seq_lens_k: `cu_seqlens` by the names that flash attention has for them; equal.
            max_length_q, max_length_k: accepted beside them, and not needed.

        While a graph is traced (torch.compile, torch.export) no values are looked at: inputs with `position_ids` or
        `seq_idx` are packed as documents, and return no state, unless a cache is given or `use_cache=True`.

        Raises:
            TypeError: an argument is unknown or has the wrong type; the cache is not a `LightningCache`.
            ValueError: inputs that contradict each other.
        """
        if kwargs:
            raise TypeError(f"{type(self).__name__}.forward() does not know the argument {', '.join(kwargs)}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions must be False: linear attention has no attention weights")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cache = one_cache(cache, past_key_values)
        if cu_seq_lens_q is None and not (max_length_q is max_length_k is None):
            raise ValueError("max_length_q and max_length_k go with cu_seq_lens_q and cu_seq_lens_k")
        cu_seqlens = _one_cu_seqlens(cu_seqlens, cu_seq_lens_q, cu_seq_lens_k)
        is_traced = torch.compiler.is_compiling()
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if cache is not None and len(cache.layers) != len(self.layers):
            raise ValueError(f"the cache has {len(cache.layers)} layers, the model {len(self.layers)}")
        if cache is not None and checkpointing:
            raise ValueError("gradient checkpointing would advance the cache twice: leave one of them out")
        if states is not None and use_cache:
            raise ValueError("states go with no use_cache=True: the states after these tokens are returned as they are")
        if checkpointing and use_cache:
            logger.warning_once("use_cache=True is not possible with gradient checkpointing: no cache is returned")
        must_cache = bool(use_cache) or (is_traced and position_ids is seq_idx is cu_seqlens is None)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        use_cache = use_cache and not checkpointing and states is None

        x = self._scaled(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        if x.dim() != 3:
            raise ValueError(f"input_ids must be [B, T], or inputs_embeds [B, T, W], got {x.dim() - 1} dimensions")
        batch_size, length = x.shape[:2]
        if self.sequence_parallel is not None:
            layout = _layout_of_slice(x, attention_mask, position_ids, seq_idx, cu_seqlens, cache)
        else:
            keeps_state = cache is not None or (use_cache and must_cache)
            layout = layout_of(x, attention_mask, position_ids, seq_idx, cu_seqlens, cache, keeps_state=keeps_state)
        if states is not None:
            _check_states(states, len(self.layers), layout, position_ids, cache)
        if self.agreement is not None:
            settle(self, self.agreement, x, layout, states, checkpointing)
        if cache is None and use_cache and not layout.has_documents:
            cache = LightningCache(self.config.num_hidden_layers)

        embeddings, x, carried = x, layout.pack(x), cache
        pieces = [(x, layout.positions)]
        is_in_pieces = layout.cu_seqlens is None and states is None and not (is_traced or torch.is_grad_enabled())
        if is_in_pieces and length > PIECE:
            pieces = list(zip(x.split(PIECE, dim=1), layout.positions.split(PIECE, dim=1), strict=True))
            carried = LightningCache(self.config.num_hidden_layers) if cache is None else cache
        # A single token without gradients updates its state in place, which must not be the caller's.
        before = None if states is None else [layout.before_sequences(state).clone() for state in states]
        slots = None if layout.slots is None else Slots(layout.slots)
        outputs, after = [], []
        for piece, positions in pieces:
            if carried is not None:
                before = self._states_of(carried, batch_size, x)
            hidden_states, after = self._through_layers(
                piece, positions, layout.cu_seqlens, before, slots, bool(output_hidden_states)
            )
            if carried is not None:
                carried.put(after)
            outputs.append(hidden_states)
        hidden_states = outputs[0] if len(outputs) == 1 else [torch.cat(x, dim=1) for x in zip(*outputs, strict=True)]
        hidden_states = [layout.unpack(x) for x in hidden_states]
        if cache is not None:
            cache.advance(length, layout.count_tokens(), batch_size, x.device)
        returned: dict[str, Any] = {CACHE: cache if use_cache else None}
        return LightningModelOutput(
            last_hidden_state=hidden_states[-1],
            hidden_states=(embeddings, *hidden_states) if output_hidden_states else None,
            states=None if states is None else tuple(map(layout.after_rows, after)),
            **returned,
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
        slots: Slots | None,
        keep_all: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The normalised output, after those of all layers but the last if they are kept; and the states after."""
        hidden_states, after = [], []
        for layer, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            x, state = layer(x, positions, cu_seqlens, state, slots)
            hidden_states = [*hidden_states, x] if keep_all else [x]
            after.append(state)
        return [*hidden_states[:-1], self.norm(x)], after

    def _states_of(self, cache: LightningCache, batch_size: int, x: Tensor) -> list[Tensor]:
        states = [
            cache.state(i, (batch_size, *self.config.layer_state_shape(i)), state_dtype(x.dtype), x.device)
            for i in range(len(self.layers))
        ]
        # What a backward pass may need must not be overwritten.
        return [state.clone() for state in states] if torch.is_grad_enabled() else states


def _one_cu_seqlens(cu_seqlens: Tensor | None, q: Tensor | None, k: Tensor | None) -> Tensor | None:
    """The bounds of documents, by whichever name they were given."""
    if q is None and k is None:
        return cu_seqlens
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens and cu_seq_lens_q, cu_seq_lens_k are names of one argument: give one of them")
    if q is None or k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k go together")
    if q is not k and (q.shape != k.shape or not (torch.compiler.is_compiling() or torch.equal(q, k))):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be equal: every document attends to itself")
    return q


def _check_states(
    states: Sequence[Tensor], num_layers: int, layout: Layout, position_ids: Tensor | None, cache: LightningCache | None
) -> None:
    if position_ids is None or layout.tokens is not None or cache is not None:
        raise ValueError("states go with position_ids, and with no padding or cache")
    if len(states) != num_layers:
        raise ValueError(f"states must be one for each of {num_layers} layers, got {len(states)}")


def _layout_of_slice(
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: LightningCache | None,
) -> Layout:
    if (
        x.shape[0] != 1
        or position_ids is None
        or cu_seqlens is None
        or not (attention_mask is seq_idx is cache is None)
    ):
        raise ValueError(
            "sequence parallelism takes a slice of one batch row (B = 1) with position_ids, and the cu_seqlens of the "
            "whole row, and no attention_mask, seq_idx or cache"
        )
    return Layout((1, x.shape[1]), position_ids, cu_seqlens.cpu(), has_documents=True)
