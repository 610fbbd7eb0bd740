"""From tensors to launches. What a tensor must look like is checked in `problem.py`; here results are made."""

from collections.abc import Callable
from functools import cache, lru_cache, reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from ..problem import check_log_decay, sequence_bounds, state_dtype
from . import config, decoding, kernels, product_precision
from .config import MAX_TREE, Segments, Tiles, ceil_div
from .replay import note


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    *,
    scans: "type[Scans] | None" = None,
) -> tuple[Tensor, Tensor | None]:
    with torch.accelerator.device_index(q.device.index):
        call = (scans or Scans)(q, v, log_decay, cu_seqlens, scale)
        q, k, v = _rows(q), _rows(k), _rows(v)
        final_state = call.new_states(call.N) if output_final_state else None
        o = call.scan(q, k, v, _contiguous(initial_state), call.interval_states(k, v), final_state)
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
    with torch.accelerator.device_index(q.device.index):
        call = Scans(q, v, log_decay, cu_seqlens, scale)
        q, k, v = _rows(q), _rows(k), _rows(v)
        final_state, states = call.new_states(call.N), call.new_states(call.B, state_positions.shape[0])
        kept = states, state_positions.contiguous()
        o = call.scan(q, k, v, _contiguous(initial_state), call.interval_states(k, v), final_state, kept)
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
    *,
    scans: "type[Scans] | None" = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    with torch.accelerator.device_index(q.device.index):
        call = (scans or Scans)(q, v, log_decay, cu_seqlens, scale)
        q, k, v, do = _rows(q), _rows(k), _rows(v), _rows(do)
        initial_state, d_final_state = _contiguous(initial_state), _contiguous(d_final_state)
        d_initial_state = None if initial_state is None else call.new_states(call.N)
        return *call.gradients(q, k, v, do, initial_state, d_final_state, d_initial_state), d_initial_state


def write_state(k: Tensor, v: Tensor, log_decay: Tensor, *, reverse: bool) -> Tensor:
    """`Σ_i λ^(T-1-i) k_i v_iᵀ`, the state `[B, H, K, V]` after a row; in reverse `Σ_i λ^(i+1) k_i v_iᵀ`."""
    with torch.accelerator.device_index(k.device.index):
        return Scans(k, v, log_decay, None, 1.0).state_after(_rows(k), _rows(v), log_decay, reverse=reverse)


