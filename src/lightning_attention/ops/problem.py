"""The checks of every call: shapes, dtypes and devices, which make a `Problem`, and on the CPU values."""

import math
from collections.abc import Mapping, Sequence
from math import prod
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inputs import (
    AppendInputs,
    AttentionInputs,
    DecodingInputs,
    FoldInputs,
    GradientInputs,
    Metadata,
    PrefillInputs,
    SlotPrefillInputs,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the state, and of every accumulation, for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensors(required: Mapping[str, object], optional: Mapping[str, object]) -> None:
    """Refuse arguments, by name, that are not dense tensors; optional ones may be None."""
    for name, x in required.items():
        if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested:
            raise _not_a_dense_tensor(name, "a dense tensor", x)
    for name, x in optional.items():
        if x is not None and (not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested):
            raise _not_a_dense_tensor(name, "a dense tensor or None", x)


def _not_a_dense_tensor(name: str, expected: str, x: object) -> TypeError:
    if not isinstance(x, Tensor):
        return TypeError(f"{name} must be {expected}, got {type(x).__name__}")
    return TypeError(f"{name} must be {expected}, got {'a nested tensor' if x.is_nested else x.layout}")


def checked_scale(scale: object) -> float:
    """`scale` as a float; refuses what is not a finite number."""
    if type(scale) is not float:
        if isinstance(scale, bool) or not isinstance(scale, (int, float, Real, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"scale must be a number, got {type(scale).__name__}")
        try:
            scale = float(scale)
        except OverflowError:
            scale = math.inf
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    return scale


def check_backend(backend: object) -> None:
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string, got {type(backend).__name__}")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


# What the checks read.
Checked = Tensor | Metadata
_ReadsSequences = (
    AttentionInputs[Tensor]
    | AttentionInputs[Metadata]
    | GradientInputs[Tensor]
    | GradientInputs[Metadata]
    | PrefillInputs[Tensor]
    | PrefillInputs[Metadata]
)


class Problem(NamedTuple):
    """Sizes of one attention or decoding call. The constructors `of_...` refuse inputs that do not fit together."""

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
    def of_attention(cls, x: _ReadsSequences) -> "Problem":
        if x.q.dim() != 4:
            raise ValueError(f"q must be [B, T, H, K], got shape {tuple(x.q.shape)}")
        _check_inputs(x.q, x.k, x.v, x.log_decay)
        if (cu_seqlens := x.cu_seqlens) is not None:
            if cu_seqlens.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
            if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
                raise ValueError(f"cu_seqlens must be [N + 1], got shape {tuple(cu_seqlens.shape)}")
            if x.q.shape[0] != 1:
                raise ValueError(f"cu_seqlens packs all sequences into one batch row: B must be 1, got {x.q.shape[0]}")
            _check_device("cu_seqlens", cu_seqlens, x.q)
        problem = cls._of(x.q, x.v, None if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        if x.initial_state is not None:
            problem._check_state("initial_state", x.initial_state, x.q)
        return problem

    @classmethod
    def of_gradient(cls, x: GradientInputs[Tensor] | GradientInputs[Metadata]) -> "Problem":
        return cls.of_attention(x)._replace(is_backward=True)

    @classmethod
    def of_prefill(cls, x: PrefillInputs[Tensor] | PrefillInputs[Metadata]) -> "Problem":
        problem = cls.of_attention(x)
        if x.state_positions.dim() != 1:
            raise ValueError(f"state_positions must be [M], got shape {tuple(x.state_positions.shape)}")
        _check_indices("state_positions", x.state_positions, x.q, M=x.state_positions.shape[0])
        return problem

    @classmethod
    def of_slot_prefill(cls, x: SlotPrefillInputs[Tensor] | SlotPrefillInputs[Metadata]) -> "Problem":
        attention: Any = AttentionInputs(x.q, x.k, x.v, x.log_decay, None, x.cu_seqlens)
        problem = cls.of_attention(attention)
        num_sequences = problem.num_states
        _check_writable("state", x.state)
        if x.state.dim() != 4:
            raise ValueError(f"state must be [N, H, K, V], got shape {tuple(x.state.shape)}")
        if x.state_indices is not None:
            _check_indices("state_indices", x.state_indices, x.q, N=num_sequences)
            problem = problem._replace(num_states=x.state.shape[0])
        problem._check_state("state", x.state, x.q, stored=(torch.bfloat16,))
        if x.has_initial_state is not None:
            _check_mask("has_initial_state", x.has_initial_state, x.q, num_sequences)
        if (positions := x.state_positions) is not None and x.saved_indices is not None:
            if positions.dim() != 1:
                raise ValueError(f"state_positions must be [M], got shape {tuple(positions.shape)}")
            _check_indices("state_positions", positions, x.q, M=positions.shape[0])
            _check_indices("saved_indices", x.saved_indices, x.q, B=x.q.shape[0], M=positions.shape[0])
        return problem._replace(num_states=num_sequences)

    @classmethod
    def of_step(cls, x: DecodingInputs[Tensor] | DecodingInputs[Metadata]) -> "Problem":
        """Decoding, which updates the state, with q, k, v as `[B, T, H, D]` or `[B, H, D]`."""
        _check_writable("state", x.state)
        problem = cls._of_decoding(x)
        if x.saved_indices is not None:
            sizes = dict(zip("BT", x.q.shape[:-2], strict=False))
            _check_indices("saved_indices", x.saved_indices, x.q, **sizes)
        return problem

    @classmethod
    def _of_decoding(cls, x: DecodingInputs[Tensor] | DecodingInputs[Metadata]) -> "Problem":
        if x.q.dim() not in (3, 4):
            raise ValueError(f"q must be [B, H, K] or [B, T, H, K], got shape {tuple(x.q.shape)}")
        _check_inputs(x.q, x.k, x.v, x.log_decay)
        if x.state.dim() != 4:
            raise ValueError(f"state must be [N, H, K, V], got shape {tuple(x.state.shape)}")
        num_states = None if x.state_indices is None else x.state.shape[0]
        problem = cls._of(x.q, x.v, num_states, x.parents is not None)
        problem._check_state("state", x.state, x.q, stored=(torch.bfloat16,))
        if x.state_indices is not None:
            _check_indices("state_indices", x.state_indices, x.q, B=x.q.shape[0])
        return problem

    @classmethod
    def of_drafts(cls, x: DecodingInputs[Tensor] | DecodingInputs[Metadata]) -> "Problem":
        """Drafts of speculative decoding."""
        if x.q.dim() != 4:
            raise ValueError(f"drafts must be [B, T, H, D], got shape {tuple(x.q.shape)}")
        problem = cls._of_decoding(x)
        if x.parents is not None:
            _check_indices("parents", x.parents, x.q, B=x.q.shape[0], T=x.q.shape[1])
        return problem

    @classmethod
    def of_accepted_drafts(cls, x: DecodingInputs[Tensor] | DecodingInputs[Metadata]) -> "Problem":
        """Drafts that update the state, up to the `last` one."""
        _check_writable("state", x.state)
        problem = cls.of_drafts(x)
        if x.last is not None:
            _check_indices("last", x.last, x.q, B=x.q.shape[0])
        return problem

    @classmethod
    def of_append(cls, x: AppendInputs[Tensor] | AppendInputs[Metadata]) -> "Problem":
        """Tokens `[B, T, H, D]` after those of decoding states."""
        attention: Any = AttentionInputs(x.q, x.k, x.v, x.log_decay, None, x.cu_seqlens)
        problem = cls.of_attention(attention)
        num_sequences = problem.num_states
        problem = problem._of_rings(x, x.q, num_sequences)
        if x.has_initial_state is not None:
            _check_mask("has_initial_state", x.has_initial_state, x.q, num_sequences)
        if x.lengths is not None:
            if x.cu_seqlens is not None:
                raise ValueError("lengths are of batch rows, and cu_seqlens packs sequences into one: give one of them")
            _check_indices("lengths", x.lengths, x.q, B=x.q.shape[0])
        return problem._replace(num_states=num_sequences)

    @classmethod
    def of_fold(cls, x: FoldInputs[Tensor] | FoldInputs[Metadata]) -> "Problem":
        """Decoding states whose rings are added to the states."""
        if x.keys.dim() != 4 or x.values.dim() != 4:
            raise ValueError(f"keys of the decoding state must be [N, H, C, K], got shape {tuple(x.keys.shape)}")
        (N, H, C, K), V = x.keys.shape, x.values.shape[3]
        if x.log_decay is not None:
            _check_log_decay(x.log_decay, x.keys, H)
        problem = cls(N, C, H, K, V, N, x.keys.dtype, x.keys.device)
        return problem._of_rings(x, x.keys, N if x.state_indices is None else x.state_indices.shape[0])

    def _of_rings(self, x: Any, like: Checked, num_sequences: int) -> "Problem":
        """Check decoding states, of slots if there are indices; `like` has the dtype and the device."""
        problem = self
        if x.state_indices is not None:
            if x.state_indices.dim() != 1:
                raise ValueError(f"state_indices must be [N], got shape {tuple(x.state_indices.shape)}")
            _check_indices("state_indices", x.state_indices, like, N=num_sequences)
            problem = problem._replace(num_states=x.state.shape[0])
        problem._check_state("state", x.state, like, stored=(torch.bfloat16,))
        num_slots, H = problem.num_states, problem.num_heads
        C = x.keys.shape[2] if x.keys.dim() == 4 else 0
        parts: dict[str, tuple[Any, tuple[int, ...], torch.dtype]] = {
            "keys": (x.keys, (num_slots, H, C, problem.key_dim), problem.dtype)
        }
        parts["values"] = x.values, (num_slots, H, C, problem.value_dim), problem.dtype
        parts["count"] = x.count, (num_slots, H), torch.int32
        for name, (part, shape, dtype) in parts.items():
            if tuple(part.shape) != shape:
                raise ValueError(f"{name} of the decoding state must be {list(shape)}, got shape {tuple(part.shape)}")
            if part.dtype != dtype:
                raise TypeError(f"{name} of the decoding state must be {dtype}, got {part.dtype}")
            _check_device(name, part, like)
        for name, part in {"state": x.state, **{name: part for name, (part, *_) in parts.items()}}.items():
            strides = part.strides if isinstance(part, Metadata) else part.stride()
            expected = [prod(part.shape[i + 1 :]) for i in range(1, part.dim())]
            if (0 not in part.shape and list(strides[1:]) != expected) or _overlaps(part):
                raise ValueError(f"{name} of the decoding state must be contiguous in each slot, got strides {strides}")
        return problem

    @classmethod
    def _of(cls, q: Checked, v: Checked, num_states: int | None, is_tree: bool = False) -> "Problem":
        batch_size, *length, num_heads, key_dim = q.shape
        return cls(
            batch_size,
            length[0] if length else 1,
            num_heads,
            key_dim,
            v.shape[-1],
            batch_size if num_states is None else num_states,
            q.dtype,
            q.device,
            is_tree,
        )

    def _check_state(self, name: str, state: Checked, q: Checked, stored: tuple[torch.dtype, ...] = ()) -> None:
        expected = (self.num_states, self.num_heads, self.key_dim, self.value_dim)
        if state.shape != expected:
            hint = _transposed_hint(q, state.shape[1]) if state.dim() == 4 else ""
            raise ValueError(f"{name} must be [N, H, K, V] = {list(expected)}, got shape {tuple(state.shape)}{hint}")
        if state.dtype != (wanted := state_dtype(self.dtype)) and (
            state.dtype not in stored or wanted == torch.float64
        ):
            allowed = (wanted, *(stored if wanted != torch.float64 else ()))
            names = " or ".join(map(str, allowed))
            raise TypeError(f"{name} must be {names} when q is {self.dtype}, got {state.dtype}")
        if state.device != self.device:
            _check_device(name, state, q)


def _check_writable(name: str, x: Checked) -> None:
    """Refuse a tensor that is updated in place if several of its elements share memory."""
    if _overlaps(x):
        strides = x.strides if isinstance(x, Metadata) else x.stride()
        raise ValueError(
            f"{name} is updated in place and its elements must not share memory, as of expanded tensors, got "
            f"shape {tuple(x.shape)} and strides {tuple(strides)}"
        )


def _overlaps(x: Checked) -> bool:
    """True if several elements of a tensor share memory."""
    strides, extent = x.strides if isinstance(x, Metadata) else x.stride(), 1
    for stride, size in sorted(zip(strides, x.shape, strict=True)):
        if size > 1 and stride < extent:
            return True
        extent += max(size - 1, 0) * stride
    return False


def _check_inputs(q: Checked, k: Checked, v: Checked, log_decay: Checked | None) -> None:
    shape, dtype = q.shape, q.dtype
    if k.shape != shape:
        raise ValueError(f"k must have the shape of q {tuple(shape)}, got {tuple(k.shape)}")
    if v.shape != shape and (v.dim() != len(shape) or v.shape[:-1] != shape[:-1]):
        raise ValueError(f"v must be {[*shape[:-1], 'V']} to fit q, got shape {tuple(v.shape)}")
    num_heads = shape[-2]
    if num_heads == 0:
        raise ValueError(f"q must have at least one head, got shape {tuple(shape)}")
    if dtype not in DTYPES:
        raise TypeError(f"q must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if k.dtype != dtype:
        raise TypeError(f"k must have the dtype of q {dtype}, got {k.dtype}")
    if v.dtype != dtype:
        raise TypeError(f"v must have the dtype of q {dtype}, got {v.dtype}")
    device = q.device
    if k.device != device or v.device != device:
        _check_device("k", k, q)
        _check_device("v", v, q)
    if log_decay is not None:
        _check_log_decay(log_decay, q, num_heads)


def _check_log_decay(log_decay: Checked, q: Checked, num_heads: int) -> None:
    if log_decay.dtype != torch.float32:
        raise TypeError(f"log_decay must be torch.float32, got {log_decay.dtype}")
    if log_decay.dim() != 1 or log_decay.shape[0] != num_heads:
        hint = _transposed_hint(q, log_decay.shape[0]) if log_decay.dim() == 1 else ""
        raise ValueError(f"log_decay must be [H] = [{num_heads}], got shape {tuple(log_decay.shape)}{hint}")
    if log_decay.device != q.device:
        _check_device("log_decay", log_decay, q)


def _transposed_hint(q: Checked, num_heads: int) -> str:
    """A hint at head-first inputs, a common cause of a wrong number of heads."""
    if q.dim() != 4 or q.shape[1] != num_heads or q.shape[2] == num_heads:
        return ""
    return f"; q of shape {tuple(q.shape)} looks like [B, H, T, D]: pass q, k and v as x.transpose(1, 2)"


def integers(name: str, values: object) -> list[int]:
    """A sequence of integers as a list."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise TypeError(f"{name} must be a tensor or a sequence of integers, got {type(values).__name__}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, Integral, torch.SymInt)):
            raise TypeError(f"{name} must hold integers, got {type(value).__name__}")
    return list(values)


def _check_indices(name: str, indices: Checked, q: Checked, **sizes: int) -> None:
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {indices.dtype}")
    if tuple(indices.shape) != tuple(sizes.values()):
        expected = f"[{', '.join(sizes)}] = {list(sizes.values())}"
        raise ValueError(f"{name} must be {expected}, got shape {tuple(indices.shape)}")
    _check_device(name, indices, q)


def _check_mask(name: str, mask: Checked, q: Checked, size: int) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be torch.bool, got {mask.dtype}")
    if tuple(mask.shape) != (size,):
        raise ValueError(f"{name} must be [N] = [{size}], got shape {tuple(mask.shape)}")
    _check_device(name, mask, q)


def _check_device(name: str, tensor: Checked, q: Checked) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
