"""Decoding states in PyTorch: a state at a chunk boundary and a ring of the tokens since, with the bits of a scan.

Shapes: A sequences, H heads, K and V head sizes, C tokens of a chunk and of a ring, R rows of a tile of queries.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .problem import AppendInputs, AttentionInputs, FoldInputs, state_dtype
from .states import cast, finite_log_decay
from .tiles import CHUNK_SIZE, States, Tiles, pad_heads, powers
from .values import sequence_bounds

# Rows of a tile of queries: products of other numbers of rows go to code with other bits.
ROW_MULTIPLE = {torch.float32: 4, torch.float64: 8}

# New tokens that are worth a tile of their own; from more on, whole chunks take as long.
FEW = 16

# Elements of states whose copies take as long as the calls for a run of slots.
RUN = 24_000

# `_scan` of chunked.py.
Scan: TypeAlias = Callable[
    [Tiles, AttentionInputs[Tensor], float, States | None, States | None, torch.dtype | None], Tensor
]


class _Tokens(NamedTuple):
    """New tokens of a sequence, from `start` on in `[B T]`, after the `count` ones in the ring of its slot."""

    slot: int
    start: int
    length: int
    count: int
    is_new: bool  # the state is zero, whatever the slot holds


def append(scan: Scan, x: AppendInputs[Tensor], scale: float, update: bool) -> list[Tensor]:
    """`append` of a backend, whose attention of whole sequences is given."""
    assert x.keys.shape[2] == x.values.shape[2] == CHUNK_SIZE
    sequences = _sequences(x)
    if update:
        for s in sequences:
            if s.is_new:
                x.state[s.slot], x.count[s.slot] = 0, 0
    sequences = [s for s in sequences if s.length]
    near = [s for s in sequences if s.length <= FEW and s.count + s.length <= CHUNK_SIZE]
    far = [s for s in sequences if s.length > FEW or s.count + s.length > CHUNK_SIZE]
    o = torch.zeros_like(x.v, memory_format=torch.contiguous_format)
    if near:
        _attend_in_chunk(x, near, o, scale, update)
    if far:
        _attend_across_chunks(scan, x, far, o, scale, update)
    return [o]


def fold(x: FoldInputs[Tensor]) -> list[Tensor]:
    """`S = λ^n S + Σ_j λ^(n-1-j) k_j v_jᵀ` by the n tokens of each ring, which is empty then."""
    slots = list(range(len(x.state))) if x.state_indices is None else x.state_indices.tolist()
    slots = [slot for slot in slots if slot >= 0]
    if slots:
        counts = x.count[slots, 0].tolist()
        table = powers(finite_log_decay(x.keys.transpose(1, 2), x.log_decay))
        for slot, count in zip(slots, counts, strict=True):
            _fold_(x.state[slot], x.keys[slot], x.values[slot], count, table)
        x.count[slots] = 0
    return []


def _fold_(state: Tensor, keys: Tensor, values: Tensor, count: int, table: Tensor) -> None:
    """Update a state `[H, K, V]` by the first `count` tokens of a ring, in the order of operations of `Carry`."""
    if not count:
        return
    k, v = (pad_heads(cast(y, table.dtype)) for y in (keys, values))
    weights = table[:, :count].flip(1).unsqueeze(2)
    if count < CHUNK_SIZE:  # what else is in the ring may be NaN
        k, v, weights = (torch.cat([y[:, :count], y.new_zeros(len(y), CHUNK_SIZE - count, y.shape[2])], 1) for y in (k, v, weights))
    added = torch.bmm((k * weights).mT, v)[:, : state.shape[1], : state.shape[2]]
    state.copy_(added.add_(state * table[:, count, None, None]))


def _sequences(x: AppendInputs[Tensor]) -> list[_Tokens]:
    """The tokens of sequences that have a slot."""
    B, T = x.q.shape[:2]
    if x.cu_seqlens is None:
        starts, lengths = range(0, B * T, max(T, 1)) if T else [0] * B, [T] * B if x.lengths is None else x.lengths.tolist()
    else:
        bounds = sequence_bounds(x.cu_seqlens, T)
        starts, lengths = bounds[:-1], [end - start for start, end in pairwise(bounds)]
    slots = range(len(lengths)) if x.state_indices is None else x.state_indices.tolist()
    counts = x.count[: len(lengths), 0] if x.state_indices is None else x.count[:, 0][x.state_indices.clamp_min(0)]
    is_new = [False] * len(lengths) if x.has_initial_state is None else (~x.has_initial_state).tolist()
    counts = [0 if new else count for new, count in zip(is_new, counts.tolist(), strict=True)]
    sequences = map(_Tokens, slots, starts, lengths, counts, is_new)
    return [s for s in sequences if s.slot >= 0]


def _attend_in_chunk(x: AppendInputs[Tensor], sequences: list[_Tokens], o: Tensor, scale: float, update: bool) -> None:
    """Tokens that end in the chunk of the ring: a few rows of the products of this chunk."""
    sequences = sorted(sequences)
    dtype, (A, H) = state_dtype(x.q.dtype), (len(sequences), x.q.shape[2])
    width = max(s.length for s in sequences)
    num_rows = -(-width // ROW_MULTIPLE[dtype]) * ROW_MULTIPLE[dtype]
    table = powers(finite_log_decay(x.q, x.log_decay))
    q = x.q.new_zeros(A, H, num_rows, x.q.shape[3], dtype=dtype)
    tokens = _TokensInRows(sequences, width, x.q)
    q[:, :, :width] = tokens.rows(x.q).transpose(1, 2)
    q = pad_heads(q)
    # λ^(i-j) of query i and key j, and λ^(i+1) of the state; one row is for all where each has one token.
    weights, rising = _weights(table, scale, [s.count for s in sequences], num_rows if width > 1 else 1)
    if update:
        _put_tokens_(x, sequences, tokens)
    outputs = []
    for rows, state, keys, values in _states(x, sequences, tokens, dtype, update):
        qs = q[rows]
        at = rows if len(weights) > 1 else slice(None)
        scores = torch.bmm(qs.flatten(0, 1), keys.mT)
        scores.view(-1, H, num_rows, CHUNK_SIZE).mul_(weights[at])
        outputs.append(torch.bmm(scores, values).baddbmm_((qs * rising[at]).flatten(0, 1), state))
    found = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    tokens.store(o, found.view(A, H, num_rows, -1)[:, :, :width, : o.shape[3]].transpose(1, 2))
    if update:
        for s in sequences:
            if s.count + s.length == CHUNK_SIZE:
                _fold_(x.state[s.slot], x.keys[s.slot], x.values[s.slot], CHUNK_SIZE, table)
        counts = [(s.count + s.length) % CHUNK_SIZE for s in sequences]
        if len(sequences) == 1:
            x.count[sequences[0].slot] = counts[0]
        else:
            x.count[[s.slot for s in sequences]] = torch.tensor(counts, dtype=x.count.dtype, device=x.count.device)[:, None]


def _weights(table: Tensor, scale: float, counts: list[int], num_rows: int) -> tuple[Tensor, Tensor]:
    """`scale λ^(i-j)` `[A, H, R, C]`, 0 for later keys, and `scale λ^(i+1)` `[A, H, R, 1]`; A is 1 if all counts agree."""
    counts = counts[:1] if len(set(counts)) == 1 else counts
    later = table.new_zeros(len(table), 2 * CHUNK_SIZE)
    later[:, : CHUNK_SIZE + 1] = table.flip(1)
    if scale != 1:
        later, table = later * scale, table * scale
    if num_rows == len(counts) == 1:  # views
        (count,) = counts
        inside = later[None, :, None, CHUNK_SIZE - count : 2 * CHUNK_SIZE - count]
        return inside, table[None, :, count + 1, None, None]
    position = torch.tensor(counts, device=table.device)[:, None] + torch.arange(num_rows, device=table.device)
    position = position.clamp_max(CHUNK_SIZE - 1)
    inside = later.unfold(1, CHUNK_SIZE, 1)[:, CHUNK_SIZE - position]
    return inside.transpose(0, 1), table[:, position + 1].transpose(0, 1).unsqueeze(3)


class _TokensInRows:
    """Tokens `[B, T, H, D]` as `[A, R, H, D]`, a row of up to R for each sequence."""

    def __init__(self, sequences: list[_Tokens], width: int, q: Tensor):
        B, T = q.shape[:2]
        self.is_whole = [s[1:3] for s in sequences] == [(row * T, T) for row in range(B)] and width == T
        self._device = q.device
        self._starts = [s.start for s in sequences]
        self._lengths = [s.length for s in sequences]
        self._width = width

    def rows(self, x: Tensor) -> Tensor:
        """`[A, R, H, D]`; a row goes on with its last token."""
        if self.is_whole:
            return x
        start, last = torch.tensor([self._starts, self._lengths], device=self._device)[..., None]
        index = start + torch.minimum(torch.arange(self._width, device=self._device), last - 1)
        return x.flatten(0, 1)[index]

    def pairs(self) -> tuple[list[int], list[int], list[int]]:
        """Row, column in it, and index in `[B T]`, of each token."""
        return tuple(
            zip(*((n, t, self._starts[n] + t) for n, length in enumerate(self._lengths) for t in range(length)), strict=True)
        )

    def store(self, o: Tensor, rows: Tensor) -> None:
        if self.is_whole:
            o.copy_(rows)
            return
        row, column, token = self.pairs()
        o.flatten(0, 1)[list(token)] = rows[list(row), list(column)].to(o.dtype)


def _put_tokens_(x: AppendInputs[Tensor], sequences: list[_Tokens], tokens: _TokensInRows) -> None:
    """Write new tokens to the rings. A ring that begins holds nothing else."""
    for s in sequences:
        if not s.count:
            x.keys[s.slot], x.values[s.slot] = 0, 0
    if len(sequences) == 1:
        s = sequences[0]
        for ring, y in ((x.keys, x.k), (x.values, x.v)):
            new = y[0] if len(y) == 1 else y.flatten(0, 1)
            ring[s.slot, :, s.count : s.count + s.length] = new[s.start : s.start + s.length].transpose(0, 1)
        return
    row, column, token = tokens.pairs()
    slots = [sequences[n].slot for n in row]
    positions = [sequences[n].count + t for n, t in zip(row, column, strict=True)]
    slot, position, source = torch.tensor([slots, positions, token], device=x.q.device)
    for ring, y in ((x.keys, x.k), (x.values, x.v)):
        ring[slot, :, position] = y.flatten(0, 1)[source]


def _states(x, sequences, tokens, dtype, update):
    """Rows of sequences, and their states and rings `[A H, ..]`, which hold the new tokens."""
    slots = [s.slot for s in sequences]
    if update:
        for rows in _runs(slots, x.state[0].numel()):
            first, last = slots[rows.start], slots[rows.stop - 1]
            is_run = last - first == rows.stop - 1 - rows.start
            at = slice(first, last + 1) if is_run else slots[rows]
            yield rows, *(_tile(y[at], dtype) for y in (x.state, x.keys, x.values))
        return
    row, column, token = (list(y) for y in tokens.pairs())
    count = torch.tensor([s.count for s in sequences], device=x.q.device)[:, None, None, None]
    is_old = torch.arange(CHUNK_SIZE, device=x.q.device)[:, None] < count
    positions = [sequences[n].count + t for n, t in zip(row, column, strict=True)]
    rings = []
    for ring, y in ((x.keys, x.k), (x.values, x.v)):
        ring = ring[slots].where(is_old, 0)
        ring[row, :, positions] = y.flatten(0, 1)[token]
        rings.append(_tile(ring, dtype))
    state = x.state[slots]
    for n, s in enumerate(sequences):
        if s.is_new:
            state[n] = 0
    yield slice(0, len(slots)), _tile(state, dtype), *rings


def _runs(slots: list[int], size: int) -> list[slice]:
    """Rows of runs of consecutive slots; one of all rows where copies of their states are faster."""
    starts = [n for n, slot in enumerate(slots) if not n or slot != slots[n - 1] + 1]
    if (len(starts) - 1) * RUN > len(slots) * size:
        return [slice(0, len(slots))]
    return [slice(first, last) for first, last in pairwise([*starts, len(slots)])]


def _tile(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[A H, M, D]` with padded heads, and of a state with padded rows; a view if possible."""
    return cast(x, dtype).flatten(0, 1)


