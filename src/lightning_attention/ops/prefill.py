"""Prefill for backends without a kernel for it: one forward call from each state position to the next.

And prefill in a pool of states, for pools that a backend cannot work in: on copies of the states.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .inputs import AttentionInputs, PrefillInputs, SlotPrefillInputs
from .problem import state_dtype


def prefill(forward: Callable[..., list[Tensor]], x: PrefillInputs[Tensor], scale: float) -> list[Tensor]:
    """`prefill` of the backend whose `forward` is given."""
    B, T = x.q.shape[:2]
    outputs, states, state, bounds = [], [], x.initial_state, x.cu_seqlens
    positions = x.state_positions.tolist()
    for start, stop in pairwise([0, *positions, T]):
        q, k, v = (y[:, start:stop] for y in x[:3])
        within = None if bounds is None else bounds.clamp(start, stop) - start
        o, state = forward(AttentionInputs(q, k, v, x.log_decay, state, within), scale, True)
        outputs.append(o)
        if len(states) < len(positions):
            states.append(state if bounds is None else state[_sequence_at(stop - 1, bounds)])
    assert state is not None
    stacked = torch.stack(states, dim=1) if states else state.new_empty(B, 0, *state.shape[1:])
    return [torch.cat(outputs, dim=1), state, stacked]


def prefill_copies(
    forward: Callable[..., list[Tensor]],
    prefill: Callable[..., list[Tensor]],
    x: SlotPrefillInputs[Tensor],
    scale: float,
) -> list[Tensor]:
    """`prefill_` by `forward` or `prefill`, from copies of the slots."""
    inputs = x.from_states(initial_states(x))
    if x.state_positions is None or x.saved_indices is None:
        o, final_state = forward(inputs, scale, True)
    else:
        o, final_state, states = prefill(PrefillInputs(*inputs, x.state_positions), scale)
        put_states(x.state, x.saved_indices, states)
    put_states(x.state, x.state_indices, final_state)
    return [o]


def initial_states(x: SlotPrefillInputs[Tensor]) -> Tensor:
    """States `[N, H, K, V]` of the sequences in the dtype of the arithmetic: copies, and zero where there is none."""
    states, exists = x.state, x.has_initial_state
    if (slots := x.state_indices) is not None:
        states = states[slots.clamp_min(0)]
        exists = slots >= 0 if exists is None else exists & (slots >= 0)
    states = states.to(state_dtype(x.q.dtype))
    return states if exists is None else states.where(exists[:, None, None, None], 0)


def put_states(pool: Tensor, slots: Tensor | None, states: Tensor) -> None:
    """Write states to slots of the pool, except to -1."""
    if slots is None:
        pool.copy_(states)
        return
    is_kept = slots >= 0
    pool[slots[is_kept]] = states[is_kept].to(pool.dtype)


def _sequence_at(token: int, cu_seqlens: Tensor) -> Tensor:
    """Index `[1]` of the sequence that holds a token."""
    index = torch.full((1,), token, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens, index, right=True) - 1
