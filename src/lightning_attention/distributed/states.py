"""The state that a slice leaves, and what a state adds to a slice. Each is the other's derivative.

A backend may have kernels for both. Here they are in PyTorch, in the dtype of the state, and read `CHUNK_SIZE` tokens
at a time, so that no float32 copy of all keys or queries is made.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.backends import BACKENDS
from .slices import Slice


def powers(rates: Tensor, exponents: Tensor) -> Tensor:
    """`λ^n` `[len(exponents), H]`, for exponents >= 0."""
    return torch.exp(rates * exponents[:, None])


def power(rates: Tensor, exponent: int) -> Tensor:
    """`λ^n` `[H, 1, 1]`, to multiply a state."""
    return torch.exp(rates * exponent)[:, None, None]


def on_device_of(x: Tensor, values: Sequence[int]) -> Tensor:
    """`[len(values)]` int64; the host does not wait for the copy."""
    pinned = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=x.is_cuda)
    return pinned.to(x.device, non_blocking=True)


def outgoing_state(
    k: Tensor, v: Tensor, initial: Tensor | None, rates: Tensor, held: Slice, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What goes on: `Σ_j λ^(m-1-j) k_j v_jᵀ + λ^m S_0` over the last `m = held.tail` tokens `[B, H, K, V]`.

    `initial` `[D, B, H, K, V]` are the states of the documents here before their first tokens here. Also returns k and
    v for the work on the slice: its gradients then come here, and what the state adds to them is added in place.
    """
    state, k, v = _Write.apply(k, v, rates, held.tail, backend)
    if initial is not None:
        # A sum over one document or none: gradients then have the same way on every rank.
        carried = initial[len(initial) - held.goes_on :].sum(0)
        state = state + carried * power(rates, held.tail)
    return state, k, v


def add_incoming_(o: Tensor, q: Tensor, state: Tensor, rates: Tensor, head: int, scale: float, backend: str) -> Tensor:
    """`o_i += scale λ^(i+1) q_i S` for the first `head` tokens, in place."""
    return _Read.apply(o, q, state, rates, head, scale, backend)


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, rates: Tensor, tail: int, backend: str):
        ctx.save_for_backward(k, v, rates)
        ctx.tail, ctx.backend = tail, backend
        state = BACKENDS[backend].write_state(_last(k, tail), _last(v, tail), rates, reverse=False)
        return state, k.view_as(k), v.view_as(v)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_state, dk, dv):
        k, v, rates = ctx.saved_tensors
        read_ = BACKENDS[ctx.backend].read_state_
        read_(_last(dk, ctx.tail), _last(v, ctx.tail), d_state.mT, rates, reverse=True, add=True)
        read_(_last(dv, ctx.tail), _last(k, ctx.tail), d_state, rates, reverse=True, add=True)
        return dk, dv, None, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o: Tensor, q: Tensor, state: Tensor, rates: Tensor, head: int, scale: float, backend: str):
        ctx.save_for_backward(q, state, rates)
        ctx.mark_dirty(o)
        ctx.head, ctx.scale, ctx.backend = head, scale, backend
        BACKENDS[backend].read_state_(o[:, :head], q[:, :head], scale * state, rates, reverse=False, add=True)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, state, rates = ctx.saved_tensors
        head, dq = ctx.head, None
        if head:
            dq = torch.empty_like(q, memory_format=torch.contiguous_format)
            read_ = BACKENDS[ctx.backend].read_state_
            read_(dq[:, :head], do[:, :head], ctx.scale * state.mT, rates, reverse=False, add=False)
            dq[:, head:] = 0
        d_state = ctx.scale * BACKENDS[ctx.backend].write_state(q[:, :head], do[:, :head], rates, reverse=True)
        return do, dq, d_state, None, None, None, None


def _last(x: Tensor, count: int) -> Tensor:
    return x[:, x.shape[1] - count :]
