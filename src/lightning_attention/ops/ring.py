"""Decoding states in PyTorch: a state at a chunk boundary and a ring of the tokens since, with the bits of a scan.

Shapes: A sequences, H heads, K and V head sizes, C tokens of a chunk and of a ring, R rows of a tile of queries.
"""

import math
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .inputs import AppendInputs, AttentionInputs, FoldInputs
from .states import cast
from .tiles import CHUNK_SIZE, Decay, States, Tiles, pad_heads
from .values import sequence_bounds

# Rows of a tile of queries: products of other numbers of rows go to code with other bits.
ROW_MULTIPLE = {torch.float32: 4, torch.float64: 8}

# New tokens that are a tile of their own, half a chunk at most; more are worked on as whole chunks.
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


class _Rings(NamedTuple):
    """States and rings `[A H, ..]` of some of the sequences."""

    sequences: slice
    state: Tensor
    keys: Tensor
    values: Tensor


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
    decay = Decay.of(x.q, x.log_decay, scale)
    near.sort()
    if near and len(near) == len(sequences) and [s[1:3] for s in near] == _whole_rows(x.q):
        found = _attend_in_chunk(x, near, x.q, x.k, x.v, decay, update)
        return [cast(found, x.v.dtype).contiguous()]
    o = torch.zeros_like(x.v, memory_format=torch.contiguous_format)
    if near:
        index = _index(near, x.q.device)
        q, k, v = (y.flatten(0, 1)[index] for y in (x.q, x.k, x.v))
        found = _attend_in_chunk(x, near, q, k, v, decay, update)
        is_token = torch.arange(index.shape[1], device=index.device) < torch.tensor(
            [[s.length] for s in near], device=index.device
        )
        o.flatten(0, 1)[index[is_token]] = found[is_token].to(o.dtype)
    if far := [s for s in sequences if s.length > FEW or s.count + s.length > CHUNK_SIZE]:
        _attend_across_chunks(scan, x, far, o, scale, update)
    return [o]


def fold(x: FoldInputs[Tensor]) -> list[Tensor]:
    """`S = λ^n S + Σ_j λ^(n-1-j) k_j v_jᵀ` by the n tokens of each ring, which is empty then."""
    slots = list(range(len(x.state))) if x.state_indices is None else x.state_indices.tolist()
    slots = [slot for slot in slots if slot >= 0]
    decay = Decay.of(x.keys.transpose(1, 2), x.log_decay, 1.0)
    for slot, count in zip(slots, x.count[slots, 0].tolist(), strict=True):
        _fold_(x.state[slot], x.keys[slot], x.values[slot], count, decay)
        x.count[slot] = 0
    return []


def _fold_(state: Tensor, keys: Tensor, values: Tensor, count: int, decay: Decay) -> None:
    """Update a state `[H, K, V]` by the first `count` tokens of a ring, in the order of operations of `Carry`."""
    if not count:
        return
    k, v, weights = keys, values, decay.falling[:, CHUNK_SIZE - count :]
    if count < CHUNK_SIZE:  # what else is in the ring may be NaN
        k, v, weights = (_with_zeros(y[:, :count]) for y in (k, v, weights))
    k, v = (pad_heads(cast(y, decay.powers.dtype)) for y in (k, v))
    added = torch.bmm((k * weights).mT, v)[:, : state.shape[1], : state.shape[2]]
    state.copy_(added.add_(state * decay.over[count]))


def _with_zeros(x: Tensor) -> Tensor:
    """`[H, C, D]` of fewer tokens."""
    return torch.cat([x, x.new_zeros(len(x), CHUNK_SIZE - x.shape[1], x.shape[2])], dim=1)


def _sequences(x: AppendInputs[Tensor]) -> list[_Tokens]:
    """The new tokens of sequences that have a slot."""
    B, T = x.q.shape[:2]
    if x.cu_seqlens is None:
        starts, lengths = [row * T for row in range(B)], [T] * B if x.lengths is None else x.lengths.tolist()
    else:
        bounds = sequence_bounds(x.cu_seqlens, T)
        starts, lengths = bounds[:-1], [end - start for start, end in pairwise(bounds)]
    slots = range(len(lengths)) if x.state_indices is None else x.state_indices.tolist()
    counts = (x.count[: len(lengths)] if x.state_indices is None else x.count[slots])[:, 0].tolist()
    if x.has_initial_state is None:
        is_new = [False] * len(lengths)
    else:
        is_new = [not has_state for has_state in x.has_initial_state.tolist()]
        counts = [0 if new else count for new, count in zip(is_new, counts, strict=True)]
    return [s for s in map(_Tokens, slots, starts, lengths, counts, is_new) if s.slot >= 0]


