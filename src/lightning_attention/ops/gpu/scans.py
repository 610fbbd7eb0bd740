"""Forward and backward of sequences as scans over segments: the plans that both families of kernels share."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..problem import state_dtype
from . import accumulate, product_precision
from .plan import Operand, Planner, run
from .segments import Segments, ceil_div


class Scans(ABC):
    """Plans the launches of one call, which share sizes, decay, sequences and segments.

    Args:
        planner: collects the launches.
        q, v, log_decay, cu_seqlens: operands of the call.
        precision: "ieee" or "tf32", of products of float32.
        scale: factor on every output.
        is_backward: plan the gradients, not the output.
    """

    def __init__(
        self,
        planner: Planner,
        q: Operand,
        v: Operand,
        log_decay: Operand | None,
        cu_seqlens: Operand | None,
        precision: str,
        scale: float,
        *,
        is_backward: bool = False,
    ):
        self.planner = planner
        self.log_decay, self.cu_seqlens = planner.contiguous(log_decay), planner.contiguous(cu_seqlens)
        self.precision, self.scale, self.dtype = precision, scale, q.dtype
        self.is_backward = is_backward
        self.B, self.T, self.H, self.K = q.shape
        self.V = v.shape[3]
        self.N = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.segments = self.cut()

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
    def interval_states(self, k: Operand, v: Operand, *, reverse: bool = False) -> Operand | None:
        """States `[B, intervals, H, K, V]` that segments start from, or None if none are needed."""

    @abstractmethod
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
    ) -> Operand:
        """The output of a scan, which fills `final_state`.

        Args:
            reverse: scan from the last token to the first; the state decays after a token reads it, not before.
            transposed: states are `[V, K]`; K of the scan is then V of the call.
        """

    @abstractmethod
    def gradients(
        self,
        q: Operand,
        k: Operand,
        v: Operand,
        do: Operand,
        initial_state: Operand | None,
        d_final_state: Operand | None,
        d_initial_state: Operand | None,
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
        size = self.K * self.V
        self.planner.launch(
            accumulate.accumulate_kernel,
            self.B * self.H * ceil_div(size, accumulate.BLOCK),
            {"num_warps": accumulate.NUM_WARPS} | ({"launch_pdl": True} if overlap_previous else {}),
            interval_states=states,
            factors=factors,
            log_decay=self.log_decay,
            H=self.H,
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
    scans: type[Scans],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """`forward` of the backend whose scans are given."""
    inputs = q, k, v, log_decay, initial_state, cu_seqlens
    o, final_state = run(_plan_forward, inputs, scans, product_precision(q.dtype), scale, output_final_state)
    return o, final_state


def _plan_forward(
    planner: Planner,
    q: Operand,
    k: Operand,
    v: Operand,
    log_decay: Operand | None,
    initial_state: Operand | None,
    cu_seqlens: Operand | None,
    scans: type[Scans],
    precision: str,
    scale: float,
    output_final_state: bool,
) -> tuple[Operand | None, ...]:
    q, k, v = scans.readable(planner, q, k, v)
    initial_state = planner.contiguous(initial_state)
    call = scans(planner, q, v, log_decay, cu_seqlens, precision, scale)
    final_state = call.empty_states(call.N) if output_final_state else None
    o = call.scan(q, k, v, initial_state, call.interval_states(k, v), final_state)
    return o, final_state


def backward(
    scans: type[Scans],
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
    """`backward` of the backend whose scans are given."""
    inputs = q, k, v, do, log_decay, initial_state, d_final_state, cu_seqlens
    dq, dk, dv, d_initial_state = run(_plan_backward, inputs, scans, product_precision(q.dtype), scale)
    return dq, dk, dv, d_initial_state


def _plan_backward(
    planner: Planner,
    q: Operand,
    k: Operand,
    v: Operand,
    do: Operand,
    log_decay: Operand | None,
    initial_state: Operand | None,
    d_final_state: Operand | None,
    cu_seqlens: Operand | None,
    scans: type[Scans],
    precision: str,
    scale: float,
) -> tuple[Operand | None, ...]:
    q, k, v, do = scans.readable(planner, q, k, v, do)
    initial_state, d_final_state = planner.contiguous(initial_state), planner.contiguous(d_final_state)
    call = scans(planner, q, v, log_decay, cu_seqlens, precision, scale, is_backward=True)
    d_initial_state = None if initial_state is None else call.empty_states(call.N)
    return *call.gradients(q, k, v, do, initial_state, d_final_state, d_initial_state), d_initial_state
