"""Cache for `generate()`: of every layer a state of constant size, or keys and values."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..nn import KeyValues, SoftmaxAttention
from ..nn.key_values import check_window
from ..ops.decoding_state import DecodingState

# transformers' name of the cache among arguments and outputs: `cache` since 5.24, `past_key_values` before.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


class KeyValueLayer(CacheLayerMixin):
    """Keys and values of a layer of softmax attention."""

    def __init__(self, key_values: KeyValues):
        super().__init__()
        self.key_values = key_values

    def lazy_initialization(self, *_: Any) -> None: ...

    def update(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("SoftmaxAttention appends keys and values itself")

    def get_mask_sizes(self, *_: Any) -> Any:
        raise NotImplementedError("SoftmaxAttention makes its masks itself")

    def get_seq_length(self) -> int:
        return self.key_values.longest

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.key_values.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.key_values.select(beam_idx)


class DecodingLayer(CacheLayerMixin):
    """Decoding states of a layer, of an invariant model."""

    def __init__(self, state: DecodingState):
        super().__init__()
        self.state = state

    def lazy_initialization(self, *_: Any) -> None: ...

    def update(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("the layers update their decoding states themselves")

    def get_mask_sizes(self, *_: Any) -> Any:
        raise NotImplementedError("linear attention has no masks")

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.state = self.state.select(beam_idx)


class LightningCache(Cache):
    """Recurrent states of all layers `[B, H, K, V]`, and the position of each batch row.

    The layers of a model with `config.invariant` have a `DecodingState` each.
    A layer of softmax attention has `KeyValues` in place of a state, which grow with the context, but for
    "sliding_attention". With `window` they do not: layers of "full_attention" keep the first `sinks` tokens and the
    last `window` (StreamingLLM).

    transformers' `DynamicCache` does not work for a model of linear attention alone: it has no sequence length, which
    `generate` reads, and no positions, which LRPE-d needs.

    Args:
        num_layers: number of layers.
        window: last tokens that layers of full attention keep; None keeps all.
        sinks: first tokens that they keep besides.

    Raises:
        TypeError: `window` or `sinks` is not an integer.
        ValueError: `window` is less than 1 or `sinks` less than 0, or there are sinks without a window.

    Attributes:
        length: columns read so far, padding included.
        positions: `[B]` int64, position of the next token of each batch row; None before the first call. It is the
            number of tokens, padding not counted, unless `position_ids` said otherwise.
        padding: `[B, 2]` int64, how many columns were padding, and a checksum of which; None if there was none.

    Example:
        >>> import torch
        >>> from lightning_attention.models import LightningCache, LightningConfig, LightningForCausalLM
        >>> model = LightningForCausalLM(LightningConfig.from_size("demo", vocab_size=256)).eval()
        >>> cache = LightningCache(model.config.num_hidden_layers)
        >>> text = model.generate(torch.tensor([[72, 105]]), cache=cache, max_new_tokens=3, do_sample=False)
        >>> cache.get_seq_length()
        4
    """

    layers: list[LinearAttentionLayer | KeyValueLayer | DecodingLayer]

    def __init__(self, num_layers: int, *, window: int | None = None, sinks: int = 0):
        super().__init__(layers=[LinearAttentionLayer() for _ in range(num_layers)])
        check_window(window, sinks)
        self.window, self.sinks = window, sinks
        self.length = 0
        self.positions: Tensor | None = None
        self.padding: Tensor | None = None
        self._is_open = False

    @property
    def is_compileable(self) -> bool:
        """False, or transformers would compile the model in every generate() on a GPU."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """False, or transformers assumes that the cache has no length, and reads a whole conversation again."""
        return [False] * len(self.layers)

    def state(self, layer_idx: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """State of a layer `[B, H, K, V]`; zero before the first token.

        Raises:
            ValueError: the cache holds states of another shape.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, LinearAttentionLayer):
            raise _unlike(layer, layer_idx, "a state")
        if not layer.is_recurrent_states_initialized[0]:
            layer.lazy_initialization(recurrent_states=torch.empty(shape, dtype=dtype, device=device))
            layer.device = device
        layer.has_previous_state[0] = True
        state = layer.recurrent_states[0]
        assert state is not None
        if state.shape != shape:
            raise ValueError(f"the cache holds states of shape {tuple(state.shape)}, these inputs need {shape}")
        if not torch.compiler.is_compiling() and state.is_inference() and not torch.is_inference_mode_enabled():
            state = layer.recurrent_states[0] = state.clone()  # or PyTorch refuses to update it in place
        return state

    def decoding_state(
        self, layer_idx: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> DecodingState:
        """Decoding states of a layer, for B, H, K and V and inputs of a dtype; zero before the first token.

        Raises:
            ValueError: the cache holds another kind of state, or states of another shape.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, DecodingLayer):
            if not isinstance(layer, LinearAttentionLayer) or layer.is_recurrent_states_initialized[0]:
                raise _unlike(layer, layer_idx, "a decoding state, as in an invariant model")
            layer = self.layers[layer_idx] = DecodingLayer(DecodingState.zeros(*shape, dtype=dtype, device=device))
        found = tuple(layer.state.state.shape)
        if found != shape:
            raise ValueError(f"the cache holds states of shape {found}, these inputs need {shape}")
        if layer.state.state.is_inference() and not torch.is_inference_mode_enabled():
            layer.state = DecodingState(*(part.clone() for part in layer.state))  # or they cannot be updated in place
        return layer.state

    def key_values(
        self, layer_idx: int, attention: SoftmaxAttention, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> KeyValues:
        """Keys and values of a layer; none before the first token.

        Raises:
            ValueError: the cache holds a state, or keys and values of another shape.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, KeyValueLayer):
            if not isinstance(layer, LinearAttentionLayer) or layer.is_recurrent_states_initialized[0]:
                raise _unlike(layer, layer_idx, "keys and values")
            options: dict[str, Any] = {"window": self.window, "sinks": self.sinks}
            layer = KeyValueLayer(attention.make_key_values(batch_size, dtype, device, **options))
            self.layers[layer_idx] = layer
        kept, sizes = layer.key_values, (batch_size, attention.num_key_value_heads, attention.head_dim)
        if not torch.compiler.is_compiling() and kept.keys.is_inference() and not torch.is_inference_mode_enabled():
            kept.select(torch.arange(len(kept.lengths)))  # copies, which PyTorch lets be updated in place
        found = kept.keys.shape[0], *kept.keys.shape[2:]
        if found != sizes:
            raise ValueError(
                f"the cache holds keys of shape [B, H, D] = {list(found)}, these inputs need {list(sizes)}"
            )
        return kept

    def put(self, states: list[Tensor | KeyValues | DecodingState]) -> None:
        """Replace the states of all layers, in place and without gradients; others were updated."""
        for layer, state in zip(self.layers, states, strict=True):
            if not isinstance(layer, LinearAttentionLayer) or not isinstance(state, Tensor):
                continue
            if (kept := layer.recurrent_states[0]) is not state and kept is not None:
                kept.copy_(state.detach())

    def open(self) -> None:
        """Prepare for layers that read tokens; `advance` ends it.

        Raises:
            ValueError: it was not ended, since an error or a signal has interrupted the layers.
        """
        if self._is_open:
            raise ValueError(
                "an earlier call with this cache was interrupted, and only some layers have read its tokens: start "
                "with a new cache"
            )
        self._is_open = True

    def advance(self, columns: int, positions: Tensor, padding: Tensor | None) -> None:
        """Count columns that were read.

        Args:
            columns: their number T.
            positions: `[B]`, position of the next token.
            padding: `[B, T]` bool, true in the padding; None for no padding.
        """
        if padding is not None:
            checked = checksum(padding, self.length)
            self.padding = checked if self.padding is None else self.padding + checked
        self.length += columns
        self.positions, self._is_open = positions, False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reset(self) -> None:
        super().reset()
        self.length, self.positions, self.padding, self._is_open = 0, None, None, False

    def crop(self, *_: Any, **__: Any) -> None:
        """Not supported: a state cannot be rolled back.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a LightningCache cannot be cropped: its state holds all tokens fed so far")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.LongTensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self.layers:
            if isinstance(layer, KeyValueLayer):
                kept = layer.key_values
                kept.select(torch.arange(len(kept.lengths)).repeat_interleave(repeats))
            elif isinstance(layer, DecodingLayer):
                layer.state = layer.state.select(torch.arange(len(layer.state.count)).repeat_interleave(repeats))
            elif (state := layer.recurrent_states[0]) is not None:
                layer.recurrent_states[0] = state.repeat_interleave(repeats, dim=0)
        if self.positions is not None:
            self._select_rows(torch.arange(len(self.positions)).repeat_interleave(repeats))

    def _select_rows(self, indices: Tensor) -> None:
        for name in ("positions", "padding"):
            if (kept := getattr(self, name)) is not None:
                setattr(self, name, kept[indices.to(kept.device)])

    def nbytes(self) -> int:
        """Memory of the states, and of keys and values, in bytes."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, KeyValueLayer):
                total += layer.key_values.nbytes
            elif isinstance(layer, DecodingLayer):
                total += layer.state.nbytes
            elif (state := layer.recurrent_states[0]) is not None:
                total += state.nbytes
        return total