def _attend_across_chunks(
    scan: Scan, x: AppendInputs[Tensor], sequences: list[_Tokens], o: Tensor, scale: float, update: bool
) -> None:
    """Any number of tokens. Those of the ring and the new ones are a sequence that begins at a chunk boundary."""
    bounds = list(accumulate((s.count + s.length for s in sequences), initial=0))
    inputs = [
        _sequences_from_boundaries(y.flatten(0, 1), sequences, ring)[None]
        for y, ring in ((x.q, None), (x.k, x.keys), (x.v, x.values))
    ]
    tiles = Tiles(inputs[0], inputs[2], torch.tensor(bounds))
    initial = States(x.state, [-1 if s.is_new else s.slot for s in sequences])
    final = States(x.state, [s.slot for s in sequences]) if update else None
    attention = AttentionInputs(*inputs, x.log_decay, None, None)
    found = scan(tiles, attention, scale, initial, final, x.state.dtype)[0]
    flat = o.flatten(0, 1)
    for s, end in zip(sequences, bounds[1:], strict=True):
        flat[s.start : s.start + s.length] = found[end - s.length : end]
        if update:
            rest = (s.count + s.length) % CHUNK_SIZE
            for ring, tokens in ((x.keys, inputs[1][0]), (x.values, inputs[2][0])):
                ring[s.slot, :, :rest] = tokens[end - rest : end].transpose(0, 1)
                ring[s.slot, :, rest:] = 0
            x.count[s.slot] = rest


def _sequences_from_boundaries(x: Tensor, sequences: list[_Tokens], rings: Tensor | None) -> Tensor:
    """Tokens `[L, H, D]` of the rings, or zeros, each before the new tokens of its sequence."""
    ends = [s.start + s.length for s in sequences]
    if not any(s.count for s in sequences) and ends[:-1] == [s.start for s in sequences[1:]]:
        return x[sequences[0].start : ends[-1]]
    parts = []
    for s, end in zip(sequences, ends, strict=True):
        if s.count:
            ring = x.new_zeros(s.count, *x.shape[1:]) if rings is None else rings[s.slot, :, : s.count].transpose(0, 1)
            parts.append(ring)
        parts.append(x[s.start : end])
    return torch.cat(parts)
