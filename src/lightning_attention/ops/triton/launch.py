"""Sequences in the Triton backend: plans of launches."""

from functools import partial

import torch

from ..calls import Prepared, call
from ..gpu import scans
from ..gpu.plan import Operand, Planner, planned, strides
from ..gpu.scans import NO_SLOTS, WrittenSlots
from ..gpu.segments import Segments, ceil_div, num_multiprocessors
from ..gpu.slots import has_contiguous_states, plan_prefill_
from ..inputs import AttentionInputs, Metadata, PrefillInputs, ReadInputs, SlotPrefillInputs, WriteInputs
from ..prefill import prefill_copies
from . import config, kernels
from .config import Tiles


class Scans(scans.Scans):
    """Each program scans one segment of one head, for BV columns of the values."""

    _interval_buffers: tuple[Operand, Operand] | None = None

    @staticmethod
    def can_read(x: Operand) -> bool:
        """True with a contiguous last dimension, if offsets inside a chunk fit 32 bits."""
        return x.strides[-1] == 1 and x.token_strides[1] < 1 << 24

    @property
    def max_summed(self) -> int:
        return config.MAX_SUMMED

    @property
    def scan_tiles(self) -> Tiles:
        return config.scan_tiles(self.K, self.V, self.dtype, self.precision)

    @property
    def interval_tiles(self) -> Tiles:
        return config.interval_tiles(self.K, self.V, self.dtype, self.precision)

    def cut(self) -> Segments:
        return config.segments(*self._occupancy(self.scan_tiles))

    def interval_states(self, k: Operand, v: Operand, *, reverse: bool = False) -> Operand | None:
        """States `[B, intervals, H, K, V]` that segments start from, or None if none are needed."""
        if self.segments.count == 1:
            return None
        states, factors = self._added_by_intervals(k, v, self.segments, reverse=reverse)
        if self.is_accumulated:
            self.accumulate(states, factors, self.segments)
        return states

    def state_after(self, reverse: bool) -> Operand:
        """Interval states `[B, intervals, H, K, V]`, of which the last is the state after all tokens."""
        segments = config.all_intervals(*self._occupancy(self.interval_tiles))
        states, factors = self._added_by_intervals(self.x.k, self.x.v, segments, reverse=reverse)
        self.accumulate(states, factors, segments)
        return states

    def _added_by_intervals(
        self, k: Operand, v: Operand, segments: Segments, *, reverse: bool
    ) -> tuple[Operand, Operand]:
        """Increments of the state by each interval, and the factors `[B, intervals, H]` on the states before them.

        Both directions use the same memory: the states of one are read before those of the other are made.
        """
        if self._interval_buffers is None:
            states = self.empty_states(self.B, segments.num_intervals)
            self._interval_buffers = states, self.planner.empty(*states.shape[:3], dtype=states.dtype)
        states, factors = self._interval_buffers
        tiles = self.interval_tiles
        self.planner.launch(
            kernels.interval_state_kernel,
            self._programs(self.V, tiles) * segments.num_intervals,
            {"num_warps": tiles.num_warps},
            k=k,
            v=v,
            log_decay=self.x.log_decay,
            interval_states=states,
            factors=factors,
            cu_seqlens=self.x.cu_seqlens,
            T=self.T,
            H=self.H,
            N=self.N,
            segment_length=segments.length,
            interval=segments.interval,
            num_intervals=segments.num_intervals,
            **strides(k=k, v=v),
            **_constants(tiles, self.K, self.V),
            REVERSE=reverse,
            PRECISION=self.precision,
        )
        return states, factors

    def scan(
        self,
        q: Operand,
        k: Operand,
        v: Operand,
        initial_state: Operand | None,
        interval_states: Operand | None,
        final_state: Operand | None = None,
        *,
        reverse: bool = False,
        transposed: bool = False,
        states: Operand | None = None,
        state_positions: Operand | None = None,
        slots: WrittenSlots = NO_SLOTS,
    ) -> Operand:
        """The output of a scan, which fills `final_state`, and `states` after `state_positions` tokens each.

        Args:
            reverse: scan from the last token to the first; the state decays after a token reads it, not before.
            transposed: states are `[V, K]`; K of the scan is then V of the call.
        """
        o = self.planner.empty(*v.shape, dtype=v.dtype)
        K, V = q.shape[3], v.shape[3]
        tiles = config.scan_tiles(K, V, self.dtype, self.precision)
        self.planner.launch(
            kernels.scan_kernel,
            self._programs(V, tiles) * self.segments.count,
            {"num_warps": tiles.num_warps},
            q=q,
            k=k,
            v=v,
            o=o,
            log_decay=self.x.log_decay,
            initial_state=initial_state,
            interval_states=interval_states,
            final_state=final_state,
            states=states,
            state_positions=state_positions,
            cu_seqlens=self.x.cu_seqlens,
            final_indices=slots.final,
            saved_indices=slots.saved,
            scale=self.scale_of(reverse=reverse),
            T=self.T,
            H=self.H,
            N=self.N,
            M=0 if state_positions is None else state_positions.shape[0],
            segment_length=self.segments.length,
            interval=self.segments.interval,
            max_reach=self.max_reach,
            **strides(q=q, k=k, v=v),
            stride_slot=slots.stride,
            **_constants(tiles, K, V),
            REVERSE=reverse,
            TRANSPOSED_STATES=transposed,
            PRECISION=self.precision,
        )
        return o

    def output(
        self,
        final_state: Operand | None,
        states: Operand | None = None,
        state_positions: Operand | None = None,
        slots: WrittenSlots = NO_SLOTS,
    ) -> Operand:
        q, k, v, _, initial_state, _ = self.x
        before = self.interval_states(k, v)
        parts = {"states": states, "state_positions": state_positions} if state_positions is not None else {}
        return self.scan(q, k, v, initial_state, before, final_state, slots=slots, **parts)

    def gradients(
        self, do: Operand, d_final_state: Operand | None, d_initial_state: Operand | None
    ) -> tuple[Operand, Operand, Operand]:
        q, k, v, _, initial_state, _ = self.x
        dq = self.scan(do, v, k, initial_state, self.interval_states(k, v), transposed=True)
        states = self.interval_states(q, do, reverse=True)
        dk = self.scan(v, do, q, d_final_state, states, reverse=True, transposed=True)
        dv = self.scan(k, q, do, d_final_state, states, d_initial_state, reverse=True)
        return dq, dk, dv

    def _occupancy(self, tiles: Tiles) -> tuple[int, int, int, int, int]:
        """Arguments of `config.segments`."""
        min_interval = config.min_interval(self.K, self.V, self.dtype)
        multiprocessors = num_multiprocessors(self.planner.device)
        return self.T, self._programs(self.V, tiles), multiprocessors, tiles.programs_per_sm, min_interval

    def _programs(self, V: int, tiles: Tiles) -> int:
        return ceil_div(V, tiles.BV) * self.H * self.B


