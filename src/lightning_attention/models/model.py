"""TransNormerLLM: in every layer `x ← x + mixer(SRMSNorm(x))`, then `x ← x + SGLU(SRMSNorm(x))`.

Shapes: B batch rows, T tokens, W width, H heads, L layers.
Source: TransNormerLLM (arXiv 2307.14995), figure 1 and section 3.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from ..distributed.agreement import Agreement
from ..distributed.parallel import SequenceParallel
from ..nn import KeyValues, LearnedPositions, Slots, SoftmaxAttention, TokenMixer
from ..nn.float32 import Float32Module
from ..nn.invariant import invariant_functions
from ..ops.custom_ops import autocast
from ..ops.decoding_state import DecodingState
from ..ops.problem import state_dtype
from .base import LightningPreTrainedModel
from .cache import CACHE, CacheName, LightningCache, resolve_cache
from .configuration import LightningConfig
from .layout import BatchDescription, Layout, build_layout
from .mixers import FULL
from .sequence_parallel import compare_ranks, slice_layout

logger = logging.get_logger(__name__)

# Tokens that go through the layers at once when no gradient is needed, so that activations take constant memory.
# Measured on a CPU: a demo model reads 65536 tokens 1.4 times faster than all at once.
TOKENS_PER_PASS = 4096


@dataclass
class LightningModelOutput(CacheName, BaseModelOutputWithPast):  # pyright: ignore[reportIncompatibleVariableOverride]
    """transformers' output, with `states`: of every layer `[B, H, K, V]`, after the last token of each batch row.

    The cache has both names, `cache` and `past_key_values`.
    """

    states: tuple[Tensor, ...] | None = None


class LightningDecoderLayer(GradientCheckpointingLayer):
    """One layer: a token mixer and a GLU, each with a norm before and a residual connection."""

    def __init__(self, config: LightningConfig, layer_idx: int):
        super().__init__()
        self.attention_norm = config.make_norm()
        self.attention = config.make_mixer(layer_idx)
        self.mlp_norm = config.make_norm()
        self.mlp = config.make_glu()

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | None,
        state: Tensor | KeyValues | DecodingState | None,
        slots: Slots | None = None,
    ) -> tuple[Tensor, Tensor | KeyValues | DecodingState | None]:
        with invariant_functions(x, self.attention.invariant):
            y, state = self.attention(self.attention_norm(x), positions, cu_seqlens, state, slots)
            x = x + y
            return x + self.mlp(self.mlp_norm(x)), state


class LightningModel(LightningPreTrainedModel):
    """Embedding, L layers and the final norm: from tokens `[B, T]` to normalised hidden states `[B, T, W]`.

    Example:
        >>> import torch
        >>> from lightning_attention.models import LightningConfig, LightningModel
        >>> model = LightningModel(LightningConfig.from_size("demo", vocab_size=256))
        >>> model(torch.randint(256, (2, 10))).last_hidden_state.shape
        torch.Size([2, 10, 192])
    """

    def __init__(self, config: LightningConfig):
        super().__init__(config)
        # No padding_idx: padding is removed, and a token that is also used as padding must be learned.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = (
            LearnedPositions(config.position_limit or 0, config.hidden_size) if config.positions == "learned" else None
        )
        self.layers = nn.ModuleList([LightningDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = config.make_norm()
        self.gradient_checkpointing = False
        self.sequence_parallel: SequenceParallel | None = None
        # Names of weights that from_pretrained(dtype=torch.bfloat16) loads as float32.
        self._keep_in_fp32_modules_strict = {
            f"{name}.{weight}"
            for name, module in self.named_modules()
            if isinstance(module, Float32Module)
            for weight in module.state_dict()
        }
        self.post_init()

    def set_sequence_parallel(self, sequence_parallel: SequenceParallel | None) -> None:
        """Share the tokens of a batch row among the ranks of a process group; None stops sharing.

        Inputs are then this rank's slice of one batch row, with `position_ids`, and the `cu_seqlens` of the complete
        batch row. Every forward pass compares the ranks before the layers: an error on one rank, or a difference
        between ranks, raises on every rank.

        Raises:
            ValueError: a layer has softmax attention, which has no states to exchange; or the model is invariant.
        """
        if sequence_parallel is not None and self.config.invariant:
            raise ValueError("an invariant model cannot share sequences: sums of states depend on the number of ranks")
        if sequence_parallel is not None and self.config.has_softmax:
            raise ValueError("softmax attention has no states that ranks exchange: they cannot share sequences")
        self.sequence_parallel = sequence_parallel
        for module in self.modules():
            if isinstance(module, TokenMixer):
                module.sequence_parallel = sequence_parallel

    @can_return_tuple
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
        """Run the layers.

        Args:
            input_ids: `[B, T]` tokens; or give `inputs_embeds` `[B, T, W]`.
            attention_mask: `[B, T]` bool or integers, or `[B, past + T]` as transformers passes it: 0 marks padding,
                anywhere in a batch row. Numbers above 1 separate packed sequences (1, 1, 2, 2).
            position_ids: `[B, T]`. A new sequence, which does not attend to the one before, starts where positions do
                not continue by 1; across padding they may also continue by the number of columns. By default positions
                continue from the cache, or start at 0.
            cache: states of earlier tokens, updated in place. Also accepted as `past_key_values`.
            use_cache: whether to return the cache; by default as the configuration says, outside training and for
                batch rows of one sequence each.
            cu_seqlens: `[N + 1]` bounds of sequences packed into one batch row (B = 1), see `lightning_attention`.
            seq_idx: `[B, T]` number of the sequence of each token, as for Mamba-2.
            states: of every layer `[B, H, K, V]` float32, before the first token of each batch row; ignored where a
                sequence starts. Gradients flow to them. They need `position_ids`, which may restart.
            output_hidden_states: also return L + 1 hidden states: the embeddings, the output of every layer but the
                last, and the normalised output of the last.
            output_attentions: must be false, since there are no attention weights.
            cu_seq_lens_q, cu_seq_lens_k: `cu_seqlens` by the names of flash attention; equal.
            max_length_q, max_length_k: accepted with `cu_seq_lens_q`, and not needed.

        A traced graph (torch.compile, torch.export) cannot read values: inputs with `position_ids` or `seq_idx` are
        packed as several sequences and return no cache, unless a cache is given or `use_cache=True`.

        Returns:
            `last_hidden_state` `[B, T, W]`, zero in the padding; and the cache, hidden states and states if requested.

        Raises:
            TypeError: an argument is unknown or has the wrong type; the cache is not a `LightningCache`.
            ValueError: arguments contradict each other.
        """
        with self._agreement() as agreement:
            if kwargs:
                raise TypeError(f"{type(self).__name__}.forward() does not know the argument {', '.join(kwargs)}")
            if self.config.output_attentions if output_attentions is None else output_attentions:
                raise ValueError("output_attentions must be False: this model computes no attention weights")
            cache = resolve_cache(cache, past_key_values)
            cu_seqlens = _resolve_cu_seqlens(cu_seqlens, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
            given = BatchDescription(attention_mask, position_ids, seq_idx, cu_seqlens)
            returns_cache, one_per_row = self._resolve_use_cache(use_cache, cache, states, given)
            embeddings = self._embed(input_ids, inputs_embeds)
            layout = self._check_layout(embeddings, given, cache, states, one_per_row=one_per_row)
            if agreement is not None:
                compare_ranks(self, agreement, embeddings, layout, states)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if cache is None and returns_cache and not layout.splits_rows:
            cache = LightningCache(len(self.layers))

        encoded = None if self.embed_positions is None else self.embed_positions(layout.positions)
        if output_hidden_states:
            embeddings = self._scale(embeddings, None if encoded is None else layout.unpack(encoded))
            x = layout.pack(embeddings)
        else:  # scaled last: a compiled layer would have a graph for a view, which `pack` may return
            x = self._scale(layout.pack(embeddings), encoded)
        if cache is not None:
            cache.open()
        hidden_states, states_after = self._run_layers(x, layout, cache, states, bool(output_hidden_states))
        if cache is not None:
            padding = None if layout.is_token is None else ~layout.is_token
            cache.advance(layout.batch_shape[1], layout.next_positions(cache.positions), padding)
        returned: dict[str, Any] = {CACHE: cache if returns_cache else None}
        return LightningModelOutput(
            last_hidden_state=hidden_states[-1],
            hidden_states=(embeddings, *hidden_states) if output_hidden_states else None,
            states=None if states is None else tuple(map(layout.after_rows, states_after)),
            **returned,
        )

    @torch.no_grad()
    def advance(
        self,
        input_ids: Tensor,
        positions: Tensor,
        states: Sequence[Tensor | DecodingState],
        slots: Slots,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Read the next tokens of sequences whose states are slots of a pool, and update the pool in place.

        Args:
            input_ids: `[N, 1]`, one token of each sequence; or `[1, T]`, several tokens of each, packed.
            positions: of every token in its sequence, the shape of `input_ids`.
            states: of every layer `[num_slots, H, K, V]`, or a `DecodingState` of as many slots.
            slots: of the N sequences.
            cu_seqlens: `[N + 1]` bounds of packed sequences.

        Returns:
            `[N, W]`, normalised hidden states of the last token of each sequence.
        """
        encoded = None if self.embed_positions is None else self.embed_positions(positions)
        x = self._scale(self.embed_tokens(input_ids), encoded)
        for layer, state in zip(self.layers, states, strict=True):
            x, _ = layer(x, positions, cu_seqlens, state, slots)
        return self.norm(x[:, -1] if cu_seqlens is None else x[0, cu_seqlens[1:] - 1])

    @property
    def state_shapes(self) -> list[tuple[int, int, int]]:
        """Shape `(H, K, V)` of the state of one sequence, of every layer."""
        mixers: list[Any] = [layer.attention for layer in self.layers]
        return [mixer.state_shape for mixer in mixers]

    @property
    def is_checkpointing(self) -> bool:
        """True if the next forward pass recomputes activations in its backward pass."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def _agreement(self) -> AbstractContextManager[Agreement | None]:
        """Context in which, with sequence parallelism, an error raises on every rank."""
        if self.sequence_parallel is None:
            return nullcontext()
        return self.sequence_parallel.agreement(self.embed_tokens.weight)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Return embeddings `[B, T, W]` of the tokens, or those given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if embeddings.dim() != 3:
            dimensions = embeddings.dim() - 1
            raise ValueError(f"input_ids must be [B, T], or inputs_embeds [B, T, W], got {dimensions} dimensions")
        return embeddings

    def _scale(self, embeddings: Tensor, positions: Tensor | None) -> Tensor:
        """Input of the first layer, with embeddings of positions added to those of tokens, if there are any.

        In bfloat16 autocast it is bfloat16, as are the outputs that layers add to it.
        """
        if positions is not None:
            embeddings = embeddings + positions
        if self.config.embedding_scale != 1:
            embeddings = embeddings * self.config.embedding_scale
        (cast,) = autocast(embeddings)
        return cast if cast.dtype == torch.bfloat16 else embeddings  # float16 would overflow

    def _resolve_use_cache(
        self,
        use_cache: bool | None,
        cache: LightningCache | None,
        states: Sequence[Tensor] | None,
        given: BatchDescription,
    ) -> tuple[bool, bool]:
        """Return whether to return a cache, and whether a batch row of several sequences is an error."""
        if cache is not None and len(cache.layers) != len(self.layers):
            raise ValueError(f"the cache has {len(cache.layers)} layers, the model {len(self.layers)}")
        if cache is not None and cache.window is not None and FULL not in (self.config.layer_types or ()):
            raise ValueError(f"the cache has a window, and the model no layer of {FULL} to apply it to")
        if cache is not None and self.is_checkpointing:
            raise ValueError("gradient checkpointing would advance the cache twice: leave one of them out")
        if states is not None and use_cache:
            raise ValueError("states go with no use_cache=True: the states after these tokens are returned as they are")
        if self.is_checkpointing and use_cache:
            logger.warning_once("use_cache=True is not possible with gradient checkpointing: no cache is returned")
        returns_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        returns_cache = returns_cache and not self.is_checkpointing and states is None
        is_required = bool(use_cache) or (torch.compiler.is_compiling() and not given.may_split_rows)
        return returns_cache, cache is not None or (returns_cache and is_required)

    def _check_layout(
        self,
        embeddings: Tensor,
        given: BatchDescription,
        cache: LightningCache | None,
        states: Sequence[Tensor] | None,
        *,
        one_per_row: bool,
    ) -> Layout:
        """Build the layout of the tokens, and check lengths and states against it."""
        if self.sequence_parallel is None:
            layout = build_layout(embeddings, given, cache, one_per_row=one_per_row)
        else:
            layout = slice_layout(embeddings, given, cache)
        if not layout.splits_rows and (cache is not None or not given.may_split_rows):
            self._check_length(layout, cache)
        if states is not None and (given.position_ids is None or layout.token_indices is not None or cache is not None):
            raise ValueError("states go with position_ids, and with no padding or cache")
        if states is not None and self.config.has_softmax:
            raise ValueError("states go with layers of linear attention alone: softmax attention has none")
        if states is not None and self.config.invariant:
            raise ValueError("states go with no invariant=True: they do not say where chunks began; use a cache")
        if states is not None and len(states) != len(self.layers):
            raise ValueError(f"states must be one for each of {len(self.layers)} layers, got {len(states)}")
        return layout

    def _check_length(self, layout: Layout, cache: LightningCache | None) -> None:
        """Check the tokens of the longest batch row, with those in the cache; in a traced graph with padding."""
        if self.config.position_limit is None:
            return
        length = layout.batch_shape[1] + (0 if cache is None else cache.length)
        if length > self.config.position_limit and not torch.compiler.is_compiling():
            past = 0 if cache is None or cache.positions is None else cache.positions
            length = int((past + torch.as_tensor(layout.count_tokens())).max())
        self.config.check_length(length)

    def _run_layers(
        self,
        x: Tensor,
        layout: Layout,
        cache: LightningCache | None,
        states: Sequence[Tensor] | None,
        keeps_hidden_states: bool,
    ) -> tuple[list[Tensor], list[Any]]:
        """Run the layers on packed tokens, for long inputs without gradients TOKENS_PER_PASS tokens at a time.

        Returns:
            Hidden states `[B, T, W]`: of every layer but the last if they are kept, then the normalised output; and of
            every layer the state after the tokens, if there was one before.
        """
        slots = None if layout.slots is None else Slots(layout.slots)
        passes = [(x, layout.positions)]
        needs_one_pass = layout.cu_seqlens is not None or states is not None or torch.is_grad_enabled()
        if not needs_one_pass and not torch.compiler.is_compiling() and x.shape[1] > TOKENS_PER_PASS:
            splits = (y.split(TOKENS_PER_PASS, dim=1) for y in passes[0])
            passes = list(zip(*splits, strict=True))
            cache = LightningCache(len(self.layers)) if cache is None else cache
        current: list[Any] = [None] * len(self.layers)
        if states is not None:
            # Cloned, since a single token without gradients updates its state in place.
            current = [layout.before_sequences(state).clone() for state in states]
        outputs = []
        for y, positions in passes:
            if cache is not None:
                current = self._read_cache(cache, layout.batch_shape[0], y)
            kept = []
            for i, layer in enumerate(self.layers):
                y, current[i] = layer(y, positions, layout.cu_seqlens, current[i], slots)
                if keeps_hidden_states:
                    kept.append(y)
            outputs.append([*kept[:-1], self.norm(y)])
            if cache is not None:
                cache.put(current)
        hidden_states = outputs[0] if len(outputs) == 1 else [torch.cat(x, dim=1) for x in zip(*outputs, strict=True)]
        return [layout.unpack(x) for x in hidden_states], current

    def _read_cache(
        self, cache: LightningCache, batch_size: int, x: Tensor
    ) -> list[Tensor | KeyValues | DecodingState]:
        return [self._read_layer(cache, i, batch_size, x) for i in range(len(self.layers))]

    def _read_layer(
        self, cache: LightningCache, layer_idx: int, batch_size: int, x: Tensor
    ) -> Tensor | KeyValues | DecodingState:
        mixer: Any = self.layers[layer_idx]
        mixer = mixer.attention
        if isinstance(mixer, SoftmaxAttention):
            (cast,) = autocast(x)
            return cache.key_values(layer_idx, mixer, batch_size, cast.dtype, x.device)
        if self.config.invariant:
            (cast,) = autocast(x)
            return cache.decoding_state(layer_idx, (batch_size, *mixer.state_shape), cast.dtype, x.device)
        state = cache.state(layer_idx, (batch_size, *mixer.state_shape), state_dtype(x.dtype), x.device)
        # Cloned with gradients, since a backward pass may read it after the cache is updated.
        return state.clone() if torch.is_grad_enabled() else state


def _resolve_cu_seqlens(
    cu_seqlens: Tensor | None, q: Tensor | None, k: Tensor | None, max_length_q: int | None, max_length_k: int | None
) -> Tensor | None:
    """Return the bounds given as `cu_seqlens`, or as `cu_seq_lens_q` and `cu_seq_lens_k`."""
    if q is None and not (max_length_q is max_length_k is None):
        raise ValueError("max_length_q and max_length_k go with cu_seq_lens_q and cu_seq_lens_k")
    if q is None and k is None:
        return cu_seqlens
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens and cu_seq_lens_q, cu_seq_lens_k are names of one argument: give one of them")
    if q is None or k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k go together")
    if q is not k and (q.shape != k.shape or not (torch.compiler.is_compiling() or torch.equal(q, k))):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be equal: every sequence attends to itself")
    return q
