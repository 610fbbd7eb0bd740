"""How the tokens of a batch lie in the rows that the layers work on.

The layers know two forms: a full rectangle `[B, T]`, or packed sequences `[1, tokens]` with `cu_seqlens`. A padded
batch is packed without its padding, so padding costs nothing and touches no state, wherever in a row it stands.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """`pack` brings `[B, T, ...]` into the form of the layers, `unpack` back.

    Attributes:
        batch_shape: `(B, T)`.
        positions: `[B or 1, T]`, or `[1, tokens]` when packed.
        cu_seqlens: `[N + 1]` when packed.
        tokens: indices into the flattened batch, where packing leaves padding out.
    """

    batch_shape: tuple[int, int]
    positions: Tensor
    cu_seqlens: Tensor | None = None
    tokens: Tensor | None = None

    @classmethod
    def of_padded(cls, mask: Tensor, positions: Tensor) -> "Layout":
        """One sequence a row: the tokens where `mask` `[B, T]` is true."""
        tokens = mask.flatten().nonzero()[:, 0]
        cu_seqlens = F.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0))
        return cls(_shape(mask), positions.expand_as(mask).flatten()[tokens][None], cu_seqlens, tokens)

    @classmethod
    def of_documents(cls, positions: Tensor) -> "Layout":
        """A sequence starts with every row of `positions` `[B, T]`, and where they do not go on by one."""
        starts = F.pad(positions.diff(dim=1) != 1, (1, 0), value=True).flatten().nonzero()[:, 0]
        cu_seqlens = F.pad(starts, (0, 1), value=positions.numel())
        return cls(_shape(positions), positions.flatten()[None], cu_seqlens)

    @classmethod
    def of_packed(cls, cu_seqlens: Tensor, length: int) -> "Layout":
        """The sequences of one row of `length` tokens."""
        token = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        starts = cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1]
        return cls((1, length), (token - starts)[None], cu_seqlens)

    def pack(self, x: Tensor) -> Tensor:
        if self.cu_seqlens is None:
            return x
        x = x.flatten(0, 1)
        return (x if self.tokens is None else x[self.tokens])[None]

    def unpack(self, x: Tensor) -> Tensor:
        """Zero in the padding."""
        if self.cu_seqlens is None:
            return x
        x = x[0]
        if self.tokens is not None:
            batch_size, length = self.batch_shape
            x = x.new_zeros(batch_size * length, *x.shape[1:]).index_copy(0, self.tokens, x)
        return x.unflatten(0, self.batch_shape)

    def before_sequences(self, states: Tensor) -> Tensor:
        """From the states before every row `[B, ...]` to those before every sequence `[N, ...]`, most of them zero."""
        if self.cu_seqlens is None:
            return states
        first = self._first_of_rows.to(states.device)
        return states.new_zeros(len(self.cu_seqlens) - 1, *states.shape[1:]).index_copy(0, first, states)

    def after_rows(self, states: Tensor) -> Tensor:
        """From the states after every sequence `[N, ...]` to those after every row `[B, ...]`."""
        if self.cu_seqlens is None:
            return states
        return states[self._first_of_rows.roll(-1) - 1]  # -1, the last one, for the last row

    @cached_property
    def _first_of_rows(self) -> Tensor:
        """`[B]`, which sequence every row begins with."""
        assert self.cu_seqlens is not None
        batch_size, length = self.batch_shape
        starts = torch.arange(batch_size, device=self.cu_seqlens.device) * length
        return torch.searchsorted(self.cu_seqlens, starts)


def _shape(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1]
