"""The state that a slice leaves, and what a state adds to a slice. Each is the other's derivative.

Tokens are read `CHUNK_SIZE` at a time, so that no float32 copy of all keys or queries is made. Products are of the
dtype of the inputs on a GPU, as in the kernels, elsewhere of that of the accumulation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .slices import Slice

# Measured on a CPU core, 4 heads of 64: 1024 to 4096 are level, 128 takes 1.5 times as long, 16384 up to 3 times. The
# largest of the level ones, for few launches on a GPU.
CHUNK_SIZE = 4096


def powers(rates: Tensor, exponents: Tensor) -> Tensor:
    """`λ^n` `[len(exponents), H]`, for exponents >= 0."""
    return torch.exp(rates * exponents[:, None])


def power(rates: Tensor, exponent: int) -> Tensor:
    """`λ^n` `[H, 1, 1]`, to multiply a state."""
    return torch.exp(rates * exponent)[:, None, None]


def on_device_of(x: Tensor, values: Sequence[int]) -> Tensor:
    """`[len(values)]` int64; the host does not wait for the copy."""
    pinned = torch.tensor(values, dtype=torch.int64, pin_memory=x.is_cuda)
    return pinned.to(x.device, non_blocking=True)


def outgoing_state(k: Tensor, v: Tensor, initial: Tensor | None, rates: Tensor, held: Slice) -> Tensor:
    """What goes on: `Σ_j λ^(m-1-j) k_j v_jᵀ + λ^m S_0` over the last `m = held.tail` tokens `[B, H, K, V]`.

    `initial` `[D, B, H, K, V]` are the states of the documents here before their first tokens here.
    """
    state = _Write.apply(k, v, rates, held.tail)
    if initial is None:
        return state
    # A sum over one document or none: gradients then have the same way on every rank.
    carried = initial[len(initial) - held.goes_on :].sum(0)
    return state + carried * power(rates, held.tail)


def add_incoming_(o: Tensor, q: Tensor, state: Tensor, rates: Tensor, head: int, scale: float) -> Tensor:
    """`o_i += scale λ^(i+1) q_i S` for the first `head` tokens, in place."""
    return _Read.apply(o, q, state, rates, head, scale)


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, rates: Tensor, tail: int) -> Tensor:
        ctx.save_for_backward(k, v, rates)
        ctx.tail = tail
        return _write(_last(k, tail), _last(v, tail), _falling(rates, tail))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_state):
        k, v, rates = ctx.saved_tensors
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        decay = _falling(rates, ctx.tail)
        _read_(_last(dk, ctx.tail), _last(v, ctx.tail), d_state.mT, decay)
        _read_(_last(dv, ctx.tail), _last(k, ctx.tail), d_state, decay)
        return dk, dv, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o: Tensor, q: Tensor, state: Tensor, rates: Tensor, head: int, scale: float) -> Tensor:
        ctx.save_for_backward(q, state, rates)
        ctx.mark_dirty(o)
        ctx.head, ctx.scale = head, scale
        _read_(o[:, :head], q[:, :head], scale * state, _rising(rates, head))
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, state, rates = ctx.saved_tensors
        qs, dos, decay = q[:, : ctx.head], do[:, : ctx.head], _rising(rates, ctx.head)
        dq = torch.zeros_like(q)
        _read_(dq[:, : ctx.head], dos, ctx.scale * state.mT, decay)
        return do, dq, ctx.scale * _write(qs, dos, decay), None, None, None


def _write(x: Tensor, y: Tensor, decay: Tensor) -> Tensor:
    """`Σ_i decay_i x_i y_iᵀ` `[B, H, X, Y]`."""
    B, length, H, X = x.shape
    state = decay.new_zeros(B * H, X, y.shape[3])
    for chunk in _chunks(length):
        state += _product(_rows(x, chunk, decay).mT, _rows(y, chunk), decay.dtype)
    return state.unflatten(0, (B, H))


def _read_(out: Tensor, x: Tensor, state: Tensor, decay: Tensor) -> None:
    """`out_i += decay_i x_i S`, in place."""
    for chunk in _chunks(x.shape[1]):
        rows = _product(_rows(x, chunk), state.flatten(0, 1), decay.dtype).unflatten(0, state.shape[:2])
        out[:, chunk] += rows.transpose(1, 2) * decay[chunk, :, None]


def _rows(x: Tensor, chunk: slice, decay: Tensor | None = None) -> Tensor:
    """`[B H, C, D]`, each row times its decay, rounded to the dtype of x once."""
    rows = x[:, chunk]
    if decay is not None:
        rows = (rows * decay[chunk, :, None]).to(x.dtype if x.is_cuda else decay.dtype)
    return rows.transpose(1, 2).flatten(0, 1)


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """`x @ y`, accumulated and returned in `dtype`, whatever is being autocast."""
    with torch.autocast(x.device.type, enabled=False):
        if x.is_cuda and x.dtype != dtype:
            return torch.bmm(x, y.to(x.dtype), out_dtype=dtype)
        return torch.bmm(x.to(dtype), y.to(dtype))


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
