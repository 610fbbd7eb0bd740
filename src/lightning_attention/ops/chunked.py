"""Lightning Attention-2 in PyTorch: masked products inside a chunk, a decayed state between chunks. Any device.

Shapes: N sequences, H heads, K and V head sizes, C tokens in a chunk. A chunk of every sequence is worked on at
once, as `[N H, C, D]`, in float32 (float64 for float64 inputs). Formulas: docs/algorithm.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .prefill import prefill as prefill_by
from .problem import AttentionInputs, DecodingInputs, Problem, sequence_bounds, state_dtype
from .states import read_state_, write_state

# Measured on 2 CPU cores at D = 64: 64 spends its time in calls, 256 in the C x C products; 128 is level with the best.
CHUNK_SIZE = 128


__all__ = [
    "backward",
    "commit",
    "forward",
    "is_slow",
    "prefill",
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


def forward(x: AttentionInputs[Tensor], scale: float, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
    sequences = _Sequences(x.q, x.cu_seqlens)
    states = sequences.states(x.initial_state, x.q.shape[3], x.v.shape[3])
    o = _scan_(sequences, x.q, x.k, x.v, x.log_decay, states, scale)
    return o, sequences.in_given_order(states) if output_final_state else None


def prefill(x: AttentionInputs[Tensor], state_positions: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return prefill_by(forward, x, state_positions, scale)


def backward(
    x: AttentionInputs[Tensor], do: Tensor, d_final_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = x.q, x.k, x.v
    sequences, decay = _Sequences(q, x.cu_seqlens), _Decay(q, x.log_decay)
    dq, dk, dv = (torch.empty_like(y, memory_format=torch.contiguous_format) for y in (q, k, v))

    states_before = []
    states = sequences.states(x.initial_state, q.shape[3], v.shape[3])
    for chunk in sequences.chunks:
        kc, vc = chunk.load(k), chunk.load(v)
        S = states[: kc.shape[0]]
        states_before.append(S.clone())
        decay.carry_(S, chunk).baddbmm_(decay.write(kc, chunk).mT, vc)

    d_states = sequences.states(d_final_state, q.shape[3], v.shape[3])
    for chunk, S in zip(reversed(sequences.chunks), reversed(states_before), strict=True):
        qc, kc, vc, doc = chunk.load(q), chunk.load(k), chunk.load(v), chunk.load(do)
        R = d_states[: kc.shape[0]]
        d_scores = decay.mask_(torch.bmm(doc, vc.mT))
        dqc = torch.bmm(d_scores, kc).baddbmm_(decay.read(doc), S.mT, beta=scale, alpha=scale)
        dkc = torch.bmm(d_scores.mT, qc).baddbmm_(decay.write(vc, chunk), R.mT, beta=scale)
        scores = decay.mask_(torch.bmm(qc, kc.mT))
        dvc = torch.bmm(scores.mT, doc).baddbmm_(decay.write(kc, chunk), R, beta=scale)
        for out, gradient in ((dq, dqc), (dk, dkc), (dv, dvc)):
            chunk.store(out, gradient)
        decay.carry_(R, chunk).baddbmm_(decay.read(qc).mT, doc, alpha=scale)
    return dq, dk, dv, sequences.in_given_order(d_states)


def step(x: DecodingInputs[Tensor], scale: float) -> Tensor:
    is_plain = x.state_indices is None and x.state.dtype == state_dtype(x.q.dtype)
    if x.q.dim() == 3:
        if is_plain:
            return _step_token_(x.q, x.k, x.v, x.log_decay, x.state, scale)
        return step(x._replace(q=x.q.unsqueeze(1), k=x.k.unsqueeze(1), v=x.v.unsqueeze(1)), scale).squeeze(1)
    if is_plain:
        return _step_(x.q, x.k, x.v, x.log_decay, x.state, scale)
    rows, slots, states = _taken(x)
    o = torch.zeros_like(x.v, memory_format=torch.contiguous_format)
    o[rows] = _step_(x.q[rows], x.k[rows], x.v[rows], x.log_decay, states, scale)
    x.state[slots] = states.to(x.state.dtype)
    return o


def _step_token_(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float) -> Tensor:
    """The output `[B, H, V]`; `state` `[B, H, K, V]` is updated in place."""
    _advanced_(state, k, v, log_decay)
    H, K, V = state.shape[1:]
    o = torch.bmm(_cast(q, state.dtype).reshape(-1, 1, K), state.flatten(0, 1)).view(-1, H, V)
    return _cast(o if scale == 1 else o.mul_(scale), v.dtype)


def verify(x: DecodingInputs[Tensor], scale: float) -> Tensor:
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
    return o


def commit(x: DecodingInputs[Tensor]) -> None:
    assert x.last is not None
    rows, slots, states = _taken(x)
    paths, last = _paths(x)[rows], x.last[rows]
    accepted = paths[torch.arange(len(last), device=last.device), last.clamp_min(0).long()] & (last >= 0)[:, None]
    k, v = x.k[rows], x.v[rows]
    for t in range(k.shape[1]):
        after = _advanced_(states.clone(), k[:, t], v[:, t], x.log_decay)
        states = torch.where(accepted[:, t, None, None, None], after, states)
    x.state[slots] = states.to(x.state.dtype)


def _taken(x: DecodingInputs[Tensor]) -> tuple[slice | Tensor, slice | Tensor, Tensor]:
    """Batch rows that are not padding, their slots, and their states in the dtype of the arithmetic."""
    dtype = state_dtype(x.k.dtype)
    if x.state_indices is None:
        return slice(None), slice(None), x.state.to(dtype)
    rows = (x.state_indices >= 0).nonzero()[:, 0]
    slots = x.state_indices[rows]
    return rows, slots, x.state[slots].to(dtype)


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
    """`λ S + k vᵀ` for one token of every batch row, in place."""
    if log_decay is not None:
        states.mul_(_cast(log_decay, states.dtype).exp().view(-1, 1, 1))
    return states.addcmul_(_cast(k, states.dtype).unsqueeze(-1), _cast(v, states.dtype).unsqueeze(-2))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which costs as much as a view even when there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def _step_(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float) -> Tensor:
    """The output; `state` `[B, H, K, V]` is updated in place."""
    if q.shape[1] == 1:
        return _step_token_(q.squeeze(1), k.squeeze(1), v.squeeze(1), log_decay, state, scale).unsqueeze(1)
    states = state.contiguous()
    o = _scan_(_Sequences(q, None), q, k, v, log_decay, states.flatten(0, 1), scale)
    if states is not state:
        state.copy_(states)
    return o


def _scan_(
    sequences: "_Sequences", q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, states: Tensor, scale: float
) -> Tensor:
    """The output; `states` `[N H, K, V]` is updated in place, to the states after the last token."""
    decay = _Decay(q, log_decay)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    for chunk in sequences.chunks:
        qc, kc, vc = chunk.load(q), chunk.load(k), chunk.load(v)
        S = states[: kc.shape[0]]
        scores = decay.mask_(torch.bmm(qc, kc.mT))
        chunk.store(o, torch.bmm(scores, vc).baddbmm_(decay.read(qc), S, beta=scale, alpha=scale))
        decay.carry_(S, chunk).baddbmm_(decay.write(kc, chunk).mT, vc)
    return o


def finite_log_decay(q: Tensor, log_decay: Tensor | None) -> Tensor:
    """log λ `[H]`; finite, since -inf, which is λ = 0, times 0 would be NaN."""
    dtype = state_dtype(q.dtype)
    log_decay = q.new_zeros(q.shape[2], dtype=dtype) if log_decay is None else log_decay.to(dtype)
    return log_decay.clamp_min(torch.finfo(dtype).min)


@dataclass(frozen=True)
class _Chunk:
    """Positions of the tokens of one chunk: `[:, start:stop]`, or `[N, C]` for packed sequences."""

    tokens: slice | Tensor
    lengths: int | Tensor  # one for all sequences, or [N]
    padding: Tensor | None  # [N, C] if the lengths differ
    dtype: torch.dtype

    def load(self, x: Tensor) -> Tensor:
        """The chunk of x as `[N H, C, D]`, zero in the padding; a view if possible."""
        x = x[:, self.tokens] if isinstance(self.tokens, slice) else x[0, self.tokens]
        x = x.transpose(1, 2).to(self.dtype)
        if self.padding is not None:
            x = x.masked_fill(self.padding[:, None, :, None], 0)
        return x.flatten(0, 1)

    def store(self, out: Tensor, x: Tensor) -> None:
        x = x.unflatten(0, (-1, out.shape[2])).transpose(1, 2).to(out.dtype)
        if isinstance(self.tokens, slice):
            out[:, self.tokens] = x
        elif self.padding is None:
            out[0, self.tokens] = x
        else:
            out[0, self.tokens[~self.padding]] = x[~self.padding]


class _Sequences:
    """All sequences cut into chunks: chunk c of every sequence that has one is worked on at once.

    Packed sequences are taken in order of falling length, so that those still running are always the first ones.
    """

    def __init__(self, q: Tensor, cu_seqlens: Tensor | None):
        batch_size, length, self.num_heads = q.shape[:3]
        self.dtype, self.device = state_dtype(q.dtype), q.device
        self.order = None
        if cu_seqlens is None:
            self.count = batch_size
            self.chunks = [self._chunk(start, length) for start in range(0, length, CHUNK_SIZE)]
        else:
            bounds = torch.tensor(sequence_bounds(cu_seqlens, length), device=self.device)
            lengths, self.order = bounds.diff().sort(descending=True, stable=True)
            self.count = len(lengths)
            starts, longest = bounds[:-1][self.order], max([0, *lengths[:1].tolist()])
            self.chunks = [self._packed_chunk(starts, lengths, c) for c in range(0, longest, CHUNK_SIZE)]

    def states(self, initial: Tensor | None, key_dim: int, value_dim: int) -> Tensor:
        """Initial states `[N H, K, V]`, a copy to update in place."""
        shape = (self.count, self.num_heads, key_dim, value_dim)
        if initial is None:
            states = torch.zeros(shape, dtype=self.dtype, device=self.device)
        elif self.order is None:
            states = initial.clone(memory_format=torch.contiguous_format)
        else:
            states = initial[self.order]
        return states.flatten(0, 1)

    def in_given_order(self, states: Tensor) -> Tensor:
        """States `[N, H, K, V]` in the order of the sequences as given."""
        states = states.view(self.count, self.num_heads, *states.shape[1:])
        return states if self.order is None else states[self.order.argsort()]

    def _chunk(self, start: int, length: int) -> _Chunk:
        stop = min(start + CHUNK_SIZE, length)
        return _Chunk(slice(start, stop), stop - start, None, self.dtype)

    def _packed_chunk(self, starts: Tensor, lengths: Tensor, offset: int) -> _Chunk:
        left = lengths[lengths > offset] - offset
        size = min(CHUNK_SIZE, int(left[0]))
        position = torch.arange(size, device=self.device)
        tokens = starts[: len(left), None] + offset + position
        if int(left[-1]) >= size:
            return _Chunk(tokens, size, None, self.dtype)
        padding = position >= left[:, None]
        return _Chunk(tokens.masked_fill(padding, 0), left.clamp_max(size), padding, self.dtype)


class _Decay:
    """Multiplication by powers of λ, from one table of λ^0 .. λ^C: no exponent is ever above 0."""

    def __init__(self, q: Tensor, log_decay: Tensor | None):
        log_decay = finite_log_decay(q, log_decay)
        position = torch.arange(min(CHUNK_SIZE, q.shape[1]) + 1, device=q.device)
        self.powers = torch.exp(log_decay[:, None] * position)
        self.inside = self.powers[:, (position[:-1, None] - position[:-1]).clamp_min(0)].tril()

    def mask_(self, scores: Tensor) -> Tensor:
        """`λ^(i-j)` for `j <= i`, else 0, in place."""
        size = scores.shape[1]
        self._by_head(scores).mul_(self.inside[:, :size, :size])
        return scores

    def read(self, x: Tensor) -> Tensor:
        """`λ^(i+1) x`: decay from the state before the chunk to token i."""
        return (self._by_head(x) * self.powers[:, 1 : x.shape[1] + 1, None]).flatten(0, 1)

    def write(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """`λ^(m-1-j) x`: decay from token j to the state after the m tokens of the chunk."""
        if isinstance(chunk.lengths, int):
            powers = self.powers[:, : chunk.lengths].flip(1)
        else:
            exponents = chunk.lengths[:, None] - 1 - torch.arange(x.shape[1], device=x.device)
            powers = self.powers[:, exponents.clamp_min(0)].transpose(0, 1)
        return (self._by_head(x) * powers[..., None]).flatten(0, 1)

    def carry_(self, state: Tensor, chunk: _Chunk) -> Tensor:
        """`λ^m x`, in place: decay from the state before the chunk to the state after its m tokens."""
        self._by_head(state).mul_(self.powers[:, chunk.lengths].movedim(0, -1)[..., None, None])
        return state

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.powers.shape[0]))