def _unlike(layer: object, layer_idx: int, needed: str) -> ValueError:
    kinds = {KeyValueLayer: "keys and values", DecodingLayer: "a decoding state, as of an invariant model,"}
    return ValueError(f"the cache holds {kinds.get(type(layer), 'a state')} of layer {layer_idx}, which has {needed}")


def checksum(padding: Tensor, first: int = 0) -> Tensor:
    """`[B, 2]` int64: how many columns of `[B, T]` from column `first` on are true, and a number that says which.

    Those of several calls add up to that of all columns.
    """
    x = torch.arange(first, first + padding.shape[1], device=padding.device) + 1
    x = x * -0x61C8864680B583EB  # an odd number whose multiples are spread over 64 bits; they wrap around
    x = (x ^ (x >> 29)) * -0x4B47D0C5A1A6E3D1
    return torch.stack([padding.sum(dim=1), (x * padding).sum(dim=1)], dim=1)


class CacheName:
    """Output whose cache is called `cache` in every version of transformers."""

    if CACHE == "past_key_values":

        @property
        def cache(self) -> Cache | None:
            return getattr(self, CACHE)


def resolve_cache(cache: object, past_key_values: object) -> LightningCache | None:
    """Return the cache given as `cache` or as `past_key_values`.

    Raises:
        ValueError: the two names have different values.
        TypeError: the value is not a `LightningCache`.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument: give one of them")
    given = past_key_values if cache is None else cache
    if given is not None and not isinstance(given, LightningCache):
        raise TypeError(f"cache must be a LightningCache(num_hidden_layers), got {type(given).__name__}")
    return given
