"""The definition: a recurrence over tokens, and its equivalent as one masked product.

Slow on purpose. Every other implementation is measured against this one, in float64.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .inputs import (
    AppendInputs,
    AttentionInputs,
    DecodingInputs,
    FoldInputs,
    GradientInputs,
    PrefillInputs,
    SlotPrefillInputs,
)
from .prefill import prefill as prefill_by
from .prefill import prefill_copies
from .problem import Problem, state_dtype
from .states import read_state_, write_state
from .values import sequence_bounds

__all__ = [
    "append",
    "backward",
    "chunk_size",
    "commit",
    "fold",
    "forward",
    "is_slow",
    "prefill",
    "prefill_",
    "quadratic",
    "read_state_",
    "recurrence",
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


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`S_t = λ S_{t-1} + k_t v_tᵀ`, `o_t = scale S_tᵀ q_t`, from `state` `[B, H, K, V]`."""
    q, k, v = (x.to(state.dtype) for x in (q, k, v))
    decay = _decay(log_decay, state)
    outputs = []
    for t in range(q.shape[1]):
        state = decay * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return (torch.stack(outputs, dim=1) if outputs else v), state


def quadratic(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float) -> Tensor:
    """`O = scale ((Q Kᵀ) ⊙ M) V` with `M_ij = λ^(i-j)` for `j <= i`, else 0: all of `T x T` at once."""
    dtype = state_dtype(q.dtype)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    t = torch.arange(q.shape[1], device=q.device)
    distance = t[:, None] - t[None, :]
    decay = q.new_ones(q.shape[2]) if log_decay is None else log_decay.to(dtype).exp()
    mask = decay[:, None, None] ** distance.clamp_min(0) * (distance >= 0)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * mask
    return scale * torch.einsum("bhij,bjhv->bihv", scores, v)


def forward(x: AttentionInputs[Tensor], scale: float, output_final_state: bool) -> list[Tensor]:
    sequences = _sequences(x.q, x.cu_seqlens)
    state = _initial_state(x, len(sequences), x.initial_state).clone()
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    for i, at in enumerate(sequences):
        o[at], state[i : i + 1] = recurrence(x.q[at], x.k[at], x.v[at], x.log_decay, scale, state[i : i + 1])
    return [o, state] if output_final_state else [o]


def prefill(x: PrefillInputs[Tensor], scale: float) -> list[Tensor]:
    return prefill_by(forward, x, scale)


def prefill_(x: SlotPrefillInputs[Tensor], scale: float) -> list[Tensor]:
    return prefill_copies(forward, prefill, x, scale)


def backward(x: GradientInputs[Tensor], scale: float) -> list[Tensor]:
    """`dq_t = scale S_t do_t`; with `R_t = λ R_{t+1} + scale q_t do_tᵀ`: `dk_t = R_t v_t`, `dv_t = R_tᵀ k_t`."""
    dq, dk, dv = (torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x.q, x.k, x.v))
    sequences = _sequences(x.q, x.cu_seqlens)
    states = _initial_state(x, len(sequences), x.initial_state)
    d_states = _initial_state(x, len(sequences), x.d_final_state).clone()
    decay = _decay(x.log_decay, states)
    for i, at in enumerate(sequences):
        q, k, v, dos = (y[at].to(states.dtype) for y in (x.q, x.k, x.v, x.do))
        state, d_state = states[i : i + 1], d_states[i : i + 1]
        for t in range(q.shape[1]):
            state = decay * state + k[:, t, :, :, None] * v[:, t, :, None, :]
            dq[at][:, t] = scale * torch.einsum("bhkv,bhv->bhk", state, dos[:, t])
        for t in reversed(range(q.shape[1])):
            d_state = d_state + scale * q[:, t, :, :, None] * dos[:, t, :, None, :]
            dk[at][:, t] = torch.einsum("bhkv,bhv->bhk", d_state, v[:, t])
            dv[at][:, t] = torch.einsum("bhkv,bhk->bhv", d_state, k[:, t])
            d_state = decay * d_state
        d_states[i : i + 1] = d_state
    return [dq, dk, dv] if x.initial_state is None else [dq, dk, dv, d_states]


def step(x: DecodingInputs[Tensor], scale: float) -> list[Tensor]:
    if x.q.dim() == 3:
        (o,) = step(x._replace(q=x.q.unsqueeze(1), k=x.k.unsqueeze(1), v=x.v.unsqueeze(1)), scale)
        return [o.squeeze(1)]
    o = torch.zeros_like(x.v, memory_format=torch.contiguous_format)
    before = x.state if x.saved_indices is None else x.state.clone()
    for at, of in _slots(x):
        state = before[of].to(state_dtype(x.q.dtype))
        if x.saved_indices is None:
            o[at], x.state[of] = recurrence(x.q[at], x.k[at], x.v[at], x.log_decay, scale, state)
            continue
        for t, slot in enumerate(x.saved_indices[at].flatten().tolist()):
            token = at, slice(t, t + 1)
            o[token], state = recurrence(x.q[token], x.k[token], x.v[token], x.log_decay, scale, state)
            if slot >= 0:
                x.state[slot] = state[0]
    return [o]


