"""Implementations to measure, and how to call each. A package that is not installed is reported at the first call."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_attention import DecodingState, decay, lightning_attention, lightning_attention_step

from .cases import OpCase
from .report import OURS

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Implementation:
    """Implementation of the operator or of softmax attention.

    Args:
        name: name in results.
        device: type of device that it is measured on.
        build: function from log_decay `[H]`, and cu_seqlens or None, to a call on q, k, v.
        takes_packed_sequences: True if it takes cu_seqlens.
        is_quadratic: True if its time is quadratic in the length.
        is_softmax: True if it computes causal softmax attention, False if it computes the operator.
        is_head_first: True if its tensors are `[B, H, T, D]`, not `[B, T, H, D]`.
        max_length: longest sequence to measure, if longer ones take too long.
        context: context manager to enter around its calls.
    """

    name: str
    device: str
    build: Callable[[Tensor, Tensor | None], Attention]
    takes_packed_sequences: bool = False
    is_quadratic: bool = False
    is_softmax: bool = False
    is_head_first: bool = False
    max_length: int | None = None
    context: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class StepImplementation:
    """Implementation of a decode step.

    Args:
        name: name in results.
        device: type of device that it is measured on.
        build: function from log_decay `[H]` to a call on q, k, v `[B, 1, H, D]` and a state `[B, H, D, D]`, which the
            call may overwrite, that returns the output and the new state.
        start: function from a state, the dtype of q and a fraction of a chunk for each sequence to the state of the
            call: decoding states are so far in their chunks, so that calls complete as many in a round as on average.
    """

    name: str
    device: str
    build: Callable[[Tensor], Step]
    start: Callable[[Tensor, torch.dtype, Tensor], Any] = lambda state, dtype, fraction: state


class Inputs:
    """Inputs for all implementations: random q, k, v, do `[B, T, H, D]`, ALiBi decays, and cu_seqlens if packed."""

    def __init__(self, case: OpCase, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)
        q, k, v, do = (torch.randn(case.shape, generator=generator, device=device, dtype=case.dtype) for _ in range(4))
        self.qkv, self.do = tuple(x.requires_grad_() for x in (q, k, v)), do
        self.log_decay = decay.log_decay(case.num_heads, preset="alibi").to(device)
        boundaries = case.boundaries
        self.cu_seqlens = None if boundaries is None else torch.tensor(boundaries, dtype=torch.int32, device=device)

    @cached_property
    def head_first(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """q, k, v and do as contiguous `[B, H, T, D]`."""
        q, k, v, do = (x.detach().transpose(1, 2).contiguous() for x in (*self.qkv, self.do))
        return tuple(x.requires_grad_() for x in (q, k, v)), do


class Calls:
    """Calls of an implementation on the inputs of a case, in its own layout."""

    def __init__(self, implementation: Implementation, inputs: Inputs):
        self.implementation = implementation
        self._attention = implementation.build(inputs.log_decay, inputs.cu_seqlens)
        self._qkv, self._do = inputs.head_first if implementation.is_head_first else (inputs.qkv, inputs.do)

    def attend(self) -> Tensor:
        """Compute the output; call inside `implementation.context()`."""
        return self._attention(*self._qkv)

    def forward(self) -> Tensor:
        """Compute the output, and save what backward needs."""
        with self.implementation.context():
            return self.attend()

    def backward(self) -> tuple[Tensor, ...]:
        """Compute dq, dk and dv from the same output at every call."""
        return torch.autograd.grad(self._saved_output, self._qkv, self._do, retain_graph=True)

    def both(self) -> tuple[Tensor, ...]:
        """Run forward and backward, as a training step does."""
        return torch.autograd.grad(self.forward(), self._qkv, self._do)

    def results(self) -> tuple[Tensor, ...]:
        """Output, dq, dk and dv, `[B, T, H, D]`."""
        results = (self._saved_output.detach(), *self.backward())
        return tuple(x.transpose(1, 2) for x in results) if self.implementation.is_head_first else results

    @cached_property
    def _saved_output(self) -> Tensor:
        return self.forward()


def _ours(log_decay: Tensor, cu_seqlens: Tensor | None, **options: Any) -> Attention:
    return lambda q, k, v: lightning_attention(q, k, v, log_decay, cu_seqlens=cu_seqlens, **options).output


def _lightning1(log_decay: Tensor, _: Tensor | None) -> Attention:
    from lightning_attention.ops.quadratic import quadratic_attention

    return lambda q, k, v: quadratic_attention(q, k, v, log_decay)


def _softmax(log_decay: Tensor, _: Tensor | None) -> Attention:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _fla_chunk(log_decay: Tensor, cu_seqlens: Tensor | None) -> Attention:
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    return lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=log_decay, scale=1.0, cu_seqlens=cu_seqlens)[0]


def _fla_fused_chunk(log_decay: Tensor, cu_seqlens: Tensor | None) -> Attention:
    from fla.ops.simple_gla import fused_chunk_simple_gla  # pyright: ignore[reportMissingImports]

    return lambda q, k, v: fused_chunk_simple_gla(q, k, v, g_gamma=log_decay, scale=1.0, cu_seqlens=cu_seqlens)[0]


def _lightning_attn(log_decay: Tensor, _: Tensor | None) -> Attention:
    from lightning_attn.ops import lightning_attn_func  # pyright: ignore[reportMissingImports]

    slopes = -log_decay[:, None, None]
    return lambda q, k, v: lightning_attn_func(q, k, v, slopes)


def _sdpa(name: str, device: str, context: Callable[[], AbstractContextManager] = nullcontext) -> Implementation:
    return Implementation(
        name, device, _softmax, is_quadratic=True, is_softmax=True, is_head_first=True, context=context
    )


# Longest sequence for implementations that scan it in one program per head, or a few: seconds at a million tokens.
LONG = 1 << 17

IMPLEMENTATIONS = (
    Implementation(OURS, "cpu", _ours, takes_packed_sequences=True),
    _sdpa("scaled_dot_product_attention", "cpu"),
    Implementation(OURS, "cuda", _ours, takes_packed_sequences=True),
    Implementation("its portable kernels", "cuda", partial(_ours, backend="triton"), takes_packed_sequences=True),
    Implementation("lightning-1", "cuda", _lightning1, is_quadratic=True),
    _sdpa("SDPA flash", "cuda", lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
    _sdpa("SDPA cuDNN", "cuda", lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)),
    Implementation("fla chunk_simple_gla", "cuda", _fla_chunk, takes_packed_sequences=True),
    Implementation(
        "fla fused_chunk_simple_gla", "cuda", _fla_fused_chunk, takes_packed_sequences=True, max_length=LONG
    ),
    Implementation("OpenNLPLab lightning_attn", "cuda", _lightning_attn, is_head_first=True, max_length=LONG),
)


# What the promise of `invariant` costs beside the free choice of a backend and of segments.
INVARIANT_IMPLEMENTATIONS = tuple(
    Implementation(name, device, partial(_ours, **options), takes_packed_sequences=True)
    for device in ("cpu", "cuda")
    for name, options in ((OURS, {}), ("invariant", {"invariant": True}))
)


def _our_step(log_decay: Tensor) -> Step:
    return lambda q, k, v, state: (lightning_attention_step(q, k, v, log_decay, state=state), state)


def _start_ring(state: Tensor, dtype: torch.dtype, fraction: Tensor) -> DecodingState:
    B, H, K, V = state.shape
    new = DecodingState.zeros(B, H, K, V, dtype=dtype, device=state.device)
    count = (fraction.to(state.device) * new.chunk_size).int()
    return new._replace(state=state, count=count[:, None].repeat(1, H))


def _plain_step(log_decay: Tensor) -> Step:
    factor = log_decay.exp()[:, None, None]

    def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state.mul_(factor).addcmul_(k[:, 0, :, :, None], v[:, 0, :, None])
        return (q[:, 0, :, None] @ state)[:, None, :, 0], state

    return step


def _fla_fused_recurrent(log_decay: Tensor) -> Step:
    from fla.ops.simple_gla import fused_recurrent_simple_gla  # pyright: ignore[reportMissingImports]

    return lambda q, k, v, state: fused_recurrent_simple_gla(
        q, k, v, g_gamma=log_decay, scale=1.0, initial_state=state, output_final_state=True
    )


STEP_IMPLEMENTATIONS = (
    StepImplementation(OURS, "cpu", _our_step),
    StepImplementation("our decoding state", "cpu", _our_step, _start_ring),
    StepImplementation("mul_, addcmul_, matmul", "cpu", _plain_step),
    StepImplementation(OURS, "cuda", _our_step),
    StepImplementation("our decoding state", "cuda", _our_step, _start_ring),
    StepImplementation("fla fused_recurrent_simple_gla", "cuda", _fla_fused_recurrent),
)
