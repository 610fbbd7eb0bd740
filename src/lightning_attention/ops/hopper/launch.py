"""Plans of launches of the Hopper kernels."""

from functools import cache, partial
from typing import Any

import torch

from ..calls import Prepared
from ..gpu import scans
from ..gpu.plan import Operand, planned, strides
from ..gpu.scans import NO_SLOTS, WrittenSlots
from ..gpu.segments import Segments, ceil_div, num_multiprocessors
from ..gpu.slots import has_contiguous_states, plan_prefill_
from ..inputs import Metadata, SlotPrefillInputs
from ..problem import state_dtype
from ..triton import launch as portable
from ..triton import ring
from . import config, gradients, kernels, states


class Scans(scans.Scans):
    """Each program scans one segment of one head; for V of 128 it has two warpgroups, which share the inputs.

    Forward is one scan. Backward is a scan for dq, and a kernel for dk and dv that starts when all programs of the
    scan have: it uses what they leave idle.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.planner.needs_alignment = self.planner.needs_scratch = True  # TMA and its descriptors

    @staticmethod
    def can_read(x: Operand) -> bool:
        """True for strides of TMA: of 16 bytes, with a contiguous last dimension."""
        *outer, of_element = x.strides
        return of_element == 1 and outer[1] < 1 << 24 and all(stride > 0 and stride % 8 == 0 for stride in outer)

    @property
    def max_summed(self) -> int:
        return config.MAX_SUMMED

    def cut(self) -> Segments:
        return config.segments(
            self.T,
            self.mean_sequence_length,
            self.B * self.H,
            self.K,
            self.V,
            num_multiprocessors(self.planner.device),
            _bytes_per_second(self.planner.device),
            is_backward=self.is_backward,
        )

    @property
    def mean_sequence_length(self) -> int:
        return ceil_div(self.B * self.T, max(self.N, 1))

    @property
    def makes_prefix(self) -> bool:
        """True if the second of two segments makes the state before it, without a kernel for it."""
        return self.segments.count == 2

    def _interval_states(self) -> Operand | None:
        """States `[1, intervals, heads that are cut, K, V]` that segments start from, or None if none are needed."""
        if self.segments.count <= 2:
            return None
        states, factors = self._added_by_segments(self.x.k, self.x.v, reverse=False)
        if self.is_accumulated:
            self.accumulate(states, factors, self.segments, trigger_dependents=self._overlaps)
        return states

    def _added_by_segments(self, k: Operand, v: Operand, *, reverse: bool) -> tuple[Operand, Operand]:
        """Increments of the state by each segment but the last, and the factors on the states before them."""
        num_intervals, num_cut = self.segments.num_intervals, self.B * self.H - self.segments.num_uncut
        found = self.planner.empty(1, num_intervals, num_cut, self.K, self.V, dtype=state_dtype(self.dtype))
        factors = self.planner.empty(*found.shape[:3], dtype=found.dtype)
        self.planner.launch(
            states.interval_state_kernel,
            num_cut * num_intervals,
            self._options(self.V, overlap_previous=reverse),
            k=k,
            v=v,
            log_decay=self.x.log_decay,
            interval_states=found,
            factors=factors,
            cu_seqlens=self.x.cu_seqlens,
            **self._sizes,
            **strides(k=k, v=v),
            K=self.K,
            V=self.V,
            REVERSE=reverse,
            STAGES=config.STATE_STAGES[self.K, self.V],
        )
        return found, factors

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
        overlap_previous: bool = False,
        slots: WrittenSlots = NO_SLOTS,
    ) -> Operand:
        """The output of a scan, which fills `final_state`.

        Args:
            reverse: scan from the last token to the first; the state decays after a token reads it, not before.
            transposed: states are `[V, K]`; K of the scan is then V of the call.
            overlap_previous: start before the previous kernel has ended.
        """
        o = self.planner.empty(*v.shape, dtype=v.dtype)
        K, V = q.shape[3], v.shape[3]
        self.planner.launch(
            kernels.scan_kernel,
            self._num_programs,
            self._options(V, overlap_previous=overlap_previous or interval_states is not None),
            q=q,
            k=k,
            v=v,
            o=o,
            log_decay=self.x.log_decay,
            initial_state=initial_state,
            interval_states=interval_states,
            final_state=final_state,
            cu_seqlens=self.x.cu_seqlens,
            final_indices=slots.final,
            scale=self.scale_of(reverse=reverse),
            **self._sizes,
            max_reach=self.max_reach,
            **strides(q=q, k=k, v=v),
            stride_slot=slots.stride,
            K=K,
            V=V,
            REVERSE=reverse,
            TRANSPOSED_STATES=transposed,
            PREFIX=self.makes_prefix,
            OVERLAP_PREVIOUS=overlap_previous,
            STAGES=config.SCAN_STAGES[K, V],
        )
        return o

    def output(
        self,
        final_state: Operand | None,
        states: Operand | None = None,
        state_positions: Operand | None = None,
        slots: WrittenSlots = NO_SLOTS,
    ) -> Operand:
        assert state_positions is None, "the portable kernels store states at positions"
        q, k, v, _, initial_state, _ = self.x
        return self.scan(q, k, v, initial_state, self._interval_states(), final_state, slots=slots)

    def gradients(
        self, do: Operand, d_final_state: Operand | None, d_initial_state: Operand | None
    ) -> tuple[Operand, Operand, Operand]:
        q, k, v, _, initial_state, _ = self.x
        before, after = self._states_of_both_directions(do) if self.segments.count > 2 else (None, None)
        dq = self.scan(do, v, k, initial_state, before, transposed=True)
        if self.K == self.V:
            dk, dv = self._key_value_gradients(do, d_final_state, after, d_initial_state)
        else:
            in_reverse = partial(self.scan, reverse=True, overlap_previous=True)
            dk = in_reverse(v, do, q, d_final_state, after, transposed=True)
            dv = in_reverse(k, q, do, d_final_state, after, d_initial_state)
        return dq, dk, dv

    def _states_of_both_directions(self, do: Operand) -> tuple[Operand, Operand]:
        """Interval states for dq, and in reverse for dk and dv."""
        before, factors = self._added_by_segments(self.x.k, self.x.v, reverse=False)
        after, d_factors = self._added_by_segments(self.x.q, do, reverse=True)
        if self.is_accumulated:
            overlaps = self._overlaps
            self.accumulate(before, factors, self.segments, trigger_dependents=overlaps)
            self.accumulate(after, d_factors, self.segments, trigger_dependents=overlaps, overlap_previous=overlaps)
        return before, after

    def _key_value_gradients(
        self,
        do: Operand,
        d_final_state: Operand | None,
        interval_states: Operand | None,
        d_initial_state: Operand | None,
    ) -> tuple[Operand, Operand]:
        q, k, v = self.x[:3]
        dk, dv = self.planner.empty(*k.shape, dtype=k.dtype), self.planner.empty(*v.shape, dtype=v.dtype)
        self.planner.launch(
            gradients.gradient_kernel,
            self._num_programs,
            self._options(self.V, overlap_previous=True),
            q=q,
            k=k,
            v=v,
            do=do,
            dk=dk,
            dv=dv,
            log_decay=self.x.log_decay,
            d_final_state=d_final_state,
            interval_states=interval_states,
            d_initial_state=d_initial_state,
            cu_seqlens=self.x.cu_seqlens,
            scale=self.scale_of(reverse=True),
            **self._sizes,
            max_reach=self.max_reach,
            **strides(q=q, k=k, v=v, do=do),
            D=self.K,
            PREFIX=self.makes_prefix,
            STAGES=config.GRADIENT_STAGES[self.K],
        )
        return dk, dv

    @property
    def _num_programs(self) -> int:
        return self.segments.num_uncut + (self.B * self.H - self.segments.num_uncut) * self.segments.count

    @property
    def _sizes(self) -> dict[str, int]:
        sizes = {"B": self.B, "T": self.T, "H": self.H, "N": self.N}
        return sizes | {"segment_length": self.segments.length, "num_uncut": self.segments.num_uncut}

    @property
    def _overlaps(self) -> bool:
        """False where the kernels are emulated on a CPU."""
        return self.planner.device.type == "cuda"

    @staticmethod
    def _options(V: int, *, overlap_previous: bool) -> dict[str, Any]:
        return {"num_warps": 4, "maxnreg": config.MAX_REGISTERS[V], "launch_pdl": overlap_previous}


forward = partial(scans.forward, Scans)
backward = partial(scans.backward, Scans)


# The portable kernels, in the order of the scan here.
append = partial(ring.append, scale_keys=True)


def prefill_(x: SlotPrefillInputs[Metadata], scale: float) -> Prepared:
    if x.state_positions is not None or not has_contiguous_states(x.state):
        return portable.prefill_(x, scale)
    return planned(plan_prefill_, x, Scans, scale)


@cache
def _bytes_per_second(device: torch.device) -> float:
    """Bandwidth of a copy, reads and writes together, from the clock of the memory; an H200's if it is not known."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    kilohertz = getattr(properties, "memory_clock_rate", 0)
    return 0.86 * 2 * kilohertz * 1e3 * getattr(properties, "memory_bus_width", 0) / 8 or 4.2e12
