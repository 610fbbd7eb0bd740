"""From tensors to launches. What a tensor must look like is checked in `problem.py`; here results are made."""

from functools import cache, reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from ..problem import check_log_decay, sequence_bounds, state_dtype
from . import config, decoding, kernels
from .config import MAX_TREE, Tiles, ceil_div


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    with torch.cuda.device_of(q):
        scans = _Scans(q, v, log_decay, cu_seqlens, scale)
        q, k, v = _rows(q), _rows(k), _rows(v)
        final_state = scans.new_states(scans.N) if output_final_state else None
        o = scans.scan(q, k, v, initial_state, scans.interval_states(k, v), final_state)
        return o, final_state


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    state_positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(q):
        scans = _Scans(q, v, log_decay, cu_seqlens, scale)
        q, k, v = _rows(q), _rows(k), _rows(v)
        final_state, states = scans.new_states(scans.N), scans.new_states(scans.B, state_positions.shape[0])
        kept = states, state_positions.contiguous()
        o = scans.scan(q, k, v, initial_state, scans.interval_states(k, v), final_state, kept)
        return o, final_state, states


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    d_final_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Three scans: `do, v, k` for dq, from transposed states; in reverse `v, do, q` for dk and `k, q, do` for dv."""
    with torch.cuda.device_of(q):
        scans = _Scans(q, v, log_decay, cu_seqlens, scale)
        q, k, v, do = _rows(q), _rows(k), _rows(v), _rows(do)
        d_initial_state = None if initial_state is None else scans.new_states(scans.N)
        states = scans.interval_states(k, v)
        dq = scans.scan(do, v, k, initial_state, states, transposed=True)
        states = scans.interval_states(q, do, reverse=True)
        dk = scans.scan(v, do, q, d_final_state, states, reverse=True, transposed=True)
        dv = scans.scan(k, q, do, d_final_state, states, d_initial_state, reverse=True)
        return dq, dk, dv, d_initial_state


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    scale: float,
) -> Tensor:
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    _step(q, k, v, o, log_decay, state, None, None, state_indices, scale)
    return o


def commit(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    last: Tensor,
    parents: Tensor | None,
    state_indices: Tensor | None,
) -> None:
    _step(None, k, v, None, log_decay, state, last, parents, state_indices, 1.0)


def verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    parents: Tensor | None,
    state_indices: Tensor | None,
    scale: float,
) -> Tensor:
    (B, T, H, K), V = q.shape, v.shape[3]
    if T > MAX_TREE:  # a chain
        states = (state if state_indices is None else state[state_indices.clamp_min(0)]).float()
        o, _ = forward(q, k, v, log_decay, states, None, scale, False)
        return o if state_indices is None else o.masked_fill_((state_indices < 0)[:, None, None, None], 0)
    q, k, v = _rows(q), _rows(k), _rows(v)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    if o.numel():
        C, BK, BV, num_warps = config.verify_tiles(K, V, T)
        with torch.cuda.device_of(q):
            _launch(
                decoding.verify_kernel,
                ceil_div(V, BV) * H * B,
                (q, k, v, o, _contiguous(log_decay), state, _contiguous(parents), _contiguous(state_indices)),
                (scale, T, H),
                (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *state.stride()[:3]),
                (state.stride(3), K, V, C, BK, BV),
                num_warps,
            )
    return o


def _step(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    o: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    last: Tensor | None,
    parents: Tensor | None,
    state_indices: Tensor | None,
    scale: float,
) -> None:
    (B, T, H, K), V = k.shape, v.shape[3]
    k, v = _rows(k), _rows(v)
    q = k if q is None else _rows(q)
    if B * T * V:
        BK, BV = config.step_tiles(K, V)
        with torch.cuda.device_of(k):
            _launch(
                decoding.step_kernel,
                ceil_div(V, BV) * H * B,
                (q, k, v, o, _contiguous(log_decay), state, *map(_contiguous, (last, parents, state_indices))),
                (scale, T, H),
                (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *state.stride()[:3]),
                (state.stride(3), K, V, BK, BV),
                num_warps=4,
            )


class _Scans:
    """The launches of one call, which share its sizes, decay, sequences and segments."""

    def __init__(self, q: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, scale: float):
        check_log_decay(log_decay)
        self.B, self.T, self.H, self.K = q.shape
        self.V = v.shape[3]
        self.N = self.B
        if cu_seqlens is not None:
            self.N = cu_seqlens.shape[0] - 1
            if cu_seqlens.device.type == "cpu":
                sequence_bounds(cu_seqlens, self.T)
        self.scale, self.log_decay, self.cu_seqlens = scale, _contiguous(log_decay), _contiguous(cu_seqlens)
        self.dtype, self.device = q.dtype, q.device
        self.precision = _precision(q.dtype)
        tiles = config.scan_tiles(self.K, self.V, self.dtype, self.precision)
        self.segments = config.segments(
            self.T,
            self._programs(self.V, tiles),
            _num_multiprocessors(q.device),
            tiles.programs_per_sm,
            config.min_interval(self.K, self.V, self.dtype),
        )

    def new_states(self, *sizes: int) -> Tensor:
        """`[*sizes, H, K, V]`."""
        return torch.empty(*sizes, self.H, self.K, self.V, dtype=state_dtype(self.dtype), device=self.device)

    def interval_states(self, k: Tensor, v: Tensor, *, reverse: bool = False) -> Tensor | None:
        """`[B, intervals, H, K, V]`, or None where there is one segment, which needs none."""
        if self.segments.count == 1:
            return None
        states = self.new_states(self.B, self.segments.num_intervals)
        tiles = config.interval_tiles(self.K, self.V, self.dtype, self.precision)
        _launch(
            kernels.interval_state_kernel,
            self._programs(self.V, tiles) * self.segments.num_intervals,
            (k, v, self.log_decay, states, self.cu_seqlens),
            (self.T, self.H, self.N, self.segments.length, self.segments.interval),
            (*k.stride()[:3], *v.stride()[:3]),
            (self.K, self.V, tiles.C, tiles.BK, tiles.BV, reverse, self.precision, tiles.num_stages),
            tiles.num_warps,
        )
        return states

    def scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        initial_state: Tensor | None,
        interval_states: Tensor | None,
        final_state: Tensor | None = None,
        kept: tuple[Tensor, Tensor] | None = None,
        *,
        reverse: bool = False,
        transposed: bool = False,
    ) -> Tensor:
        """The output; `final_state` and the states to be `kept`, given with their positions, are filled.

        A transposed scan has the V of the call for its K, also in states.
        """
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        # In reverse the state is kept divided by scale.
        scale = self.scale or 1e-30 if reverse else self.scale
        states, state_positions = kept or (None, None)
        results = interval_states, final_state, states, state_positions
        M = 0 if state_positions is None else state_positions.shape[0]
        K, V = q.shape[3], v.shape[3]
        tiles = config.scan_tiles(K, V, self.dtype, self.precision)
        if programs := self._programs(V, tiles) * self.segments.count:
            _launch(
                kernels.scan_kernel,
                programs,
                (q, k, v, o, self.log_decay, _contiguous(initial_state), *results, self.cu_seqlens),
                (scale, self.T, self.H, self.N, M, self.segments.length, self.segments.interval),
                (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
                (K, V, tiles.C, tiles.BK, tiles.BV, reverse, transposed, self.precision, tiles.num_stages),
                tiles.num_warps,
            )
        return o

    def _programs(self, V: int, tiles: Tiles) -> int:
        return ceil_div(V, tiles.BV) * self.H * self.B


_compiled: dict[tuple, Any] = {}


def _launch(
    kernel: Any,
    programs: int,
    tensors: tuple[Any, ...],
    numbers: tuple[float, ...],
    strides: tuple[int, ...],
    constants: tuple[int | str, ...],
    num_warps: int,
) -> None:
    """`kernel[(programs,)](...)`, with its arguments in this order.

    Triton finds out anew at every call how its arguments are aligned, in 15 µs. What is aligned to 16, as all usual
    tensors are, is looked up here by what else the compiled code depends on; anything else goes the long way.
    """
    pointers = reduce(or_, [x.data_ptr() for x in tensors if x is not None])
    arguments = (*tensors, *numbers, *strides, *constants)
    is_usual = pointers % 16 == 0 and reduce(or_, strides) % 16 == 0 and max(strides) < 1 << 31
    dtypes = tuple([None if x is None else x.dtype for x in tensors])
    key = id(kernel), tensors[0].device, dtypes, constants
    if is_usual and (compiled := _compiled.get(key)):
        compiled[(programs, 1, 1)](*arguments)
        return
    compiled = kernel[(programs,)](*arguments, num_warps=num_warps)
    if is_usual and compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled


def _rows(x: Tensor) -> Tensor:
    """As the kernels read it: a contiguous last dimension, and 32 bits for an offset inside a chunk."""
    return x if x.stride(3) == 1 and x.stride(1) < 1 << 24 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _precision(dtype: torch.dtype) -> str:
    """Of products of float32, as PyTorch's own."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