forward = partial(scans.forward, Scans)
backward = partial(scans.backward, Scans)


def prefill(x: PrefillInputs[Metadata], scale: float) -> Prepared:
    return planned(_plan_prefill, x, scale)


def _plan_prefill(planner: Planner, x: PrefillInputs[Operand], scale: float) -> tuple[Operand, ...]:
    scans = Scans(planner, x, scale)
    state_positions = planner.contiguous(x.state_positions)
    final_state, states = scans.empty_states(scans.N), scans.empty_states(scans.B, state_positions.shape[0])
    return scans.output(final_state, states, state_positions), final_state, states


def prefill_(x: SlotPrefillInputs[Metadata], scale: float) -> Prepared:
    if has_contiguous_states(x.state):
        return planned(plan_prefill_, x, Scans, scale)
    return lambda x: prefill_copies(partial(call, forward), partial(call, prefill), x, scale)


def write_state(x: WriteInputs[Metadata], reverse: bool) -> Prepared:
    run = planned(_plan_write_state, x, reverse)
    return lambda x: [states[:, -1].clone(memory_format=torch.contiguous_format) for states in run(x)]


def _plan_write_state(planner: Planner, x: WriteInputs[Operand], reverse: bool) -> tuple[Operand]:
    k, v, log_decay = x
    return (Scans(planner, AttentionInputs(k, k, v, log_decay, None, None), 1.0).state_after(reverse),)


def read_state_(x: ReadInputs[Metadata], reverse: bool, add: bool) -> Prepared:
    return planned(_plan_read_state, x, reverse, add)


def _plan_read_state(planner: Planner, x: ReadInputs[Operand], reverse: bool, add: bool) -> tuple[()]:
    o, q, state, log_decay = x
    assert Scans.can_read(o), "it is written in place"
    (q,) = Scans.readable(planner, q)
    (B, T, H, K), V = q.shape, o.shape[3]
    tiles = config.interval_tiles(K, V, q.dtype, planner.precision)
    planner.launch(
        kernels.read_kernel,
        ceil_div(V, tiles.BV) * H * B * ceil_div(T, config.TOKENS_PER_READ),
        {"num_warps": tiles.num_warps},
        q=q,
        o=o,
        log_decay=planner.contiguous(log_decay),
        state=planner.contiguous(state),
        T=T,
        H=H,
        tokens_per_program=config.TOKENS_PER_READ,
        **strides(q=q, o=o),
        **_constants(tiles, K, V),
        REVERSE=reverse,
        ADD=add,
        PRECISION=planner.precision,
    )
    return ()


def _constants(tiles: Tiles, K: int, V: int) -> dict[str, int]:
    return {"K": K, "V": V, "C": tiles.C, "BK": tiles.BK, "BV": tiles.BV, "NUM_STAGES": tiles.num_stages}
