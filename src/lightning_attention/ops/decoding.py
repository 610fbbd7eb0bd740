"""Decoding in PyTorch, on any device: one or a few tokens of every sequence, and the drafts of speculative decoding.

Shapes: B batch rows, T tokens, H heads, K and V head sizes. The arithmetic is in the dtype of `state_dtype`.
"""

from bisect import bisect_left
from collections.abc import Callable
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from .inputs import DecodingInputs
from .problem import state_dtype
from .states import cast, finite_log_decay

# Bytes of states that leave the caches of a CPU between two of the passes that a step makes over them, and of those
# that are worked on at once then. Measured on a CPU core: 64 states of 2 MiB take 32 ms at once, 13 ms two at a time;
# 64 of 256 KiB take 1.1 ms at once and 1.4 to 1.7 in parts.
UNCACHED, CACHED = 32 << 20, 4 << 20

# Elements of states whose copies, there and back, take as long as the calls for a run of slots.
RUN = 24_000

# The output of several tokens from q, k, v, log_decay, state `[B, H, K, V]` and scale; updates the state in place.
Attend_: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, float], Tensor]


def step(attend_: Attend_, x: DecodingInputs[Tensor], scale: float) -> list[Tensor]:
    """`step` of a backend, whose attention of several tokens is given."""
    if x.saved_indices is not None:
        return [_step_to_slots(x, x.saved_indices, scale)]
    is_plain = x.state_indices is None and x.state.dtype == state_dtype(x.q.dtype)
    if x.q.dim() == 3:
        if is_plain:
            return [_step_token_(x.q, x.k, x.v, x.log_decay, x.state, scale)]
        (o,) = step(attend_, x._replace(q=x.q.unsqueeze(1), k=x.k.unsqueeze(1), v=x.v.unsqueeze(1)), scale)
        return [o.squeeze(1)]
    if is_plain:
        return [_step_(attend_, x.q, x.k, x.v, x.log_decay, x.state, scale)]
    o = torch.zeros_like(x.v, memory_format=torch.contiguous_format)
    for rows, run in (runs := _runs(x)):
        o[rows] = _step_(attend_, x.q[rows], x.k[rows], x.v[rows], x.log_decay, x.state[run], scale)
    if not runs:
        rows, slots, states = _taken(x)
        o[rows] = _step_(attend_, x.q[rows], x.k[rows], x.v[rows], x.log_decay, states, scale)
        x.state[slots] = states.to(x.state.dtype)
    return [o]


