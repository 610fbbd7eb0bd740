"""Lightning Attention-2 in PyTorch: masked products inside a chunk, a decayed state between chunks. Any device.

On a CPU, outputs, states and gradients of a sequence do not depend, to the last bit, on the others in the batch, on its
place, or on how it was cut by `append`. The arithmetic is in float32 (float64 for float64 inputs). Shapes: tiles.py.
"""

from bisect import bisect_left
from itertools import pairwise

import torch
from torch import Tensor

from . import decoding, ring
from .decoding import commit, verify
from .inputs import AppendInputs, AttentionInputs, DecodingInputs, GradientInputs, PrefillInputs, SlotPrefillInputs
from .prefill import prefill as prefill_by
from .prefill import prefill_copies
from .problem import Problem, state_dtype
from .ring import fold
from .states import read_state_, write_state
from .tiles import CHUNK_SIZE, Carry, Decay, States, Tiles
from .values import sequence_bounds

__all__ = [
    "CHUNK_SIZE",
    "append",
    "backward",
    "chunk_size",
    "commit",
    "fold",
    "forward",
    "is_slow",
    "prefill",
    "prefill_",
    "read_state_",
    "step",
    "supports_cuda_graphs",
    "unsupported_reasons",
    "verify",
    "write_state",
]

supports_cuda_graphs = False


def unsupported_reasons(problem: Problem) -> list[str]:
    return []


def is_slow(problem: Problem) -> bool:
    return False


def chunk_size(problem: Problem) -> int:
    return CHUNK_SIZE


def forward(x: AttentionInputs[Tensor], scale: float, output_final_state: bool) -> list[Tensor]:
    tiles = Tiles(x.q, x.v, x.cu_seqlens)
    initial = None if x.initial_state is None else States(x.initial_state)
    if not output_final_state:
        return [_scan(tiles, x, scale, initial, None)]
    final_state = tiles.new_states(x.initial_state)
    return [_scan(tiles, x, scale, initial, States(final_state)), final_state]


def prefill(x: PrefillInputs[Tensor], scale: float) -> list[Tensor]:
    return prefill_by(forward, x, scale)


def prefill_(x: SlotPrefillInputs[Tensor], scale: float) -> list[Tensor]:
    """The states are read and written in the pool, where they are also found at positions."""
    bounds = None if x.cu_seqlens is None else sequence_bounds(x.cu_seqlens, x.q.shape[1])
    num_sequences, T = len(x.q) if bounds is None else len(bounds) - 1, x.q.shape[1]
    slots = list(range(num_sequences)) if x.state_indices is None else x.state_indices.tolist()
    exists = [True] * num_sequences if x.has_initial_state is None else x.has_initial_state.tolist()
    positions = [] if x.state_positions is None else x.state_positions.tolist()
    if x.state.dtype != state_dtype(x.q.dtype) or (positions and min(slots, default=0) < 0):
        return prefill_copies(forward, prefill, x, scale)
    begins = [0] * num_sequences if bounds is None else bounds[:-1]
    ends = [T] * num_sequences if bounds is None else bounds[1:]
    for slot, is_there, begin, end in zip(slots, exists, begins, ends, strict=True):
        if begin == end and not is_there and slot >= 0:
            x.state[slot] = 0
    outputs = []
    for m, (start, stop) in enumerate(pairwise([0, *positions, T])):
        q, k, v = (y[:, start:stop] for y in (x.q, x.k, x.v))
        cu_seqlens = None if x.cu_seqlens is None else x.cu_seqlens.clamp(start, stop) - start
        of_sequences = zip(slots, exists, begins, strict=True)
        initial = [slot if is_there or begin < start else -1 for slot, is_there, begin in of_sequences]
        part = AttentionInputs(q, k, v, x.log_decay, None, None)
        outputs.append(_scan(Tiles(q, v, cu_seqlens), part, scale, States(x.state, initial), States(x.state, slots)))
        if x.saved_indices is not None and m < len(positions):
            for row, saved in enumerate(x.saved_indices[:, m].tolist()):
                if saved >= 0:
                    x.state[saved] = x.state[slots[row if bounds is None else bisect_left(bounds, stop) - 1]]
    return [torch.cat(outputs, dim=1) if positions else outputs[0]]


def backward(x: GradientInputs[Tensor], scale: float) -> list[Tensor]:
    tiles = Tiles(x.q, x.v, x.cu_seqlens)
    decay = Decay.of(x.q, x.log_decay, scale)
    gradients = [torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x.q, x.k, x.v)]
    initial, d_final = (None if y is None else States(y) for y in (x.initial_state, x.d_final_state))
    d_initial_state = None if initial is None else tiles.new_states(x.d_final_state)
    carry = Carry(decay, initial, None)
    states = [carry(tile, *(tile.load(y, tiles.dtype) for y in (x.k, x.v))) for tile in tiles.tiles]
    carry = Carry(decay, d_final, None if d_initial_state is None else States(d_initial_state), reverse=True)
    for tile, S in zip(reversed(tiles.tiles), reversed(states), strict=True):
        q, k, v, do = (tile.load(y, tiles.dtype) for y in (x.q, x.k, x.v, x.do))
        scores, d_scores = decay.scores(q, k), decay.scores(do, v)
        dq, dk, dv = torch.bmm(d_scores, k), torch.bmm(d_scores.mT, q), torch.bmm(scores.mT, do)
        if S is not None:
            dq.baddbmm_(decay.read(do), S.mT)
        if (R := carry(tile, q, do)) is not None:  # gradients of the states after the chunks
            dk.baddbmm_(decay.write(v, tile), R.mT)
            dv.baddbmm_(decay.write(k, tile), R)
        for out, gradient in zip(gradients, (dq, dk, dv), strict=True):
            tile.store(out, gradient)
    return gradients if d_initial_state is None else [*gradients, d_initial_state]


def step(x: DecodingInputs[Tensor], scale: float) -> list[Tensor]:
    return decoding.step(_attend_, x, scale)


def append(x: AppendInputs[Tensor], scale: float, update: bool) -> list[Tensor]:
    return ring.append(_scan, x, scale, update)


def _attend_(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float) -> Tensor:
    """The output of tokens from a state `[B, H, K, V]`, which is updated in place."""
    states = States(state)
    return _scan(Tiles(q, v, None), AttentionInputs(q, k, v, log_decay, None, None), scale, states, states)


def _scan(
    tiles: Tiles,
    x: AttentionInputs[Tensor],
    scale: float,
    initial: States | None,
    final: States | None,
    storage: torch.dtype | None = None,
) -> Tensor:
    """The output; states after the last token are written to `final`, which may be `initial`.

    With `storage`, its dtype, they are states after the last complete chunk, rounded after each.
    """
    decay = Decay.of(x.q, x.log_decay, scale)
    carry = Carry(decay, initial, final, storage=storage)
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    for tile in tiles.tiles:
        q, k, v = (tile.load(y, tiles.dtype) for y in (x.q, x.k, x.v))
        S = carry(tile, k, v)
        oc = torch.bmm(decay.scores(q, k), v)
        tile.store(o, oc if S is None else oc.baddbmm_(decay.read(q), S))
    return o
