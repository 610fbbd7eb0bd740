"""Tiles of the chunked backend: the chunks that are worked on at once, their states, and the decay in a chunk.

Shapes: G chunks of a tile, H heads, K and V head sizes, C tokens in a chunk, D either head size. The bits of a matrix
product on a CPU depend on its shape, so each product has one shape: chunks begin with their sequence and have C tokens,
the last one is padded, and head sizes are padded to multiples of 16. Then neither the number of sequences nor their
place matters. Formulas: docs/algorithm.md.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .problem import state_dtype
from .states import cast
from .values import sequence_bounds

# A ring of 64 tokens would be larger than the state of a head of 64.
CHUNK_SIZE = 32
HEAD_MULTIPLE = 16

# Chunks of all heads in a tile, whose states, scores and inputs should fit the L2 cache of a CPU: so many, and so many
# elements of their states. Measured on one core of an AMD EPYC with AVX-512 in float32, in µs a token, forward and
# backward, for 8, 16, 32, 64 and 128 chunks:
# 8 heads of 64: 8.0, 6.4, 5.3, 5.2, 4.8 and 18.3, 15.2, 13.3, 12.1, 13.0;
# 8 heads of 128: 15.6, 13.9, 12.9, 14.6, 17.3 and 39.5, 36.8, 36.4, 36.1, 41.0.
CHUNKS_AT_ONCE, ELEMENTS_AT_ONCE = 64, 32 * 128 * 128
CHUNKS_AT_ONCE_ELSEWHERE = 4096


def chunks_at_once(num_chunks: int, num_heads: int, state_size: int, device_type: str) -> int:
    """Chunks of a tile, with a state of `state_size` elements for each head."""
    of_heads = min(CHUNKS_AT_ONCE, ELEMENTS_AT_ONCE // state_size)
    of_heads = of_heads if device_type == "cpu" else CHUNKS_AT_ONCE_ELSEWHERE
    return max(1, min(of_heads // num_heads, num_chunks))


def padded_size(head_size: int) -> int:
    return max(-(-head_size // HEAD_MULTIPLE), 1) * HEAD_MULTIPLE


def pad_heads(x: Tensor, num_dims: int = 1) -> Tensor:
    """Zeros after the last dimensions up to `padded_size`; `x` itself if there is nothing to add."""
    if all(size == padded_size(size) for size in x.shape[-num_dims:]):
        return x
    missing = [padded_size(size) - size for size in x.shape[: -num_dims - 1 : -1]]
    return F.pad(x, [n for size in missing for n in (0, size)])


class Chunk(NamedTuple):
    """Up to C tokens of a sequence; batch rows follow each other in the count of tokens."""

    sequence: int
    start: int
    size: int
    is_first: bool
    is_last: bool


def chunks_of(bounds: Iterable[tuple[int, int]]) -> list[Chunk]:
    """The chunks of sequences from their first to their last token."""
    return [
        Chunk(n, start, min(CHUNK_SIZE, end - start), start == begin, start + CHUNK_SIZE >= end)
        for n, (begin, end) in enumerate(bounds)
        for start in range(begin, end, CHUNK_SIZE)
    ]


class Tile:
    """Chunks that are worked on at once, in the order of their tokens."""

    def __init__(self, chunks: list[Chunk], length: int, num_heads: int, device: torch.device):
        self.chunks = chunks
        self.sizes = [chunk.size for chunk in chunks]
        self._incomplete = [(g, size) for g, size in enumerate(self.sizes) if size < CHUNK_SIZE]
        self.is_complete = not self._incomplete
        self.num_heads = num_heads
        begin, stop = chunks[0].start, chunks[-1].start + chunks[-1].size
        first, last = begin // length, (stop - 1) // length
        # Tokens of one batch row are a view in any layout; several batch rows are taken as a whole.
        origin = first * length if first < last else begin
        self._rows = slice(first, last + 1)
        self._tokens = slice(None) if first < last else slice(begin - first * length, stop - first * length)
        start, size = torch.tensor([[c.start for c in chunks], self.sizes], device=device)[..., None]
        position = torch.arange(CHUNK_SIZE, device=device)
        # Padding repeats the last token here, and is overwritten.
        token = start - origin + torch.minimum(position, size - 1)
        head = torch.arange(num_heads, device=device)
        self._index = (token[:, None] * num_heads + head[:, None]).flatten()

    def load(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`[G H, C, D]` of `[B, T, H, D]`, padded with zeros."""
        tokens = x[self._rows, self._tokens].flatten(0, 2).index_select(0, self._index)
        tile = tokens.unflatten(0, (-1, CHUNK_SIZE))
        for g, size in self._incomplete:
            tile[g * self.num_heads : (g + 1) * self.num_heads, size:] = 0
        return pad_heads(cast(tile, dtype))

    def store(self, out: Tensor, x: Tensor) -> None:
        """Write `[G H, C, D]` to the tokens of a contiguous `[B, T, H, D]`."""
        tokens = out.flatten(0, 1)
        x = x.unflatten(0, (-1, self.num_heads)).transpose(1, 2)[..., : out.shape[3]]
        begin, run = self.chunks[0].start, 0  # complete chunks that follow each other are written at once
        for g, chunk in enumerate(self.chunks):
            if chunk.size < CHUNK_SIZE:
                tokens[begin : chunk.start].unflatten(0, (-1, CHUNK_SIZE)).copy_(x[run:g])
                tokens[chunk.start : chunk.start + chunk.size] = x[g, : chunk.size]
                begin, run = chunk.start + chunk.size, g + 1
        stop = self.chunks[-1].start + self.chunks[-1].size
        tokens[begin:stop].unflatten(0, (-1, CHUNK_SIZE)).copy_(x[run:])