def read_state_(o: Tensor, q: Tensor, state: Tensor, log_decay: Tensor, *, reverse: bool, add: bool) -> None:
    """`o_i = λ^(i+1) q_i S`, or that more, for `[B, T, H, V]`; in reverse `λ^(T-1-i) q_i S`."""
    (B, T, H, K), V = q.shape, o.shape[3]
    assert o is _rows(o)
    precision = product_precision(q.dtype)
    tiles = config.interval_tiles(K, V, q.dtype, precision)
    if programs := ceil_div(V, tiles.BV) * H * B * ceil_div(T, config.PIECE_LENGTH):
        with torch.accelerator.device_index(q.device.index):
            q = _rows(q)
            launch(
                kernels.read_kernel,
                programs,
                (q, o, _contiguous(log_decay), _contiguous(state)),
                (T, H, config.PIECE_LENGTH),
                (*q.stride()[:3], *o.stride()[:3]),
                (K, V, tiles.C, tiles.BK, tiles.BV, reverse, add, precision, tiles.num_stages),
                tiles.num_warps,
            )


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
        with torch.accelerator.device_index(q.device.index):
            launch(
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
    k, v = _rows(k), _rows(v)
    q = k if q is None else _rows(q)
    log_decay, last, parents, state_indices = map(_contiguous, (log_decay, last, parents, state_indices))
    if v.numel():
        (B, T, H, K), V = k.shape, v.shape[3]
        BK, BV = config.step_tiles(K, V)
        with torch.accelerator.device_index(k.device.index):
            launch(
                decoding.step_kernel,
                ceil_div(V, BV) * H * B,
                (q, k, v, o, log_decay, state, last, parents, state_indices),
                (scale, T, H),
                (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *state.stride()[:3]),
                (state.stride(3), K, V, BK, BV),
                num_warps=4,
            )


class Scans:
    """The launches of one call, which share its sizes, decay, sequences and segments."""

    def __init__(self, q: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, scale: float):
        check_log_decay(log_decay)
        self.B, self.T, self.H, self.K = q.shape
        self.V = v.shape[3]
        self.N = self.B
        if cu_seqlens is not None:
            self.N = cu_seqlens.shape[0] - 1
            if cu_seqlens.is_cpu:
                sequence_bounds(cu_seqlens, self.T)
        self.scale, self.log_decay, self.cu_seqlens = scale, _contiguous(log_decay), _contiguous(cu_seqlens)
        self.dtype, self.device = q.dtype, q.device
        self.precision = product_precision(q.dtype)
        self.segments = self.cut()
        # Whether states of intervals hold all before them, or whoever starts from them has to sum them.
        self.is_accumulated = self.segments.num_intervals > config.MAX_SUMMED
        self._of_intervals: tuple[Tensor, Tensor] | None = None

    def cut(self) -> Segments:
        """Of a row."""
        return self._cut(config.segments, config.scan_tiles(self.K, self.V, self.dtype, self.precision))

    def scale_of(self, reverse: bool) -> float:
        """In reverse the state is kept divided by scale."""
        return self.scale or 1e-30 if reverse else self.scale

    def new_states(self, *sizes: int) -> Tensor:
        """`[*sizes, H, K, V]`."""
        return torch.empty(*sizes, self.H, self.K, self.V, dtype=state_dtype(self.dtype), device=self.device)

    def interval_states(self, k: Tensor, v: Tensor, *, reverse: bool = False) -> Tensor | None:
        """`[B, intervals, H, K, V]`, or None where there is one segment, which needs none."""
        if self.segments.count == 1:
            return None
        states, factors = self._states_of(self.segments, k, v, reverse=reverse)
        if self.is_accumulated:
            self._accumulate(self.segments, states, factors)
        return states

    def state_after(self, k: Tensor, v: Tensor, log_decay: Tensor, *, reverse: bool) -> Tensor:
        """`[B, H, K, V]`, of a row that starts from zero."""
        row = self._cut(config.whole_row, config.interval_tiles(self.K, self.V, self.dtype, self.precision))
        states, factors = self._states_of(row, k, v, reverse=reverse)
        self._accumulate(row, states, factors)
        return states[:, -1].clone(memory_format=torch.contiguous_format)

    def _states_of(self, segments: Segments, k: Tensor, v: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """What every interval adds to the state, and factors `[B, intervals, H]` for the state before it.

        They last until they are asked for again, for the other direction, which takes their place.
        """
        if self._of_intervals is None:
            states = self.new_states(self.B, segments.num_intervals)
            self._of_intervals = states, states.new_empty(states.shape[:3])
        states, factors = self._of_intervals
        tiles = config.interval_tiles(self.K, self.V, self.dtype, self.precision)
        if programs := self._programs(self.V, tiles) * segments.num_intervals:
            launch(
                kernels.interval_state_kernel,
                programs,
                (k, v, self.log_decay, states, factors, self.cu_seqlens),
                (self.T, self.H, self.N, segments.length, segments.interval, segments.num_intervals),
                (*k.stride()[:3], *v.stride()[:3]),
                (self.K, self.V, tiles.C, tiles.BK, tiles.BV, reverse, self.precision, tiles.num_stages),
                tiles.num_warps,
            )
        return states, factors

    def _accumulate(
        self, segments: Segments, states: Tensor, factors: Tensor, *, early: bool = False, beside: bool = False
    ) -> None:
        """In place. On Hopper `early` lets the next launch begin, and `beside` begins before the last has ended."""
        B, num_intervals, H, K, V = states.shape
        block, num_warps, num_stages = config.ACCUMULATED
        if programs := B * H * ceil_div(K * V, block):
            launch(
                kernels.accumulate_kernel,
                programs,
                (states, factors, self.log_decay),
                (H, num_intervals, segments.interval),
                (),
                (K * V, block, self.dtype == torch.float32, num_stages, early, beside),
                num_warps,
                **{"launch_pdl": True} if beside else {},
            )

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
        states, state_positions = kept or (None, None)
        results = interval_states, final_state, states, state_positions
        M = 0 if state_positions is None else state_positions.shape[0]
        segments, summed = self.segments, self.segments.interval if self.is_accumulated else self.T
        K, V = q.shape[3], v.shape[3]
        tiles = config.scan_tiles(K, V, self.dtype, self.precision)
        if programs := self._programs(V, tiles) * self.segments.count:
            launch(
                kernels.scan_kernel,
                programs,
                (q, k, v, o, self.log_decay, initial_state, *results, self.cu_seqlens),
                (self.scale_of(reverse), self.T, self.H, self.N, M, segments.length, segments.interval, summed),
                (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
                (K, V, tiles.C, tiles.BK, tiles.BV, reverse, transposed, self.precision, tiles.num_stages),
                tiles.num_warps,
            )
        return o

    def gradients(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        do: Tensor,
        initial_state: Tensor | None,
        d_final_state: Tensor | None,
        d_initial_state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`dq`, `dk` and `dv`; `d_initial_state` is filled.

        Three scans: `do, v, k` for dq, from transposed states; in reverse `v, do, q` for dk and `k, q, do` for dv.
        """
        dq = self.scan(do, v, k, initial_state, self.interval_states(k, v), transposed=True)
        states = self.interval_states(q, do, reverse=True)
        dk = self.scan(v, do, q, d_final_state, states, reverse=True, transposed=True)
        dv = self.scan(k, q, do, d_final_state, states, d_initial_state, reverse=True)
        return dq, dk, dv

    def _cut(self, how: Callable[[int, int, int, int, int], Segments], tiles: Tiles) -> Segments:
        return how(
            self.T,
            self._programs(self.V, tiles),
            num_multiprocessors(self.device),
            tiles.programs_per_sm,
            config.min_interval(self.K, self.V, self.dtype),
        )

    def _programs(self, V: int, tiles: Tiles) -> int:
        return ceil_div(V, tiles.BV) * self.H * self.B


_compiled: dict[tuple, Any] = {}


def launch(
    kernel: Any,
    programs: int,
    tensors: tuple[Any, ...],
    numbers: tuple[float, ...],
    strides: tuple[int, ...],
    constants: tuple[int | str, ...],
    num_warps: int,
    **options: Any,
) -> None:
    """`kernel[(programs,)](...)`, with its arguments in this order; options may depend on constants alone.

    Triton finds out anew at every call how its arguments are aligned, in 15 µs. What is aligned to 16, as all usual
    tensors are, is looked up here by what else the compiled code depends on; anything else goes the long way.
    """
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    is_usual = reduce(or_, filter(None, pointers), 0) % 16 == 0 and _are_usual(strides)
    key = id(kernel), tensors[0].device, tuple([None if x is None else x.dtype for x in tensors]), constants
    rest = *numbers, *strides, *constants
    run = None
    if is_usual and (compiled := _compiled.get(key)):
        # Of a number the launcher need not find out whether it is the address of something on the device.
        run = compiled[(programs, 1, 1)]
        run(*pointers, *rest)
    else:
        compiled = kernel[(programs,)](*tensors, *rest, num_warps=num_warps, **options)
        if is_usual and compiled is not None:  # the interpreter compiles nothing
            _compiled[key] = compiled
            run = compiled[(programs, 1, 1)]
    note(run, tensors, *rest)


@lru_cache(4096)
def _are_usual(strides: tuple[int, ...]) -> bool:
    return reduce(or_, strides, 0) % 16 == 0 and max(strides, default=0) < 1 << 31


def _rows(x: Tensor) -> Tensor:
    """As the kernels read it: a contiguous last dimension, and 32 bits for an offset inside a chunk."""
    _, of_token, _, of_element = x.stride()
    return x if of_element == 1 and of_token < 1 << 24 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