def chunk_size(problem: Problem) -> int:
    """Any size would do: the recurrence has no chunks."""
    return 32


def append(x: AppendInputs[Tensor], scale: float, update: bool) -> list[Tensor]:
    o = torch.zeros_like(x.v, memory_format=torch.contiguous_format)
    sequences = _sequences(x.q, x.cu_seqlens)
    slots = range(len(sequences)) if x.state_indices is None else x.state_indices.tolist()
    for n, (at, slot) in enumerate(zip(sequences, slots, strict=True)):
        if slot < 0:
            continue
        of, is_new = slice(slot, slot + 1), x.has_initial_state is not None and not x.has_initial_state[n]
        count = 0 if is_new else int(x.count[slot, 0])
        length = x.q[at].shape[1] if x.lengths is None else int(x.lengths[n])
        boundary = torch.zeros_like(x.state[of]) if is_new else x.state[of].clone()
        keys, values = (y[of, :, :count].transpose(1, 2).clone() for y in (x.keys, x.values))
        state = recurrence(keys, keys, values, x.log_decay, 1.0, boundary.to(state_dtype(x.q.dtype)))[1]
        for t in range(length):
            q, k, v = (y[at][:, t : t + 1] for y in (x.q, x.k, x.v))
            o[at][:, t : t + 1], state = recurrence(q, k, v, x.log_decay, scale, state)
            keys, values = torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)
            if keys.shape[1] == x.keys.shape[2]:
                boundary = state.to(boundary.dtype)
                state, keys, values = boundary.to(state.dtype), keys[:, :0], values[:, :0]
        if update:
            x.state[of], x.count[of] = boundary, keys.shape[1]
            for ring, tokens in ((x.keys, keys), (x.values, values)):
                ring[of] = 0
                ring[of, :, : tokens.shape[1]] = tokens.transpose(1, 2)
    return [o]


def fold(x: FoldInputs[Tensor]) -> list[Tensor]:
    slots = range(len(x.state)) if x.state_indices is None else x.state_indices.tolist()
    for slot in slots:
        if slot >= 0:
            of, count = slice(slot, slot + 1), int(x.count[slot, 0])
            keys, values = (y[of, :, :count].transpose(1, 2) for y in (x.keys, x.values))
            state = x.state[of].to(state_dtype(keys.dtype))
            x.state[of], x.count[of] = recurrence(keys, keys, values, x.log_decay, 1.0, state)[1], 0
    return []


def verify(x: DecodingInputs[Tensor], scale: float) -> list[Tensor]:
    o = torch.zeros_like(x.v, memory_format=torch.contiguous_format)
    T = x.q.shape[1]
    for at, of in _slots(x):
        # States after each draft; last the state before all drafts, which a parent of -1 finds.
        states = [*[x.state[of]] * T, x.state[of].to(state_dtype(x.q.dtype))]
        for t, parent in enumerate(_parents(x, at)):
            draft = at, slice(t, t + 1)
            q, k, v = x.q[draft], x.k[draft], x.v[draft]
            o[draft], states[t] = recurrence(q, k, v, x.log_decay, scale, states[parent])
    return [o]


def commit(x: DecodingInputs[Tensor]) -> list[Tensor]:
    assert x.last is not None
    for at, of in _slots(x):
        accepted, draft, parents = [], int(x.last[at]), _parents(x, at)
        while draft >= 0:
            accepted.insert(0, draft)
            draft = parents[draft]
        k, v = x.k[at][:, accepted], x.v[at][:, accepted]
        x.state[of] = recurrence(k, k, v, x.log_decay, 1.0, x.state[of].to(state_dtype(k.dtype)))[1]
    return []


def _slots(x: DecodingInputs[Tensor]) -> list[tuple[slice, slice]]:
    """Batch rows that are not padding, and the slots of their states."""
    slots = range(x.k.shape[0]) if x.state_indices is None else x.state_indices.tolist()
    return [(slice(row, row + 1), slice(slot, slot + 1)) for row, slot in enumerate(slots) if slot >= 0]


def _parents(x: DecodingInputs[Tensor], row: slice) -> list[int]:
    return list(range(-1, x.k.shape[1] - 1)) if x.parents is None else x.parents[row][0].tolist()


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> list[tuple[slice, slice]]:
    """Index of each sequence in `[B, T]`."""
    if cu_seqlens is None:
        return [(slice(b, b + 1), slice(None)) for b in range(q.shape[0])]
    bounds = sequence_bounds(cu_seqlens, q.shape[1])
    return [(slice(None), slice(start, end)) for start, end in pairwise(bounds)]


def _initial_state(
    x: AttentionInputs[Tensor] | GradientInputs[Tensor], num_sequences: int, state: Tensor | None
) -> Tensor:
    if state is not None:
        return state
    return x.q.new_zeros(num_sequences, *x.q.shape[2:], x.v.shape[3], dtype=state_dtype(x.q.dtype))


def _decay(log_decay: Tensor | None, state: Tensor) -> Tensor:
    """λ per head, shaped to multiply a state."""
    if log_decay is None:
        return state.new_ones(1, 1, 1)
    return log_decay.to(state.dtype).exp()[:, None, None]
