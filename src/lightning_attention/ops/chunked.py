"""Lightning Attention-2 in PyTorch: masked products inside a chunk, a decayed state between chunks. Any device.

Shapes: N sequences, B batch rows, H heads, K and V head sizes, C tokens in a chunk. A chunk of several batch rows is
worked on at once, as `[B H, C, D]`, in float32 (float64 for float64 inputs). A chunk of packed sequences holds C tokens
of the batch row, of any number of sequences. Formulas: docs/algorithm.md.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import decoding
from .decoding import commit, verify
from .prefill import prefill as prefill_by
from .prefill import prefill_copies
from .problem import (
    AttentionInputs,
    DecodingInputs,
    GradientInputs,
    PrefillInputs,
    Problem,
    SlotPrefillInputs,
    state_dtype,
)
from .states import cast, finite_log_decay, read_state_, write_state
from .values import sequence_bounds

# Measured on one core of an AMD EPYC with AVX-512, in float32, in µs a token, forward and backward.
# T 4096, 4 heads of 64: chunks of 32 take 2.6 and 6.3, of 64 2.3 and 5.5, of 128 2.6 and 6.6, of 256 3.8 and 10.8.
# With 8 and 16 heads of 64, and 8 of 128, chunks of 128 take 1.2 to 1.4 times as long as of 64, and of 32 0.9 to 1.1.
CHUNK_SIZE = 64

# Tokens of all heads and batch rows whose chunks fit the L2 cache. Measured as above, 32 batch rows of 256 tokens:
# 1 at once takes 2.5 and 5.4, 4 take 1.8 and 4.3, 8 take 1.7 and 4.3, 32 take 1.9 and 5.0.
# With 8 heads of 64, 4 at once are best and 32 take 1.2 and 1.4 times as long; with 16 heads, 1 to 4 are level.
TOKENS_AT_ONCE = 32 * CHUNK_SIZE

__all__ = [
    "backward",
    "commit",
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


def forward(x: AttentionInputs[Tensor], scale: float, output_final_state: bool) -> list[Tensor]:
    tiles = _Tiles(x.q, x.v, x.cu_seqlens)
    final_state = tiles.new_states(x.initial_state) if output_final_state else None
    o = _scan(tiles, x, scale, x.initial_state, final_state)
    return [o] if final_state is None else [o, final_state]


def prefill(x: PrefillInputs[Tensor], scale: float) -> list[Tensor]:
    return prefill_by(forward, x, scale)


def prefill_(x: SlotPrefillInputs[Tensor], scale: float) -> list[Tensor]:
    """One sequence after another reads and writes its slot, in the pool."""
    is_in_place = x.state.dtype == state_dtype(x.q.dtype) and x.state[:1].is_contiguous()
    if x.q.shape[0] != 1 or not is_in_place:
        return prefill_copies(forward, prefill, x, scale)
    T = x.q.shape[1]
    bounds = [0, T] if x.cu_seqlens is None else sequence_bounds(x.cu_seqlens, T)
    num_sequences = len(bounds) - 1
    slots = range(num_sequences) if x.state_indices is None else x.state_indices.tolist()
    exists = [True] * num_sequences if x.has_initial_state is None else x.has_initial_state.tolist()
    exists = [slot >= 0 and has_state for slot, has_state in zip(slots, exists, strict=True)]
    states = [x.state[slot] if slot >= 0 else torch.empty_like(x.state[0]) for slot in slots]
    for n, (start, end) in enumerate(pairwise(bounds)):
        if start == end and not exists[n]:
            states[n].zero_()
    positions = [] if x.state_positions is None else x.state_positions.tolist()
    saved = [] if x.saved_indices is None else x.saved_indices[0].tolist()
    outputs = []
    for (start, stop), slot in zip(pairwise([0, *positions, T]), [*saved, -1], strict=True):
        q, k, v = (y[:, start:stop] for y in (x.q, x.k, x.v))
        tiles = _Tiles(q, v, None if x.cu_seqlens is None else x.cu_seqlens.clamp(start, stop) - start)
        initial = [state if exists[n] or bounds[n] < start else None for n, state in enumerate(states)]
        outputs.append(_scan(tiles, AttentionInputs(q, k, v, x.log_decay, None, None), scale, initial, states))
        if slot >= 0:
            x.state[slot] = states[bisect_left(bounds, stop) - 1]
    return [torch.cat(outputs, dim=1) if positions else outputs[0]]


def backward(x: GradientInputs[Tensor], scale: float) -> list[Tensor]:
    tiles = _Tiles(x.q, x.v, x.cu_seqlens)
    decay = _Decay(tiles, finite_log_decay(x.q, x.log_decay), scale)
    dq, dk, dv = (torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x.q, x.k, x.v))
    d_initial_state = None if x.initial_state is None else tiles.new_states(x.d_final_state)
    for rows in tiles.batch_rows:
        initial, d_initial, d_final = (
            tiles.states_of(rows, states) for states in (x.initial_state, d_initial_state, x.d_final_state)
        )
        states = _states_before_chunks(tiles, rows, x.k, x.v, decay, initial)
        R = None  # gradient of the state; None is zero
        for chunk, state in zip(reversed(tiles.chunks), reversed(states), strict=True):
            qc, kc, vc, doc = (tiles.load(y, rows, chunk) for y in (x.q, x.k, x.v, x.do))
            scores, d_scores = decay.scores(qc, kc, chunk), decay.scores(doc, vc, chunk)
            dqc, dkc = _product(d_scores, kc, chunk), _product(d_scores.mT, qc, chunk)
            dvc = _product(scores.mT, doc, chunk)
            for span in reversed(chunk.spans):
                S = initial[span.sequence] if span.is_start else state
                if span.is_end:
                    R = d_final[span.sequence]
                out = d_initial[span.sequence] if span.is_start else None
                is_written = not span.is_start or out is not None
                if S is None and R is None and not is_written:
                    continue
                qs, ks, vs, dos, dqs, dks, dvs = chunk.within(span, qc, kc, vc, doc, dqc, dkc, dvc)
                if S is not None:
                    dqs.baddbmm_(decay.read(dos), S.mT)
                if R is not None:
                    dks.baddbmm_(decay.write(vs), R.mT)
                    dvs.baddbmm_(decay.write(ks), R)
                if is_written:
                    R = decay.advance(R, decay.read(qs), dos, out)
            for out, gradient in ((dq, dqc), (dk, dkc), (dv, dvc)):
                tiles.store(out, rows, chunk, gradient)
    return [dq, dk, dv] if d_initial_state is None else [dq, dk, dv, d_initial_state]


def step(x: DecodingInputs[Tensor], scale: float) -> list[Tensor]:
    return decoding.step(_attend_, x, scale)


def _attend_(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float) -> Tensor:
    """The output of tokens from a state `[B, H, K, V]`, which is updated in place."""
    states = state.contiguous()
    o = _scan(_Tiles(q, v, None), AttentionInputs(q, k, v, log_decay, None, None), scale, states, states)
    if states is not state:
        state.copy_(states)
    return o


def _scan(
    tiles: "_Tiles", x: AttentionInputs[Tensor], scale: float, initial_state: "_States", final_state: "_States"
) -> Tensor:
    """The output; states after the last tokens are written to `final_state`, which may be `initial_state`."""
    decay = _Decay(tiles, finite_log_decay(x.q, x.log_decay), scale)
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    for rows in tiles.batch_rows:
        initial, final = tiles.states_of(rows, initial_state), tiles.states_of(rows, final_state)
        S = None  # zero
        for chunk in tiles.chunks:
            qc, kc, vc = (tiles.load(y, rows, chunk) for y in (x.q, x.k, x.v))
            oc = _product(decay.scores(qc, kc, chunk), vc, chunk)
            for span in chunk.spans:
                if span.is_start:
                    S = initial[span.sequence]
                out = final[span.sequence] if span.is_end else None
                is_written = not span.is_end or out is not None
                if S is None and not is_written:
                    continue
                qs, ks, vs, os = chunk.within(span, qc, kc, vc, oc)
                if S is not None:
                    os.baddbmm_(decay.read(qs), S)
                if is_written:
                    S = decay.advance(S, decay.write(ks), vs, out)
            tiles.store(o, rows, chunk, oc)
    return o


def _states_before_chunks(
    tiles: "_Tiles", rows: slice, k: Tensor, v: Tensor, decay: "_Decay", initial: "_StatesOfRows"
) -> list[Tensor | None]:
    """The state before each chunk, of the sequence that goes on in the chunk; None is zero."""
    states, S = [], None
    for chunk in tiles.chunks:
        states.append(S)
        span = chunk.spans[-1]
        if span.is_start:
            S = initial[span.sequence]
        if not span.is_end:
            ks, vs = chunk.within(span, *(tiles.load(y, rows, chunk) for y in (k, v)))
            S = decay.advance(S, decay.write(ks), vs)
    return states


class _Span(NamedTuple):
    """Tokens of one sequence in a chunk, and whether its first and its last token are among them."""

    sequence: int
    tokens: slice  # of the chunk
    is_start: bool
    is_end: bool


class _Chunk(NamedTuple):
    """Tokens of a batch row, and the mask `[C, C]` of pairs in different sequences; None if there is one sequence."""

    tokens: slice  # of the batch row
    spans: list[_Span]
    is_apart: Tensor | None

    def within(self, span: _Span, *tensors: Tensor) -> Iterable[Tensor]:
        """The tokens of a span, as views of `[B H, C, D]`."""
        return tensors if self.is_apart is None else [x[:, span.tokens] for x in tensors]


def _product(scores: Tensor, x: Tensor, chunk: _Chunk) -> Tensor:
    """`scores @ x`, in which NaN and inf of x stay in their sequence, although 0, a masked score, times NaN is NaN."""
    out = torch.bmm(scores, x)
    if chunk.is_apart is not None and not math.isfinite(out.sum().item()):
        for span in chunk.spans:
            alone = torch.zeros_like(x)
            alone[:, span.tokens] = x[:, span.tokens]
            out[:, span.tokens] = torch.bmm(scores, alone)[:, span.tokens]
    return out


def batch_rows_at_once(batch_size: int, chunk_size: int, num_heads: int, device_type: str) -> int:
    """Batch rows whose chunks are worked on at once: as many as fit the cache of a CPU, all on other devices."""
    fitting = TOKENS_AT_ONCE // (num_heads * max(chunk_size, 1)) if device_type == "cpu" else batch_size
    return max(1, min(fitting, batch_size))


# States `[N, H, K, V]`, or by sequence `[H, K, V]`; None is zero.
_States = Tensor | Sequence[Tensor | None] | None
# States `[B H, K, V]` of the batch rows that are worked on, by sequence.
_StatesOfRows = Tensor | Sequence[Tensor | None]


class _Tiles:
    """Batch rows and chunks to work on at once. A batch row holds one sequence; the only one may hold packed ones."""

    def __init__(self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None):
        B, T, H, K = q.shape
        self.bounds = [0, T] if cu_seqlens is None else sequence_bounds(cu_seqlens, T)
        self.state_shape = len(self.bounds) - 1, B, H, K, v.shape[3]
        self.dtype, self.device = state_dtype(q.dtype), q.device
        self.chunk_size = min(CHUNK_SIZE, T)
        self.rows_at_once = batch_rows_at_once(B, self.chunk_size, H, q.device.type)
        self.batch_rows = [slice(start, start + self.rows_at_once) for start in range(0, B, self.rows_at_once)]
        self.chunks = self._chunks()

    def _chunks(self) -> list[_Chunk]:
        starts = range(0, self.bounds[-1], CHUNK_SIZE)
        spans: list[list[_Span]] = [[] for _ in starts]
        for n, (start, end) in enumerate(pairwise(self.bounds)):
            for c in range(start // CHUNK_SIZE, -(-end // CHUNK_SIZE) if start < end else 0):
                first, stop = start - c * CHUNK_SIZE, end - c * CHUNK_SIZE
                tokens = slice(max(first, 0), min(stop, CHUNK_SIZE))
                spans[c].append(_Span(n, tokens, first >= 0, stop <= CHUNK_SIZE))
        return [self._chunk(start, spans_within) for start, spans_within in zip(starts, spans, strict=True)]

    def _chunk(self, start: int, spans: list[_Span]) -> _Chunk:
        tokens = slice(start, start + spans[-1].tokens.stop)
        if len(spans) == 1:
            return _Chunk(tokens, spans, None)
        sequence = self._sequence_of_tokens[tokens]
        return _Chunk(tokens, spans, sequence[:, None] != sequence)

    @cached_property
    def _sequence_of_tokens(self) -> Tensor:
        lengths = torch.tensor(self.bounds, device=self.device).diff()
        return torch.repeat_interleave(lengths, output_size=self.bounds[-1])

    def load(self, x: Tensor, rows: slice, chunk: _Chunk) -> Tensor:
        """`[B H, C, D]`; a view if possible."""
        return cast(x[rows, chunk.tokens].transpose(1, 2), self.dtype).flatten(0, 1)

    def store(self, out: Tensor, rows: slice, chunk: _Chunk, x: Tensor) -> None:
        out[rows, chunk.tokens] = x.unflatten(0, (-1, out.shape[2])).transpose(1, 2)

    def states_of(self, rows: slice, states: _States) -> _StatesOfRows:
        """States of batch rows: views, if `states` is contiguous."""
        N, B, H, K, V = self.state_shape
        if states is None:
            return [None] * N
        if not isinstance(states, Tensor):
            return states
        return states.reshape(N, B * H, K, V)[:, rows.start * H : rows.stop * H]

    def new_states(self, initial: Tensor | None) -> Tensor:
        """Memory for states after the last tokens `[N, H, K, V]`. Empty sequences keep their initial states."""
        num_sequences, batch_size, *shape = self.state_shape
        states = torch.empty(num_sequences * batch_size, *shape, dtype=self.dtype, device=self.device)
        for n, (start, end) in enumerate(pairwise(self.bounds)):
            if start == end:
                rows = slice(n * batch_size, (n + 1) * batch_size)
                states[rows] = 0 if initial is None else initial[rows]
        return states


class _Decay:
    """Multiplication by powers of λ, from one table of λ^0 .. λ^C: no exponent is ever above 0."""

    def __init__(self, tiles: _Tiles, log_decay: Tensor, scale: float):
        self.num_heads = log_decay.shape[0]
        position = torch.arange(tiles.chunk_size + 1, device=log_decay.device)
        powers = torch.exp(log_decay[:, None] * position)
        self.inside = powers[:, (position[:-1, None] - position[:-1]).clamp_min(0)].tril()
        self.powers = torch.cat([powers] * tiles.rows_at_once).unsqueeze(2)  # [B H, C + 1, 1]
        self.rising, self.falling = self.powers[:, 1:], self.powers[:, :-1].flip(1)
        if scale != 1:
            self.inside, self.rising = self.inside * scale, self.rising * scale

    def scores(self, q: Tensor, k: Tensor, chunk: _Chunk) -> Tensor:
        """`scale λ^(i-j) q_i k_j` for `j <= i` in the same sequence, else 0."""
        scores, size = torch.bmm(q, k.mT), q.shape[1]
        scores.unflatten(0, (-1, self.num_heads)).mul_(self.inside[:, :size, :size])
        return scores if chunk.is_apart is None else scores.masked_fill_(chunk.is_apart, 0)

    def read(self, x: Tensor) -> Tensor:
        """`scale λ^(i+1) x_i`: decay from the state before the tokens to token i."""
        return x * self.rising[: x.shape[0], : x.shape[1]]

    def write(self, x: Tensor) -> Tensor:
        """`λ^(m-1-j) x_j`: decay from token j to the state after m tokens."""
        return x * self.falling[: x.shape[0], self.falling.shape[1] - x.shape[1] :]

    def advance(self, state: Tensor | None, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        """`λ^m S + Σ_j k_j v_jᵀ` for m tokens of decayed keys, in new memory or in `out`, which may be S."""
        if state is None:
            return torch.bmm(k.mT, v, out=out)
        m = k.shape[1]
        return torch.mul(state, self.powers[: k.shape[0], m : m + 1], out=out).baddbmm_(k.mT, v)
