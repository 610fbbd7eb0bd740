"""The implementations that are measured, and how each one is called. What is not installed is found out at the call."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_attention import decay

from .cases import OpCase

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

OURS = "lightning_attention"


@dataclass(frozen=True)
class Peer:
    """An implementation.

    Args:
        name: as in results.
        device: type of the devices it is measured on.
        build: from log_decay `[H]` and the bounds of packed documents, or None, to a call on q, k, v.
        takes_documents: it keeps documents of a row apart.
        is_quadratic: its time grows with the square of the length.
        is_softmax: it computes causal softmax attention; the others compute the operator.
        is_head_first: its tensors are `[B, H, T, D]`, not `[B, T, H, D]`.
        max_length: tokens beyond which a call takes long enough to be left out.
        context: entered around its calls.
    """

    name: str
    device: str
    build: Callable[[Tensor, Tensor | None], Attention]
    takes_documents: bool = False
    is_quadratic: bool = False
    is_softmax: bool = False
    is_head_first: bool = False
    max_length: int | None = None
    context: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class StepPeer:
    """An implementation of decoding.

    Args:
        name: as in results.
        device: type of the devices it is measured on.
        build: from log_decay `[H]` to a call on q, k, v `[B, 1, H, D]` and a state `[B, H, D, D]`, which it may
            overwrite; it returns the output and the new state.
    """

    name: str
    device: str
    build: Callable[[Tensor], Step]


class Inputs:
    """Random q, k, v, do `[B, T, H, D]`, the decays of ALiBi and the bounds of documents, for all implementations."""

    def __init__(self, case: OpCase, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)
        q, k, v, do = (torch.randn(case.shape, generator=generator, device=device, dtype=case.dtype) for _ in range(4))
        self.qkv, self.do = tuple(x.requires_grad_() for x in (q, k, v)), do
        self.log_decay = decay.log_decay(case.num_heads, preset="alibi").to(device)
        bounds = case.bounds
        self.cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)

    @cached_property
    def head_first(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """q, k, v and do as contiguous `[B, H, T, D]`."""
        q, k, v, do = (x.detach().transpose(1, 2).contiguous() for x in (*self.qkv, self.do))
        return tuple(x.requires_grad_() for x in (q, k, v)), do


class Calls:
    """The calls of an implementation on the inputs of a case, in its own layout."""

    def __init__(self, peer: Peer, inputs: Inputs):
        self.peer, self._attention = peer, peer.build(inputs.log_decay, inputs.cu_seqlens)
        self._qkv, self._do = inputs.head_first if peer.is_head_first else (inputs.qkv, inputs.do)

    def attend(self) -> Tensor:
        """The output; to be called inside `peer.context()`."""
        return self._attention(*self._qkv)

    def forward(self) -> Tensor:
        """The output, with what backward needs of it."""
        with self.peer.context():
            return self.attend()

    def backward(self) -> tuple[Tensor, ...]:
        """dq, dk and dv, from one output that is kept."""
        return torch.autograd.grad(self._kept_output, self._qkv, self._do, retain_graph=True)

    def both(self) -> tuple[Tensor, ...]:
        """Forward and backward, as a step of training."""
        return torch.autograd.grad(self.forward(), self._qkv, self._do)

    def results(self) -> tuple[Tensor, ...]:
        """Output and gradients `[B, T, H, D]`."""
        results = (self._kept_output.detach(), *self.backward())
        return tuple(x.transpose(1, 2) for x in results) if self.peer.is_head_first else results

    @cached_property
    def _kept_output(self) -> Tensor:
        return self.forward()


def _ours(log_decay: Tensor, cu_seqlens: Tensor | None, backend: str = "auto") -> Attention:
    from lightning_attention import lightning_attention

    return lambda q, k, v: lightning_attention(q, k, v, log_decay, cu_seqlens=cu_seqlens, backend=backend).output


def _lightning1(log_decay: Tensor, _: Tensor | None) -> Attention:
    from .baselines.lightning1 import lightning1

    return lambda q, k, v: lightning1(q, k, v, log_decay)


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


def _sdpa(name: str, device: str, context: Callable[[], AbstractContextManager] = nullcontext) -> Peer:
    return Peer(name, device, _softmax, is_quadratic=True, is_softmax=True, is_head_first=True, context=context)


PEERS = (
    Peer(OURS, "cpu", _ours, takes_documents=True),
    _sdpa("scaled_dot_product_attention", "cpu"),
    Peer(OURS, "cuda", _ours, takes_documents=True),
    Peer("its portable kernels", "cuda", partial(_ours, backend="triton"), takes_documents=True),
    Peer("lightning-1", "cuda", _lightning1, is_quadratic=True),
    _sdpa("SDPA flash", "cuda", lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
    _sdpa("SDPA cuDNN", "cuda", lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)),
    Peer("fla chunk_simple_gla", "cuda", _fla_chunk, takes_documents=True),
    # These two go through a sequence in one program a head, or a few: seconds at a million tokens.
    Peer("fla fused_chunk_simple_gla", "cuda", _fla_fused_chunk, takes_documents=True, max_length=1 << 17),
    Peer("OpenNLPLab lightning_attn", "cuda", _lightning_attn, is_head_first=True, max_length=1 << 17),
)


def _our_step(log_decay: Tensor) -> Step:
    from lightning_attention import lightning_attention_step

    return lambda q, k, v, state: (lightning_attention_step(q, k, v, log_decay, state=state), state)


def _fla_fused_recurrent(log_decay: Tensor) -> Step:
    from fla.ops.simple_gla import fused_recurrent_simple_gla  # pyright: ignore[reportMissingImports]

    return lambda q, k, v, state: fused_recurrent_simple_gla(
        q, k, v, g_gamma=log_decay, scale=1.0, initial_state=state, output_final_state=True
    )


STEP_PEERS = (
    StepPeer(OURS, "cpu", _our_step),
    StepPeer(OURS, "cuda", _our_step),
    StepPeer("fla fused_recurrent_simple_gla", "cuda", _fla_fused_recurrent),
)