class Tiles:
    """The sequences of one call, in tiles. Empty sequences are in none of them."""

    def __init__(self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None):
        B, T, H, K = q.shape
        self.bounds = [n * T for n in range(B + 1)] if cu_seqlens is None else sequence_bounds(cu_seqlens, T)
        self.state_shape = len(self.bounds) - 1, H, K, v.shape[3]
        self.dtype, self.device = state_dtype(q.dtype), q.device
        chunks = chunks_of(pairwise(self.bounds))
        self.at_once = chunks_at_once(len(chunks), H, padded_size(K) * padded_size(v.shape[3]), q.device.type)
        parts = (chunks[first : first + self.at_once] for first in range(0, len(chunks), self.at_once))
        self.tiles = [Tile(part, T, H, q.device) for part in parts]

    @property
    def empty(self) -> list[int]:
        return [n for n, (start, end) in enumerate(pairwise(self.bounds)) if start == end]

    def new_states(self, initial: Tensor | None) -> Tensor:
        """Memory for states after the last tokens `[N, H, K, V]`. Empty sequences keep their initial states."""
        states = torch.empty(*self.state_shape, dtype=self.dtype, device=self.device)
        if empty := self.empty:
            states[empty] = 0 if initial is None else initial[empty]
        return states


class States(NamedTuple):
    """States of sequences in slots of `memory` `[S, H, K, V]`; sequence n is in slot n if there are no `slots`.

    A slot of -1 reads as zero, and is not written.
    """

    memory: Tensor
    slots: Sequence[int] | None = None

    def load(self, sequence: int) -> Tensor | None:
        """The state `[H, K, V]`; None is zero."""
        slot = sequence if self.slots is None else self.slots[sequence]
        return None if slot < 0 else self.memory[slot]

    def store(self, sequence: int, state: Tensor) -> None:
        slot = sequence if self.slots is None else self.slots[sequence]
        if slot >= 0:
            _, _, K, V = self.memory.shape
            self.memory[slot] = state[:, :K, :V]