def _step_token_(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float) -> Tensor:
    """The output `[B, H, V]`; `state` `[B, H, K, V]` is updated in place."""
    if state.numel() * state.itemsize > UNCACHED and state.device.type == "cpu" and len(state) > 1:
        at_once = max(1, CACHED // (state[0].numel() * state.itemsize))
        parts = zip(*(x.split(at_once) for x in (q, k, v, state)), strict=True)
        return torch.cat([_step_token_(q, k, v, log_decay, state, scale) for q, k, v, state in parts])
    dtype = v.dtype
    if dtype != state.dtype:
        q, k, v = (x.to(state.dtype) for x in (q, k, v))
    _advanced_(state, k, v, log_decay)
    H, K, V = state.shape[1:]
    if state.is_contiguous():
        o = torch.bmm(q.reshape(len(q) * H, 1, K), state.flatten(0, 1)).view(len(q), H, V)
    else:  # by head, without a copy of the states
        o = torch.cat([torch.bmm(q[:, h].unsqueeze(1), state[:, h]) for h in range(H)], dim=1)
    return cast(o if scale == 1 else o.mul_(scale), dtype)


def _step_to_slots(x: DecodingInputs[Tensor], saved: Tensor, scale: float) -> Tensor:
    """The output; the state after each token is written to a slot of its own."""
    if x.q.dim() == 3:
        tokens = {"q": x.q.unsqueeze(1), "k": x.k.unsqueeze(1), "v": x.v.unsqueeze(1)}
        return _step_to_slots(x._replace(**tokens), saved.unsqueeze(1), scale).squeeze(1)
    if x.state.device.type == "cpu" and x.state.dtype == state_dtype(x.q.dtype):
        return _step_by_rows(x, saved, scale)
    rows, _, states = _taken(x)
    if x.state_indices is None:  # `states` may be the pool
        states = states.clone()
    q, k, v, saved = (y[rows] for y in (x.q, x.k, x.v, saved))
    o = torch.zeros_like(x.v, memory_format=torch.contiguous_format)
    for t in range(q.shape[1]):
        o[rows, t] = _step_token_(q[:, t], k[:, t], v[:, t], x.log_decay, states, scale)
        is_kept = saved[:, t] >= 0
        x.state[saved[:, t][is_kept]] = states[is_kept].to(x.state.dtype)
    return o


def _step_by_rows(x: DecodingInputs[Tensor], saved: Tensor, scale: float) -> Tensor:
    """As `_step_to_slots`, one batch row after another, whose state stays in the cache, and without copies."""
    dtype = x.state.dtype
    q, k, v = x.q.to(dtype).unsqueeze(3), x.k.to(dtype).unsqueeze(4), x.v.to(dtype).unsqueeze(3)
    decay = torch.exp(finite_log_decay(x.q, x.log_decay))[:, None, None]
    o, unsaved = torch.zeros_like(v, memory_format=torch.contiguous_format), torch.empty_like(x.state[0])
    slots = range(len(q)) if x.state_indices is None else x.state_indices.tolist()
    for row, (slot, written) in enumerate(zip(slots, saved.tolist(), strict=True)):
        if slot < 0:
            continue
        state = x.state[slot]
        for t, target in enumerate(written):
            after = x.state[target] if target >= 0 else unsaved
            state = torch.mul(state, decay, out=after).addcmul_(k[row, t], v[row, t])
            torch.bmm(q[row, t], state, out=o[row, t])
    return (o if scale == 1 else o.mul_(scale)).squeeze(3).to(x.v.dtype)


def verify(x: DecodingInputs[Tensor], scale: float) -> list[Tensor]:
    """`o_i = scale (λ^d_i q_i S + Σ_j λ^(d_i-d_j) (q_i k_j) v_j)` over the ancestors j of i and itself, at depths d."""
    rows, _, states = _taken(x)
    path = _paths(x)[rows]
    depth = path.sum(dim=2)[:, None]  # [B, 1, T]
    log_decay = finite_log_decay(x.q, x.log_decay)[:, None]
    between = torch.exp(log_decay[..., None] * (depth[..., None] - depth[:, :, None]).clamp_min(0)) * path[:, None]
    q, k, v = (y[rows].transpose(1, 2).to(states.dtype) for y in (x.q, x.k, x.v))
    read = torch.exp(log_decay * depth)[..., None]
    o = torch.zeros_like(x.v, memory_format=torch.contiguous_format)
    o[rows] = (scale * ((q * read) @ states + ((q @ k.mT) * between) @ v)).transpose(1, 2).to(o.dtype)
    return [o]


def commit(x: DecodingInputs[Tensor]) -> list[Tensor]:
    assert x.last is not None
    if not x.k.numel():
        return []
    rows, slots, states = _taken(x)
    paths, last = _paths(x)[rows], x.last[rows]
    accepted = paths[torch.arange(len(last), device=last.device), last.clamp_min(0).long()] & (last >= 0)[:, None]
    k, v = (y[rows].to(states.dtype) for y in (x.k, x.v))
    for t in range(k.shape[1]):
        after = _advanced_(states.clone(), k[:, t], v[:, t], x.log_decay)
        states = torch.where(accepted[:, t, None, None, None], after, states)
    x.state[slots] = states.to(x.state.dtype)
    return []


def _taken(x: DecodingInputs[Tensor]) -> tuple[slice | Tensor, slice | Tensor, Tensor]:
    """Batch rows that are not padding, their slots, and their states in the dtype of the arithmetic."""
    dtype = state_dtype(x.k.dtype)
    if x.state_indices is None:
        return slice(None), slice(None), x.state.to(dtype)
    rows = (x.state_indices >= 0).nonzero()[:, 0]
    slots = x.state_indices[rows]
    return rows, slots, x.state[slots].to(dtype)


def _runs(x: DecodingInputs[Tensor]) -> list[tuple[Tensor, slice]]:
    """Batch rows by runs of consecutive slots, whose states are updated in place; none where copying them is faster.

    Measured on a CPU core with 32 states of 8 heads of 64: copies take 2.6 ms, one run 0.8, runs of 8 1.3, of one 2.0.
    """
    if x.state_indices is None or x.state.device.type != "cpu" or x.state.dtype != state_dtype(x.q.dtype):
        return []
    order = x.state_indices.argsort()
    slots = x.state_indices[order].tolist()
    begin, end = bisect_left(slots, 0), len(slots)
    bounds = [i for i in range(begin, end) if i == begin or slots[i] != slots[i - 1] + 1]
    if len(bounds) * RUN > (end - begin) * x.state[0].numel():
        return []
    return [(order[i:j], slice(slots[i], slots[i] + j - i)) for i, j in pairwise([*bounds, end])]


def _paths(x: DecodingInputs[Tensor]) -> Tensor:
    """Mask `[B, T, T]`: draft j is an ancestor of draft i, or i itself."""
    B, T = x.k.shape[:2]
    paths = torch.eye(T, dtype=torch.bool, device=x.k.device).repeat(B, 1, 1)
    if x.parents is None:
        return torch.ones_like(paths).tril()
    row = torch.arange(B, device=x.k.device)
    for t in range(T):
        parent = x.parents[:, t].long()
        paths[:, t] |= paths[row, parent.clamp_min(0)] & (parent >= 0)[:, None]
    return paths


def _advanced_(states: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    """`λ S + k vᵀ` for one token of every batch row, in place; all in the dtype of the states but log_decay."""
    if log_decay is not None:
        states.mul_(cast(log_decay, states.dtype).exp().view(-1, 1, 1))
    return states.addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))


def _step_(
    attend_: Attend_, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> Tensor:
    """The output; `state` `[B, H, K, V]` is updated in place."""
    if q.shape[1] == 1:
        return _step_token_(q.squeeze(1), k.squeeze(1), v.squeeze(1), log_decay, state, scale).unsqueeze(1)
    return attend_(q, k, v, log_decay, state, scale)
