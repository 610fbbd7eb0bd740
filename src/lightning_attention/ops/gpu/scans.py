"""Forward and backward of sequences as scans over segments: the plans that both families of kernels share."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

from ..calls import Prepared
from ..inputs import AttentionInputs, GradientInputs, Metadata, PrefillInputs
from ..problem import state_dtype
from . import accumulate
from .plan import Operand, Planner, planned
from .segments import Segments, ceil_div, one_segment


class WrittenSlots(NamedTuple):
    """Slots of a pool that a scan writes states to, in place of tensors with one state after the other.

    Attributes:
        stride: elements from one slot to the next.
        final: indices `[N]` of the slots for the states after sequences; None is slots 0 to N - 1.
        saved: indices `[B, M]` of the slots for the states at positions.
    """

    stride: int | None = None
    final: Operand | None = None
    saved: Operand | None = None


NO_SLOTS = WrittenSlots()


class Scans(ABC):
    """Plans the launches of one call, which share sizes, decay, sequences and segments.

    Args:
        planner: collects the launches.
        x: operands of the call; the attribute has them as the kernels read them.
        scale: factor on every output.
        is_backward: plan the gradients, not the output.
        invariant: scan every sequence in one segment, whatever the number of programs.
    """

    def __init__(
        self,
        planner: Planner,
        x: AttentionInputs[Operand] | GradientInputs[Operand] | PrefillInputs[Operand],
        scale: float,
        *,
        is_backward: bool = False,
        invariant: bool = False,
    ):
        self.planner, self.precision, self.scale, self.is_backward = planner, planner.precision, scale, is_backward
        others = (planner.contiguous(y) for y in (x.log_decay, x.initial_state, x.cu_seqlens))
        self.x = AttentionInputs(*self.readable(planner, x.q, x.k, x.v), *others)
        self.dtype = x.q.dtype
        self.B, self.T, self.H, self.K = x.q.shape
        self.V = x.v.shape[3]
        self.N = self.B if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
        self.segments = one_segment(self.T) if invariant else self.cut()

    @staticmethod
    @abstractmethod
    def can_read(x: Operand) -> bool:
        """True if the kernels can read the strides of q, k, v or do; otherwise they are made contiguous."""

    @classmethod
    def readable(cls, planner: Planner, *inputs: Operand) -> list[Operand]:
        return [x if cls.can_read(x) else planner.contiguous(x) for x in inputs]

    @abstractmethod
    def cut(self) -> Segments:
        """Cut the batch rows."""

    @abstractmethod
    def output(
        self,
        final_state: Operand | None,
        states: Operand | None = None,
        state_positions: Operand | None = None,
        slots: WrittenSlots = NO_SLOTS,
    ) -> Operand:
        """The output; fills `final_state`, and `states` after `state_positions` tokens, or slots of them."""

    @abstractmethod
    def gradients(
        self, do: Operand, d_final_state: Operand | None, d_initial_state: Operand | None
    ) -> tuple[Operand, Operand, Operand]:
        """`dq`, `dk` and `dv`; fills `d_initial_state`.

        They are three scans: `do, v, k` for dq, from transposed states; in reverse `v, do, q` for dk and `k, q, do`
        for dv.
        """

    @property
    @abstractmethod
    def max_summed(self) -> int:
        """Interval states that a program sums by itself; more are accumulated by a kernel."""

    @property
    def is_accumulated(self) -> bool:
        """True if an interval state holds everything before it, False if programs sum what intervals add."""
        return self.segments.num_intervals > self.max_summed

    @property
    def max_reach(self) -> int:
        """Tokens before a segment whose interval states its program sums, at most."""
        return self.segments.interval if self.is_accumulated else self.T

    def scale_of(self, *, reverse: bool) -> float:
        """The scale of a scan; in reverse the state is kept divided by it, so it must not be 0."""
        return self.scale or 1e-30 if reverse else self.scale

    def empty_states(self, *sizes: int) -> Operand:
        """A buffer `[*sizes, H, K, V]`."""
        return self.planner.empty(*sizes, self.H, self.K, self.V, dtype=state_dtype(self.dtype))

    def accumulate(
        self,
        states: Operand,
        factors: Operand,
        segments: Segments,
        *,
        trigger_dependents: bool = False,
        overlap_previous: bool = False,
    ) -> None:
        """Turn what each interval adds into the state after it, in place; see `accumulate_kernel`."""
        B, _, H, *_ = states.shape
        size = self.K * self.V
        self.planner.launch(
            accumulate.accumulate_kernel,
            B * H * ceil_div(size, accumulate.BLOCK),
            {"num_warps": accumulate.NUM_WARPS} | ({"launch_pdl": True} if overlap_previous else {}),
            interval_states=states,
            factors=factors,
            log_decay=self.x.log_decay,
            H=H,
            first_head=segments.num_uncut,
            num_heads=self.H,
            num_intervals=segments.num_intervals,
            interval=segments.interval,
            SIZE=size,
            BLOCK=accumulate.BLOCK,
            IN_FLOAT32=self.dtype == torch.float32,
            NUM_STAGES=accumulate.NUM_STAGES,
            TRIGGER_DEPENDENTS=trigger_dependents,
            OVERLAP_PREVIOUS=overlap_previous,
        )


def forward(
    scans: type[Scans], x: AttentionInputs[Metadata], scale: float, output_final_state: bool, invariant: bool = False
) -> Prepared:
    """`forward` of the backend whose scans are given."""
    return planned(_plan_forward, x, scans, scale, output_final_state, invariant)


def _plan_forward(
    planner: Planner,
    x: AttentionInputs[Operand],
    scans: type[Scans],
    scale: float,
    output_final_state: bool,
    invariant: bool,
) -> tuple[Operand | None, ...]:
    call = scans(planner, x, scale, invariant=invariant)
    final_state = call.empty_states(call.N) if output_final_state else None
    return call.output(final_state), final_state


def backward(scans: type[Scans], x: GradientInputs[Metadata], scale: float, invariant: bool = False) -> Prepared:
    """`backward` of the backend whose scans are given."""
    return planned(_plan_backward, x, scans, scale, invariant)


def _plan_backward(
    planner: Planner, x: GradientInputs[Operand], scans: type[Scans], scale: float, invariant: bool
) -> tuple[Operand | None, ...]:
    call = scans(planner, x, scale, is_backward=True, invariant=invariant)
    (do,) = scans.readable(planner, x.do)
    d_initial_state = None if call.x.initial_state is None else call.empty_states(call.N)
    gradients = call.gradients(do, planner.contiguous(x.d_final_state), d_initial_state)
    return *gradients, d_initial_state
