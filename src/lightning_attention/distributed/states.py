"""The state that a slice leaves, and what a state adds to a slice. Each is the other's derivative.

A backend may have kernels for both. Here they are in PyTorch, in the dtype of the state, and read `CHUNK_SIZE` tokens
at a time, so that no float32 copy of all keys or queries is made.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import library
from .slices import Slice

# Measured on a CPU core, 4 heads of 64: 1024 to 4096 are level, 128 takes 1.5 times as long, 16384 up to 3 times.
CHUNK_SIZE = 4096


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
        state = _on(backend, write_state)(_last(k, tail), _last(v, tail), rates, reverse=False)
        return state, k.view_as(k), v.view_as(v)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_state, dk, dv):
        k, v, rates = ctx.saved_tensors
        read_ = _on(ctx.backend, read_state_)
        read_(_last(dk, ctx.tail), _last(v, ctx.tail), d_state.mT, rates, reverse=True, add=True)
        read_(_last(dv, ctx.tail), _last(k, ctx.tail), d_state, rates, reverse=True, add=True)
        return dk, dv, None, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o: Tensor, q: Tensor, state: Tensor, rates: Tensor, head: int, scale: float, backend: str):
        ctx.save_for_backward(q, state, rates)
        ctx.mark_dirty(o)
        ctx.head, ctx.scale, ctx.backend = head, scale, backend
        _on(backend, read_state_)(o[:, :head], q[:, :head], scale * state, rates, reverse=False, add=True)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, state, rates = ctx.saved_tensors
        head, dq = ctx.head, None
        if head:
            dq = torch.empty_like(q, memory_format=torch.contiguous_format)
            read_ = _on(ctx.backend, read_state_)
            read_(dq[:, :head], do[:, :head], ctx.scale * state.mT, rates, reverse=False, add=False)
            dq[:, head:] = 0
        d_state = ctx.scale * _on(ctx.backend, write_state)(q[:, :head], do[:, :head], rates, reverse=True)
        return do, dq, d_state, None, None, None, None


def _on(backend: str, function: Callable) -> Callable:
    """What a backend has in place of one of the two functions below."""
    return getattr(library.BACKENDS[backend], function.__name__, function)


def write_state(x: Tensor, y: Tensor, rates: Tensor, *, reverse: bool) -> Tensor:
    """`Σ_i λ^(n-1-i) x_i y_iᵀ` `[B, H, X, Y]`, or in reverse `Σ_i λ^(i+1) x_i y_iᵀ`."""
    B, length, H, X = x.shape
    decay = _rising(rates, length) if reverse else _falling(rates, length)
    state = decay.new_zeros(B * H, X, y.shape[3])
    for chunk in _chunks(length):
        state += _product(_by_head(x[:, chunk] * decay[chunk, :, None]).mT, _by_head(y[:, chunk].to(decay.dtype)))
    return state.unflatten(0, (B, H))


def read_state_(out: Tensor, x: Tensor, state: Tensor, rates: Tensor, *, reverse: bool, add: bool) -> None:
    """`out_i = λ^(i+1) x_i S`, added to what is there or in its place; in reverse `λ^(n-1-i) x_i S`."""
    decay = _falling(rates, x.shape[1]) if reverse else _rising(rates, x.shape[1])
    for chunk in _chunks(x.shape[1]):
        rows = _product(_by_head(x[:, chunk].to(decay.dtype)), state.flatten(0, 1)).unflatten(0, state.shape[:2])
        rows = rows.transpose(1, 2) * decay[chunk, :, None]
        out[:, chunk] = out[:, chunk] + rows if add else rows


def _by_head(x: Tensor) -> Tensor:
    """`[B H, C, D]`."""
    return x.transpose(1, 2).flatten(0, 1)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """In the dtype of the state, whatever is being autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm(x, y)


def _chunks(length: int) -> list[slice]:
    return [slice(start, start + CHUNK_SIZE) for start in range(0, length, CHUNK_SIZE)]


def _last(x: Tensor, count: int) -> Tensor:
    return x[:, x.shape[1] - count :]


def _rising(rates: Tensor, length: int) -> Tensor:
    """`λ^1 .. λ^n`: from the state before the tokens to each of them."""
    return powers(rates, torch.arange(1, length + 1, device=rates.device))


def _falling(rates: Tensor, length: int) -> Tensor:
    """`λ^(n-1) .. λ^0`: from each token to the state after them."""
    return powers(rates, torch.arange(length - 1, -1, -1, device=rates.device))
