"""The memory of a conversation: one state a layer, the same size after any number of tokens."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer


class LightningCache(Cache):
    """The states of all layers, in transformers' own `LinearAttentionLayer`, plus how far each sequence has come.

    A class of its own because transformers' `DynamicCache` fails for a model of nothing but linear attention: it has
    no sequence length, which `generate` asks for, and no positions, which LRPE-d needs to go on.

    Args:
        num_layers: number of layers.

    Attributes:
        length: columns fed so far, padding included.
        positions: `[B]` int64, position of the next token of every sequence, padding not counted; None before the
            first call.
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

    def state(self, layer_idx: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The state of a layer `[B, H, K, V]`; zeros at first.

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
            raise ValueError(f"past_key_values holds states of shape {tuple(state.shape)}, these inputs need {shape}")
        return state

    def put(self, states: list[Tensor]) -> None:
        """The states of all layers after more tokens; without their gradients."""
        for layer, state in zip(self.layers, states, strict=True):
            if (kept := layer.recurrent_states[0]) is not state and kept is not None:
                kept.copy_(state.detach())

    def advance(self, columns: int, tokens: int | Tensor, batch_size: int, device: torch.device) -> None:
        """Count what was fed: columns, and of them the tokens of each sequence."""
        if self.positions is None:
            self.positions = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.length += columns
        self.positions = self.positions + tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reset(self) -> None:
        super().reset()
        self.length, self.positions = 0, None

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