def _whole_rows(q: Tensor) -> list[tuple[int, int]]:
    """Starts and lengths of sequences that are the batch rows, all in order."""
    B, T = q.shape[:2]
    return [(row * T, T) for row in range(B)]


def _index(sequences: list[_Tokens], device: torch.device) -> Tensor:
    """Tokens in `[B T]` as `[A, R]`; a row goes on with its last token."""
    start, length = torch.tensor([s[1:3] for s in sequences], device=device).T[..., None]
    position = torch.arange(max(s.length for s in sequences), device=device)
    return start + torch.minimum(position, length - 1)


def _attend_in_chunk(
    x: AppendInputs[Tensor], sequences: list[_Tokens], q: Tensor, k: Tensor, v: Tensor, decay: Decay, update: bool
) -> Tensor:
    """Output `[A, T, H, V]` of tokens `[A, T, H, D]` in the chunk of the ring: a few rows of the chunk's products."""
    A, T, H, _ = q.shape
    dtype = decay.powers.dtype
    num_rows = -(-T // ROW_MULTIPLE[dtype]) * ROW_MULTIPLE[dtype]
    q = cast(q, dtype).transpose(1, 2)
    if T == 1:
        q = q.expand(-1, -1, num_rows, -1).contiguous()
    else:
        q = torch.cat([q, q.new_zeros(A, H, num_rows - T, q.shape[3])], dim=2)
    q = pad_heads(q)
    inside, rising = _weights(decay, [s.count for s in sequences], num_rows if T > 1 else 1)
    read = q * rising
    outputs = []
    for rings in _updated(x, sequences, k, v, dtype) if update else _copied(x, sequences, k, v, dtype):
        at = rings.sequences
        scores = torch.bmm(q[at].flatten(0, 1), rings.keys.mT)
        scores.view(-1, H, num_rows, CHUNK_SIZE).mul_(inside[at] if len(inside) > 1 else inside)
        outputs.append(torch.bmm(scores, rings.values).baddbmm_(read[at].flatten(0, 1), rings.state))
    if update:
        for s in sequences:
            count = s.count + s.length
            if count == CHUNK_SIZE:
                _fold_(x.state[s.slot], x.keys[s.slot], x.values[s.slot], CHUNK_SIZE, decay)
        _set_counts(x.count, sequences)
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return o.view(A, H, num_rows, -1)[:, :, :T, : v.shape[3]].transpose(1, 2)


def _set_counts(count: Tensor, sequences: list[_Tokens]) -> None:
    counts = [(s.count + s.length) % CHUNK_SIZE for s in sequences]
    slots = [s.slot for s in sequences]
    if len(set(counts)) == 1 and slots == list(range(slots[0], slots[0] + len(slots))):
        count[slots[0] : slots[-1] + 1] = counts[0]
    else:
        count[slots] = torch.tensor(counts, dtype=count.dtype, device=count.device)[:, None]


def _weights(decay: Decay, counts: list[int], num_rows: int) -> tuple[Tensor, Tensor]:
    """`scale λ^(i-j)` `[A, H, R, C]` and `scale λ^(i+1)` `[A, H, R, 1]`, at i and key j; A is 1 if counts agree."""
    counts = counts[:1] if len(set(counts)) == 1 else counts
    if num_rows == len(counts) == 1:
        at = slice(counts[0], counts[0] + 1)
        return decay.inside[None, :, at], decay.rising[None, :, at]
    device = decay.inside.device
    position = torch.tensor(counts, device=device)[:, None] + torch.arange(num_rows, device=device)
    position = position.clamp_max_(CHUNK_SIZE - 1)
    return decay.inside[:, position].transpose(0, 1), decay.rising[:, position].transpose(0, 1)


def _updated(
    x: AppendInputs[Tensor], sequences: list[_Tokens], k: Tensor, v: Tensor, dtype: torch.dtype
) -> Iterator[_Rings]:
    """Put new tokens `[A, T, H, D]` into the rings, and yield runs of slots."""
    for s in sequences:
        if not s.count:  # what the ring held may be NaN
            x.keys[s.slot], x.values[s.slot] = 0, 0
    _put_tokens(x.keys, x.values, k, v, sequences, [s.slot for s in sequences])
    slots = [s.slot for s in sequences]
    for at in _runs(slots, math.prod(x.state.shape[1:])):
        first, last = slots[at.start], slots[at.stop - 1]
        is_run = last - first == at.stop - 1 - at.start
        of = slice(first, last + 1) if is_run else slots[at]
        yield _Rings(at, _tile(x.state[of], dtype, 2), _tile(x.keys[of], dtype), _tile(x.values[of], dtype))


def _copied(
    x: AppendInputs[Tensor], sequences: list[_Tokens], k: Tensor, v: Tensor, dtype: torch.dtype
) -> Iterator[_Rings]:
    """Yield copies of the rings, with new tokens `[A, T, H, D]`."""
    slots = [s.slot for s in sequences]
    count = torch.tensor([s.count for s in sequences], device=k.device)[:, None, None, None]
    is_old = torch.arange(CHUNK_SIZE, device=k.device)[:, None] < count
    keys, values = (ring[slots].where(is_old, 0) for ring in (x.keys, x.values))
    _put_tokens(keys, values, k, v, sequences, list(range(len(slots))))
    state = x.state[slots]
    for n, s in enumerate(sequences):
        if s.is_new:
            state[n] = 0
    yield _Rings(slice(None), _tile(state, dtype, 2), _tile(keys, dtype), _tile(values, dtype))


def _put_tokens(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, sequences: list[_Tokens], slots: list[int]) -> None:
    """Write new tokens `[A, T, H, D]` to rings `[N, H, C, D]`."""
    if len(sequences) == 1:
        (s,), (slot,) = sequences, slots
        keys[slot, :, s.count : s.count + s.length] = k[0].transpose(0, 1)
        values[slot, :, s.count : s.count + s.length] = v[0].transpose(0, 1)
        return
    if len({s[2:4] for s in sequences}) == 1 and slots == list(range(slots[0], slots[0] + len(slots))):
        at, (_, _, length, count, _) = slice(slots[0], slots[-1] + 1), sequences[0]
        keys[at, :, count : count + length] = k.transpose(1, 2)
        values[at, :, count : count + length] = v.transpose(1, 2)
        return
    pairs = [(n, t, slots[n], s.count + t) for n, s in enumerate(sequences) for t in range(s.length)]
    row, column, slot, position = torch.tensor(pairs, device=k.device).T
    if keys.is_contiguous() and values.is_contiguous():  # `index_copy_` is many times as fast
        head = torch.arange(keys.shape[1], device=k.device)
        at = ((slot[:, None] * len(head) + head) * CHUNK_SIZE + position[:, None]).flatten()
        keys.flatten(0, 2).index_copy_(0, at, k[row, column].flatten(0, 1))
        values.flatten(0, 2).index_copy_(0, at, v[row, column].flatten(0, 1))
    else:
        keys[slot, :, position], values[slot, :, position] = k[row, column], v[row, column]


def _runs(slots: list[int], size: int) -> list[slice]:
    """Sequences by runs of consecutive slots; one of all where copies of their states are faster."""
    starts = [n for n, slot in enumerate(slots) if not n or slot != slots[n - 1] + 1]
    if (len(starts) - 1) * RUN > len(slots) * size:
        return [slice(0, len(slots))]
    return [slice(first, last) for first, last in pairwise([*starts, len(slots)])]


def _tile(x: Tensor, dtype: torch.dtype, num_padded: int = 1) -> Tensor:
    """`[A H, M, D]`, with heads padded in the last dimensions; a view if possible."""
    return pad_heads(cast(x, dtype).flatten(0, 1), num_padded)


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
    q, k, v = inputs
    attention = AttentionInputs(q, k, v, x.log_decay, None, None)
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
