"""Prefill for backends without a kernel for it: one forward call from each state position to the next."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .problem import AttentionInputs, PrefillInputs


def prefill(forward: Callable[..., list[Tensor]], x: PrefillInputs[Tensor], scale: float) -> list[Tensor]:
    """`prefill` of the backend whose `forward` is given."""
    B, T = x.q.shape[:2]
    outputs, states, state, bounds = [], [], x.initial_state, x.cu_seqlens
    for start, stop in pairwise([0, *x.state_positions.tolist(), T]):
        q, k, v = (y[:, start:stop] for y in x[:3])
        within = None if bounds is None else bounds.clamp(start, stop) - start
        o, state = forward(AttentionInputs(q, k, v, x.log_decay, state, within), scale, True)
        outputs.append(o)
        states.append(state if bounds is None else state[_sequence_at(stop - 1, bounds)])
    final_state, states = state, states[:-1]
    assert final_state is not None
    stacked = torch.stack(states, dim=1) if states else final_state.new_empty(B, 0, *final_state.shape[1:])
    return [torch.cat(outputs, dim=1), final_state, stacked]


def _sequence_at(token: int, cu_seqlens: Tensor) -> Tensor:
    """Index `[1]` of the sequence that holds a token."""
    index = torch.full((1,), token, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens, index, right=True) - 1
