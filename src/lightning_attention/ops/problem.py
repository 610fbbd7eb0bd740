"""What one call asks for: its sizes, dtype and device, checked once for every backend."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the state, and of every accumulation, for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Problem(NamedTuple):
    """Sizes of one attention or decoding call; building one raises on inputs that do not fit together."""

    batch_size: int
    length: int
    num_heads: int
    key_dim: int
    value_dim: int
    num_states: int
    dtype: torch.dtype
    device: torch.device
    is_tree: bool = False
    is_backward: bool = False

    @classmethod
    def of_attention(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> "Problem":
        if q.dim() != 4:
            raise ValueError(f"q must be [B, T, H, K], got shape {tuple(q.shape)}")
        _check_inputs(q, k, v, log_decay)
        if cu_seqlens is not None:
            if cu_seqlens.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
            if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
                raise ValueError(f"cu_seqlens must be [N + 1], got shape {tuple(cu_seqlens.shape)}")
            if q.shape[0] != 1:
                raise ValueError(f"cu_seqlens packs all sequences into one row: B must be 1, got {q.shape[0]}")
            _check_device("cu_seqlens", cu_seqlens, q)
        num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        problem = cls._of(q, v, num_sequences)
        if initial_state is not None:
            problem._check_state("initial_state", initial_state, q)
        return problem

    @classmethod
    def of_prefill(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        state_positions: Tensor | Sequence[int],
    ) -> "Problem":
        problem = cls.of_attention(q, k, v, log_decay, initial_state, cu_seqlens)
        if not isinstance(state_positions, Tensor):
            check_state_positions(list(state_positions), problem.length)
            return problem
        if state_positions.dim() != 1:
            raise ValueError(f"state_positions must be [M], got shape {tuple(state_positions.shape)}")
        _check_indices("state_positions", state_positions, q, M=state_positions.shape[0])
        return problem

    @classmethod
    def of_step(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        state: Tensor,
        state_indices: Tensor | None,
        *,
        is_tree: bool = False,
    ) -> "Problem":
        """The same for decoding, with q, k, v as `[B, T, H, D]`."""
        _check_inputs(q, k, v, log_decay)
        if state.dim() != 4:
            raise ValueError(f"state must be [N, H, K, V], got shape {tuple(state.shape)}")
        num_states = q.shape[0] if state_indices is None else state.shape[0]
        problem = cls._of(q, v, num_states, is_tree)
        problem._check_state("state", state, q, stored=(torch.bfloat16,))
        if state_indices is not None:
            _check_indices("state_indices", state_indices, q, B=q.shape[0])
        return problem

    @classmethod
    def of_drafts(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        state: Tensor,
        state_indices: Tensor | None,
        parents: Tensor | None,
        last: Tensor | None,
    ) -> "Problem":
        """For speculative decoding."""
        if q.dim() != 4:
            raise ValueError(f"drafts must be [B, T, H, D], got shape {tuple(q.shape)}")
        problem = cls.of_step(q, k, v, log_decay, state, state_indices, is_tree=parents is not None)
        if parents is not None:
            _check_indices("parents", parents, q, B=q.shape[0], T=q.shape[1])
        if last is not None:
            _check_indices("last", last, q, B=q.shape[0])
        return problem

    @classmethod
    def _of(cls, q: Tensor, v: Tensor, num_states: int, is_tree: bool = False) -> "Problem":
        batch_size, length, num_heads, key_dim = q.shape
        return cls(batch_size, length, num_heads, key_dim, v.shape[3], num_states, q.dtype, q.device, is_tree)

    def _check_state(self, name: str, state: Tensor, q: Tensor, stored: tuple[torch.dtype, ...] = ()) -> None:
        expected = (self.num_states, self.num_heads, self.key_dim, self.value_dim)
        if state.shape != expected:
            raise ValueError(f"{name} must be [N, H, K, V] = {list(expected)}, got shape {tuple(state.shape)}")
        allowed = (state_dtype(self.dtype), *(stored if self.dtype != torch.float64 else ()))
        if state.dtype not in allowed:
            names = " or ".join(map(str, allowed))
            raise TypeError(f"{name} must be {names} when q is {self.dtype}, got {state.dtype}")
        _check_device(name, state, q)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> None:
    shape, dtype = q.shape, q.dtype
    if k.shape != shape:
        raise ValueError(f"k must have the shape of q {tuple(shape)}, got {tuple(k.shape)}")
    if v.dim() != q.dim() or v.shape[:-1] != shape[:-1]:
        raise ValueError(f"v must be {[*shape[:-1], 'V']} to fit q, got shape {tuple(v.shape)}")
    if shape[2] == 0:
        raise ValueError(f"q must have at least one head, got shape {tuple(shape)}")
    if dtype not in DTYPES:
        raise TypeError(f"q must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if k.dtype != dtype:
        raise TypeError(f"k must have the dtype of q {dtype}, got {k.dtype}")
    if v.dtype != dtype:
        raise TypeError(f"v must have the dtype of q {dtype}, got {v.dtype}")
    _check_device("k", k, q)
    _check_device("v", v, q)
    if log_decay is None:
        return
    if log_decay.dtype != torch.float32:
        raise TypeError(f"log_decay must be torch.float32, got {log_decay.dtype}")
    if log_decay.dim() != 1 or log_decay.shape[0] != shape[2]:
        raise ValueError(f"log_decay must be [H] = [{shape[2]}], got shape {tuple(log_decay.shape)}")
    _check_device("log_decay", log_decay, q)
    if log_decay.requires_grad:
        raise ValueError("log_decay must not require a gradient: none is computed for it; pass log_decay.detach()")


def _check_indices(name: str, indices: Tensor, q: Tensor, **sizes: int) -> None:
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {indices.dtype}")
    if tuple(indices.shape) != tuple(sizes.values()):
        expected = f"[{', '.join(sizes)}] = {list(sizes.values())}"
        raise ValueError(f"{name} must be {expected}, got shape {tuple(indices.shape)}")
    _check_device(name, indices, q)


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")


def check_log_decay(log_decay: Tensor | None) -> None:
    """Refuse growth and NaN. Read where that is free: a tensor on an accelerator would have to be waited for."""
    if log_decay is not None and log_decay.is_cpu and not bool((log_decay <= 0).all()):
        raise ValueError(f"log_decay must be <= 0, got a maximum of {log_decay.max().item()}")


def sequence_bounds(cu_seqlens: Tensor, length: int) -> list[int]:
    """`cu_seqlens` on the host, checked: from 0 to `length`, never falling."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length:
        raise ValueError(f"cu_seqlens must run from 0 to T = {length}, got {bounds[0]} to {bounds[-1]}")
    if any(end < start for start, end in pairwise(bounds)):
        raise ValueError("cu_seqlens must not decrease")
    return bounds


def check_state_indices(state_indices: Tensor | None, num_states: int) -> None:
    """Refuse slots that are not there."""
    if state_indices is not None:
        _check_range("state_indices", state_indices, num_states)


def check_drafts(parents: Tensor | None, last: Tensor | None, length: int) -> None:
    """Refuse drafts that come before their parents, or are not there."""
    if last is not None:
        _check_range("last", last, length)
    if parents is None or not parents.is_cpu:
        return
    if not bool(((parents >= -1) & (parents < torch.arange(length))).all()):
        raise ValueError(f"parents must be -1 or the index of an earlier draft, got {parents.tolist()}")


def check_state_positions(state_positions: list[int], length: int) -> None:
    """Refuse those that do not rise, or are not there."""
    if any(later <= earlier for earlier, later in pairwise([0, *state_positions])) or state_positions[-1:] > [length]:
        raise ValueError(f"state_positions must rise from 1 to at most T = {length}, got {state_positions}")


def _check_range(name: str, indices: Tensor, size: int) -> None:
    """Read where that is free, as for `check_log_decay`."""
    if indices.is_cpu and indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < -1 or high >= size:
            raise ValueError(f"{name} must be -1 or in [0, {size}), got {low} to {high}")
