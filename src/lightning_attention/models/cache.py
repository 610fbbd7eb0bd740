"""Recurrent-state cache for `generate()`: one state per layer, of constant size."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# transformers' name of the cache among arguments and outputs: `cache` since 5.24, `past_key_values` before.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


class LightningCache(Cache):
    """Recurrent states of all layers `[B, H, K, V]`, and the position of each batch row.

    transformers' `DynamicCache` does not work for a model of linear attention alone: it has no sequence length, which
    `generate` reads, and no positions, which LRPE-d needs.

    Args:
        num_layers: number of layers.

    Attributes:
        length: columns read so far, padding included.
        positions: `[B]` int64, position of the next token of each batch row, padding not counted; None before the
            first call.

    Example:
        >>> import torch
        >>> from lightning_attention.models import LightningCache, LightningConfig, LightningForCausalLM
        >>> model = LightningForCausalLM(LightningConfig.from_size("demo", vocab_size=256)).eval()
        >>> cache = LightningCache(model.config.num_hidden_layers)
        >>> text = model.generate(torch.tensor([[72, 105]]), cache=cache, max_new_tokens=3, do_sample=False)
        >>> cache.get_seq_length()
        4
    """

    layers: list[LinearAttentionLayer]

    def __init__(self, num_layers: int):
        super().__init__(layers=[LinearAttentionLayer() for _ in range(num_layers)])
        self.length = 0
        self.positions: Tensor | None = None

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

    def put(self, states: list[Tensor]) -> None:
        """Replace the states of all layers, in place and without gradients."""
        for layer, state in zip(self.layers, states, strict=True):
            if (kept := layer.recurrent_states[0]) is not state and kept is not None:
                kept.copy_(state.detach())

    def advance(self, columns: int, tokens: int | Tensor, batch_size: int, device: torch.device) -> None:
        """Count columns that were read, and the tokens among them in each batch row."""
        if self.positions is None:
            self.positions = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.length += columns
        self.positions = self.positions + tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reset(self) -> None:
        super().reset()
        self.length, self.positions = 0, None

    def crop(self, *_: Any, **__: Any) -> None:
        """Not supported: a state cannot be rolled back.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a LightningCache cannot be cropped: its state holds all tokens fed so far")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.positions is not None:
            self.positions = self.positions[beam_idx.to(self.positions.device)]

    def batch_select_indices(self, indices: torch.LongTensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self.layers:
            state = layer.recurrent_states[0]
            if state is not None:
                layer.recurrent_states[0] = state.repeat_interleave(repeats, dim=0)
        if self.positions is not None:
            self.positions = self.positions.repeat_interleave(repeats)

    def nbytes(self) -> int:
        """Memory of the states, in bytes."""
        return sum(state.nbytes for layer in self.layers if (state := layer.recurrent_states[0]) is not None)


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
