"""From tensors to launches: the calls of the portable backend, with the scans of this one."""

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from ..triton import launch as portable
from ..triton.config import Segments, ceil_div
from ..triton.replay import with_scratch
from . import config, gradients, kernels, states


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    boxes = _boxes(q), _boxes(k), _boxes(v)
    return with_scratch(q.device, portable.forward, *boxes, *rest, scans=_Scans)


def backward(q: Tensor, k: Tensor, v: Tensor, do: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    boxes = _boxes(q), _boxes(k), _boxes(v), _boxes(do)
    return with_scratch(q.device, portable.backward, *boxes, *rest, scans=_Gradients)


class _Scans(portable.Scans):
    """A program for a head; where V is 128, of two warpgroups that share what comes in.

    A kernel may begin before the one launched before it has ended. So nothing that one reads or writes may be freed,
    and its memory be taken for something else, before all are launched.
    """

    is_backward = False

    def __init__(self, *arguments: Any):
        self._kept: list[Any] = []
        super().__init__(*arguments)
        self.is_accumulated = self.segments.num_intervals > config.MAX_SUMMED

    def cut(self) -> Segments:
        return config.segments(
            self.T,
            self.sequence_length,
            self.B * self.H,
            self.K,
            self.V,
            portable.num_multiprocessors(self.device),
            _bytes_per_second(self.device),
            is_backward=self.is_backward,
        )

    @property
    def sequence_length(self) -> int:
        """On average."""
        return ceil_div(self.B * self.T, max(self.N, 1))

    @property
    def has_prefix(self) -> bool:
        """Whether the second of two segments makes the state before it, without a kernel for it."""
        return self.segments.count == 2

    def interval_states(self, k: Tensor, v: Tensor, *, reverse: bool = False) -> Tensor | None:
        return None if self.has_prefix else super().interval_states(k, v, reverse=reverse)

    def _states_of(self, segments: Segments, k: Tensor, v: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
        found = self.new_states(self.B, segments.num_intervals)
        factors = torch.empty(found.shape[:3], dtype=found.dtype, device=self.device)
        if programs := self.B * self.H * segments.num_intervals:
            self._launch(
                states.interval_state_kernel,
                programs,
                (k, v, self.log_decay, found, factors, self.cu_seqlens),
                (self.B, *self._sizes()[:-1]),
                (*k.stride()[:3], *v.stride()[:3]),
                (self.K, self.V, reverse, config.STATE_STAGES[self.K, self.V]),
                maxnreg=config.MAX_REGISTERS[self.V],
                launch_pdl=reverse,
            )
        return found, factors

    def _accumulate(
        self, segments: Segments, states: Tensor, factors: Tensor, *, early: bool = True, beside: bool = False
    ) -> None:
        is_gpu = states.is_cuda
        self._kept.append((states, factors))
        super()._accumulate(segments, states, factors, early=early and is_gpu, beside=beside and is_gpu)

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
        beside: bool = False,
    ) -> Tensor:
        assert kept is None
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        K, V = q.shape[3], v.shape[3]
        if programs := self.B * self.H * self.segments.count:
            self._launch(
                kernels.scan_kernel,
                programs,
                (q, k, v, o, self.log_decay, initial_state, interval_states, final_state, self.cu_seqlens),
                (self.scale_of(reverse), self.B, *self._sizes()),
                (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
                (K, V, reverse, transposed, self.has_prefix, beside, config.SCAN_STAGES[K, V]),
                maxnreg=config.MAX_REGISTERS[V],
                launch_pdl=beside or interval_states is not None,
            )
        return o

    def _sizes(self) -> tuple[int, ...]:
        length = self.segments.length
        return self.T, self.H, self.N, length, length if self.is_accumulated else self.T

    def _launch(self, kernel: Any, programs: int, tensors: tuple[Any, ...], *rest: Any, **options: Any) -> None:
        self._kept.append(tensors)
        portable.launch(kernel, programs, tensors, *rest, num_warps=4, **options)


class _Gradients(_Scans):
    """The kernels of dk and dv begin when all programs of that of dq have, and what one leaves idle the others use."""

    is_backward = True

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
        states, d_states = self._states_of_both(q, k, v, do) if self.segments.count > 2 else (None, None)
        dq = self.scan(do, v, k, initial_state, states, transposed=True)
        if self.K == self.V:
            dk, dv = self._key_value_gradients(q, k, v, do, d_final_state, d_states, d_initial_state)
        else:
            dk = self.scan(v, do, q, d_final_state, d_states, reverse=True, transposed=True, beside=True)
            dv = self.scan(k, q, do, d_final_state, d_states, d_initial_state, reverse=True, beside=True)
        return dq, dk, dv

    def _states_of_both(self, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, Tensor]:
        """Of segments, for dq and, in reverse, for dk and dv."""
        states, factors = self._states_of(self.segments, k, v, reverse=False)
        d_states, d_factors = self._states_of(self.segments, q, do, reverse=True)
        if self.is_accumulated:
            self._accumulate(self.segments, states, factors)
            self._accumulate(self.segments, d_states, d_factors, beside=True)
        return states, d_states

    def _key_value_gradients(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        do: Tensor,
        d_final_state: Tensor | None,
        interval_states: Tensor | None,
        d_initial_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        dk = torch.empty_like(k, memory_format=torch.contiguous_format)
        dv = torch.empty_like(v, memory_format=torch.contiguous_format)
        results = d_final_state, interval_states, d_initial_state
        if programs := self.B * self.H * self.segments.count:
            self._launch(
                gradients.gradient_kernel,
                programs,
                (q, k, v, do, dk, dv, self.log_decay, *results, self.cu_seqlens),
                (self.scale_of(reverse=True), self.B, *self._sizes()),
                (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3]),
                (self.K, self.has_prefix, config.GRADIENT_STAGES[self.K]),
                maxnreg=config.MAX_REGISTERS[self.V],
                launch_pdl=True,
            )
        return dk, dv


@cache
def _bytes_per_second(device: torch.device) -> float:
    """What a copy gets of the memory's bandwidth, both edges of its clock; an H200's if nobody knows it."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    kilohertz = getattr(properties, "memory_clock_rate", 0)
    return 0.86 * 2 * kilohertz * 1e3 * getattr(properties, "memory_bus_width", 0) / 8 or 4.2e12


def _boxes(x: Tensor) -> Tensor:
    """As TMA reads it, aligned to 16 bytes; anything else is copied."""
    is_aligned = x.data_ptr() % 16 == 0 and _are_aligned(x.stride())
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


@lru_cache(4096)
def _are_aligned(strides: tuple[int, ...]) -> bool:
    *outer, of_element = strides
    return of_element == 1 and all(stride > 0 and stride % 8 == 0 for stride in outer)
