"""States on the way, for backends without a kernel for them: piece after piece, from one position to the next."""

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
    """Of the backend whose `forward` it is: the output, the final state, and `[B, M, H, K, V]`."""
    B, T = q.shape[:2]
    outputs, saved, state = [], [], initial_state
    for start, stop in pairwise([0, *state_positions.tolist(), T]):
        piece = (x[:, start:stop] for x in (q, k, v))
        bounds = None if cu_seqlens is None else cu_seqlens.clamp(start, stop) - start
        o, state = forward(*piece, log_decay, state, bounds, scale, True)
        outputs.append(o)
        saved.append(state if cu_seqlens is None else state[_sequence_of(stop - 1, cu_seqlens)])
    final_state, saved = state, saved[:-1]
    assert final_state is not None
    states = torch.stack(saved, dim=1) if saved else final_state.new_empty(B, 0, *final_state.shape[1:])
    return torch.cat(outputs, dim=1), final_state, states


def _sequence_of(token: int, cu_seqlens: Tensor) -> Tensor:
    """`[1]`: the sequence that holds a token."""
    index = torch.full((1,), token, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens, index, right=True) - 1
