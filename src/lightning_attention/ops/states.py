"""The state that tokens write, and what tokens read of a state, in PyTorch, on any device.

Each is the derivative of the other. The work is in the dtype of the state, `CHUNK_SIZE` tokens at a time, so that no
float32 copy of all keys or queries is made.
"""

import torch
from torch import Tensor

from .inputs import ReadInputs, WriteInputs
from .problem import state_dtype

# Measured on a CPU core, 4 heads of 64: 1024 to 4096 are level, 128 takes 1.5 times as long, 16384 up to 3 times.
CHUNK_SIZE = 4096


def write_state(x: WriteInputs[Tensor], reverse: bool) -> list[Tensor]:
    """`Σ_i λ^(T-1-i) k_i v_iᵀ` `[B, H, K, V]`, or in reverse `Σ_i λ^(i+1) k_i v_iᵀ`."""
    k, v, log_decay = x
    B, length, H, K = k.shape
    decay = _rising(log_decay, length) if reverse else _falling(log_decay, length)
    state = decay.new_zeros(B * H, K, v.shape[3])
    for chunk in _chunks(length):
        state += _product(_by_head(k[:, chunk] * decay[chunk, :, None]).mT, _by_head(v[:, chunk].to(decay.dtype)))
    return [state.unflatten(0, (B, H))]


def read_state_(x: ReadInputs[Tensor], reverse: bool, add: bool) -> list[Tensor]:
    """`o_i = λ^(i+1) q_i S`, or with `add` `o_i += ...`; in reverse the weight is `λ^(T-1-i)`."""
    o, q, state, log_decay = x
    decay = _falling(log_decay, q.shape[1]) if reverse else _rising(log_decay, q.shape[1])
    for chunk in _chunks(q.shape[1]):
        read = _product(_by_head(q[:, chunk].to(decay.dtype)), state.flatten(0, 1)).unflatten(0, state.shape[:2])
        read = read.transpose(1, 2) * decay[chunk, :, None]
        o[:, chunk] = o[:, chunk] + read if add else read
    return []


def _by_head(x: Tensor) -> Tensor:
    """`[B H, C, D]`."""
    return x.transpose(1, 2).flatten(0, 1)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """`x @ y` in their own dtype, under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm(x, y)


def _chunks(length: int) -> list[slice]:
    return [slice(start, start + CHUNK_SIZE) for start in range(0, length, CHUNK_SIZE)]


def _rising(log_decay: Tensor, length: int) -> Tensor:
    """`λ^1 .. λ^n`: from the state before the tokens to each token."""
    return torch.exp(log_decay * torch.arange(1, length + 1, device=log_decay.device)[:, None])


def _falling(log_decay: Tensor, length: int) -> Tensor:
    """`λ^(n-1) .. λ^0`: from each token to the state after all tokens."""
    return torch.exp(log_decay * torch.arange(length - 1, -1, -1, device=log_decay.device)[:, None])


def finite_log_decay(q: Tensor, log_decay: Tensor | None) -> Tensor:
    """log λ `[H]`; finite, since -inf, which is λ = 0, times 0 would be NaN."""
    dtype = state_dtype(q.dtype)
    log_decay = q.new_zeros(q.shape[2], dtype=dtype) if log_decay is None else cast(log_decay, dtype)
    return log_decay.clamp_min(torch.finfo(dtype).min)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which costs as much as a view even when there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)
