"""Prefill for backends without a kernel for it: one forward call from each state position to the next."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def prefill(
    forward: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    state_positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`prefill` of the backend whose `forward` is given."""
    B, T = q.shape[:2]
    outputs, states, state = [], [], initial_state
    for start, stop in pairwise([0, *state_positions.tolist(), T]):
        inputs = (x[:, start:stop] for x in (q, k, v))
        bounds = None if cu_seqlens is None else cu_seqlens.clamp(start, stop) - start
        o, state = forward(*inputs, log_decay, state, bounds, scale, True)
        outputs.append(o)
        states.append(state if cu_seqlens is None else state[_sequence_at(stop - 1, cu_seqlens)])
    final_state, states = state, states[:-1]
    assert final_state is not None
    stacked = torch.stack(states, dim=1) if states else final_state.new_empty(B, 0, *final_state.shape[1:])
    return torch.cat(outputs, dim=1), final_state, stacked


def _sequence_at(token: int, cu_seqlens: Tensor) -> Tensor:
    """Index `[1]` of the sequence that holds a token."""
    index = torch.full((1,), token, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens, index, right=True) - 1