class Decay:
    """Multiplication by powers of λ within a chunk, from one table of λ^0 .. λ^C: no exponent is ever above 0."""

    @classmethod
    def of(cls, q: Tensor, log_decay: Tensor | None, scale: float) -> "Decay":
        """The tables for inputs, made once for the same numbers: they take as long as a step of decoding."""
        values = (0.0,) * q.shape[2] if log_decay is None else tuple(log_decay.tolist())
        return _decay(values, scale, state_dtype(q.dtype), q.device)

    def __init__(self, log_decay: Tensor, scale: float):
        position = torch.arange(CHUNK_SIZE + 1, device=log_decay.device)
        self.num_heads = len(log_decay)
        self.powers = torch.exp(log_decay[:, None] * position)  # [H, C + 1]
        self.over = self.powers.T[..., None, None].unbind()  # λ^m `[H, 1, 1]`, by m
        self.falling = self.powers[:, :-1].flip(1).unsqueeze(2)
        scaled = self.powers if scale == 1 else self.powers * scale
        self.rising = scaled[:, 1:].unsqueeze(2)
        # Row i of `inside` is C elements of `later`, from C - i on: scale λ^i .. scale λ^0, and zeros.
        self.later = torch.cat([scaled.flip(1), scaled.new_zeros(self.num_heads, CHUNK_SIZE - 1)], dim=1)
        self.inside = torch.stack(
            [self.later[:, CHUNK_SIZE - i : 2 * CHUNK_SIZE - i] for i in range(CHUNK_SIZE)], dim=1
        )
        self._position = position[:-1]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """`scale λ^(i-j) q_i k_j` for `j <= i`, else 0."""
        scores = torch.bmm(q, k.mT)
        scores.unflatten(0, (-1, self.num_heads)).mul_(self.inside)
        return scores

    def read(self, x: Tensor) -> Tensor:
        """`scale λ^(i+1) x_i`: decay from the state before the chunk to token i."""
        return (x.unflatten(0, (-1, self.num_heads)) * self.rising).flatten(0, 1)

    def write(self, x: Tensor, tile: Tile) -> Tensor:
        """`λ^(m-1-j) x_j`: decay from token j to the state after the m tokens of the chunk."""
        weights = self.falling
        if not tile.is_complete:
            size = torch.tensor(tile.sizes, device=x.device)[:, None]
            weights = self.powers[:, (size - 1 - self._position).clamp_min(0)]
            weights = weights.transpose(0, 1).unsqueeze(3)
        return (x.unflatten(0, (-1, self.num_heads)) * weights).flatten(0, 1)


@lru_cache(64)
def _decay(log_decay: tuple[float, ...], scale: float, dtype: torch.dtype, device: torch.device) -> Decay:
    values = torch.tensor(log_decay, dtype=dtype, device=device)
    return Decay(values.clamp_min(torch.finfo(dtype).min), scale)  # -inf, which is λ = 0, times 0 would be NaN


class Carry:
    """States that go from chunk to chunk, over all tiles of a call, in the order of their tokens or in reverse.

    Args:
        enter: states before the sequences; None is zero.
        leave: where states after the sequences are written; None is nowhere.
        storage: dtype of states that only complete chunks are added to, and which are rounded after each of them; None
            if there is no such restriction.
    """

    def __init__(
        self,
        decay: Decay,
        enter: States | None,
        leave: States | None,
        *,
        reverse: bool = False,
        storage: torch.dtype | None = None,
    ):
        self._decay, self._enter, self._leave = decay, enter, leave
        self._reverse, self._storage = reverse, storage
        self._state: Tensor | None = None  # None is zero

    def __call__(self, tile: Tile, x: Tensor, y: Tensor) -> Tensor | None:
        """The states `[G H, K, V]` that enter the chunks, which add `xᵀ y`, decayed, to them; None if all are zero."""
        num_chunks, H = len(tile.chunks), self._decay.num_heads
        begins, ends = [c.is_first for c in tile.chunks], [c.is_last for c in tile.chunks]
        states = y.new_empty(num_chunks + 1, H, x.shape[2], y.shape[2])
        # A chunk adds to what enters it, in the memory of what enters the next one.
        enter, leave, order = states[:-1], states[1:], range(num_chunks)
        if self._reverse:
            begins, ends, enter, leave, order = ends, begins, leave, enter, reversed(order)
        if self._leave is not None or not all(ends):
            x = self._decay.read(x) if self._reverse else self._decay.write(x, tile)
            torch.bmm(x.mT, y, out=leave.flatten(0, 1))
        is_zero = self._enter is None and all(begins)
        for g in order:
            chunk, state = tile.chunks[g], self._state
            if begins[g]:
                state = None if self._enter is None else self._enter.load(chunk.sequence)
            if not is_zero and (state is None or begins[g] or state.data_ptr() != enter[g].data_ptr()):
                _put(enter[g], state)
            self._state = None
            if ends[g] and self._leave is None:
                continue
            if self._storage is not None and chunk.size < CHUNK_SIZE:
                after = enter[g]
            else:
                after = leave[g]
                if state is not None:
                    after.add_(enter[g] * self._decay.over[chunk.size])
                if self._storage is not None:
                    after.copy_(after.to(self._storage))
            self._state = after
            if ends[g] and self._leave is not None:
                self._leave.store(chunk.sequence, after)
        return None if is_zero else enter.flatten(0, 1)


def _put(out: Tensor, state: Tensor | None) -> None:
    """Write a state, which may have smaller heads, to `out`; None is zero."""
    if state is None or state.shape != out.shape:
        out.zero_()
    if state is not None:
        out[:, : state.shape[1], : state.shape[2]] = state
