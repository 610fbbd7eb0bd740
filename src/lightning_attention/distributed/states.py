"""The state that a slice adds, and the effect of a state on a slice. Each is the derivative of the other.

`log_decay` is `[H]`, finite, in the dtype of the states; λ is its exponential.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.backends import BACKENDS
from ..ops.calls import call
from ..ops.inputs import ReadInputs, WriteInputs
from .slices import Slice


def powers(log_decay: Tensor, exponents: Tensor) -> Tensor:
    """`λ^n` `[len(exponents), H]`, for exponents >= 0."""
    return torch.exp(log_decay * exponents[:, None])


def power(log_decay: Tensor, exponent: int) -> Tensor:
    """`λ^n` `[H, 1, 1]`, a factor on states."""
    return torch.exp(log_decay * exponent)[:, None, None]


def copy_integers(values: Sequence[int], like: Tensor) -> Tensor:
    """`[len(values)]` int64 on the device of `like`, without a wait of the host."""
    pinned = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=like.is_cuda)
    return pinned.to(like.device, non_blocking=True)


def write_state(backend: str, k: Tensor, v: Tensor, log_decay: Tensor, *, reverse: bool) -> Tensor:
    """`Backend.write_state` of a backend by name."""
    (state,) = call(BACKENDS[backend].write_state, WriteInputs(k, v, log_decay), reverse)
    return state


def read_state_(
    backend: str, o: Tensor, q: Tensor, state: Tensor, log_decay: Tensor, *, reverse: bool, add: bool
) -> None:
    """`Backend.read_state_` of a backend by name."""
    call(BACKENDS[backend].read_state_, ReadInputs(o, q, state, log_decay), reverse, add)


def outgoing_state(
    k: Tensor, v: Tensor, initial: Tensor | None, log_decay: Tensor, local: Slice, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """State for the next rank `[B, H, K, V]`: `Σ_j λ^(m-1-j) k_j v_jᵀ + λ^m S_0` over the last `m` tokens.

    m is `local.suffix_length`. `initial` `[D, B, H, K, V]` are the states of the sequences here before their first
    tokens here. Also returns k and v for the attention within the slice: their gradients then come back through here,
    and the gradient of the state is added to them in place.
    """
    state, k, v = _OutgoingState.apply(k, v, log_decay, local.suffix_length, backend)
    if initial is not None:
        # A sum over one sequence or none, so that every rank has the same autograd graph.
        carried = initial[len(initial) - local.ends_inside :].sum(0)
        state = state + carried * power(log_decay, local.suffix_length)
    return state, k, v


def add_incoming_(
    o: Tensor, q: Tensor, state: Tensor, log_decay: Tensor, prefix_length: int, scale: float, backend: str
) -> Tensor:
    """`o_i += scale λ^(i+1) q_i S` for the first `prefix_length` tokens, in place."""
    return _AddIncoming.apply(o, q, state, log_decay, prefix_length, scale, backend)


class _OutgoingState(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, log_decay: Tensor, length: int, backend: str):
        ctx.save_for_backward(k, v, log_decay)
        ctx.length, ctx.backend = length, backend
        state = write_state(backend, _last(k, length), _last(v, length), log_decay, reverse=False)
        return state, k.view_as(k), v.view_as(v)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_state, dk, dv):
        k, v, log_decay = ctx.saved_tensors
        dk_last, dv_last, k, v = (_last(x, ctx.length) for x in (dk, dv, k, v))
        read_state_(ctx.backend, dk_last, v, d_state.mT, log_decay, reverse=True, add=True)
        read_state_(ctx.backend, dv_last, k, d_state, log_decay, reverse=True, add=True)
        return dk, dv, None, None, None


class _AddIncoming(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o: Tensor, q: Tensor, state: Tensor, log_decay: Tensor, length: int, scale: float, backend: str):
        ctx.save_for_backward(q, state, log_decay)
        ctx.mark_dirty(o)
        ctx.length, ctx.scale, ctx.backend = length, scale, backend
        read_state_(backend, o[:, :length], q[:, :length], scale * state, log_decay, reverse=False, add=True)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, state, log_decay = ctx.saved_tensors
        length, dq = ctx.length, None
        if length:
            dq = torch.empty_like(q, memory_format=torch.contiguous_format)
            weighted = ctx.scale * state.mT
            read_state_(ctx.backend, dq[:, :length], do[:, :length], weighted, log_decay, reverse=False, add=False)
            dq[:, length:] = 0
        d_state = write_state(ctx.backend, q[:, :length], do[:, :length], log_decay, reverse=True)
        return do, dq, ctx.scale * d_state, None, None, None, None


def _last(x: Tensor, count: int) -> Tensor:
    return x[:, x.shape[1] - count :]
