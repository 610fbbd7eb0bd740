"""Pool of states for many sequences, in memory of constant size."""

from collections import deque
from collections.abc import Collection, Sequence
from hashlib import blake2b
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..models import LightningConfig
from ..ops.decoding_state import DecodingState, chunk_size
from .checks import whole_number

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ALIGNMENT = 64  # numbers; tensors start at a multiple in a slot, for aligned loads in kernels
TAG = 16  # bytes at the start of a snapshot with rings that say which dtypes follow


class PoolExhaustedError(RuntimeError):
    """Raised when every slot is in use."""


class StatePool:
    """Recurrent states of up to `num_slots` sequences of a model, allocated once.

    A slot holds the states of all layers in consecutive memory, so that they are zeroed, copied or moved to the host by
    one operation. Methods refuse slots that are not allocated. With `ring_dtype` the states are decoding states, with
    rings of keys and values. A ring for bfloat16 heads of 128 takes 32 KiB with chunks of 64, on Hopper GPUs, and 16
    KiB with chunks of 32, on others, where the state in float32 takes 64 KiB.

    Args:
        config: configuration of the model.
        num_slots: number of slots.
        device: device of the states.
        dtype: float32; bfloat16 for half the memory, with rounding at every token, or with rings once in a chunk;
            float64 for a float64 model.
        ring_dtype: dtype of the model, for decoding states; None for plain states.

    Attributes:
        states: one tensor `[num_slots, H, K, V]` per layer, or one `DecodingState`, as `LightningModel.advance` takes
            them.

    Raises:
        TypeError: `num_slots` is not an integer, or the operators take no states of `dtype` or inputs of `ring_dtype`.
        ValueError: `num_slots` is less than 1.

    Example:
        >>> from lightning_attention.inference import StatePool
        >>> from lightning_attention.models import LightningConfig
        >>> pool = StatePool(LightningConfig.from_size("demo"), num_slots=4)
        >>> pool.zero([pool.allocate()])
        >>> pool.num_free
        3
    """

    def __init__(
        self,
        config: LightningConfig,
        num_slots: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        ring_dtype: torch.dtype | None = None,
    ):
        self.num_slots = num_slots = whole_number("num_slots", num_slots, at_least=1)
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        shapes = [config.layer_state_shape(i) for i in range(config.num_hidden_layers)]
        parts = [_parts(shape, dtype, ring_dtype, torch.empty(0, device=device).device) for shape in shapes]
        sizes = [-(-prod(shape) // ALIGNMENT) * ALIGNMENT * dtype.itemsize for layer in parts for shape, dtype in layer]
        self.states: list[Any] = []  # of one kind
        with torch.inference_mode(False):  # inference tensors could not be written outside of inference mode
            memory = torch.zeros(num_slots, sum(sizes), dtype=torch.uint8, device=device)
            self._memory = memory.view(dtype) if ring_dtype is None else memory
            self._tag = self._memory.new_tensor([] if ring_dtype is None else _tag(dtype, ring_dtype), device="cpu")
            memory = iter(memory.split(sizes, dim=1))
            for layer in parts:
                views = [next(memory).view(dtype)[:, : prod(shape)].unflatten(1, shape) for shape, dtype in layer]
                self.states.append(DecodingState(*views) if len(views) > 1 else views[0])
        self._free = deque(range(num_slots))
        self._is_used = [False] * num_slots

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Memory of all slots, in bytes."""
        return self._memory.nbytes

    def allocate(self) -> int:
        """Allocate a slot with undefined content; call `zero`, `copy` or `restore` next.

        Raises:
            PoolExhaustedError: all slots are in use.
        """
        if not self._free:
            raise PoolExhaustedError(f"all {self.num_slots} slots of the state pool are in use")
        slot = self._free.popleft()
        self._is_used[slot] = True
        return slot

    def free(self, slot: int) -> None:
        self._check(slot)
        self._is_used[slot] = False
        self._free.append(slot)

    def free_all_but(self, kept: Collection[int]) -> None:
        """Free every slot that is in use and not among `kept`."""
        for slot in range(self.num_slots):
            if self._is_used[slot] and slot not in kept:
                self.free(slot)

    def zero(self, slots: Sequence[int]) -> None:
        """Set slots to the state before the first token."""
        self._check(*slots)
        if slots:
            self._memory[torch.tensor(slots, device=self._memory.device)] = 0

    def copy(self, source: int, target: int) -> None:
        self._check(source, target)
        self._memory[target] = self._memory[source]

    def snapshot(self, slot: int) -> Tensor:
        """Copy the states of a slot to the host, as one vector; with rings of bytes."""
        self._check(slot)
        return torch.cat([self._tag, self._memory[slot].cpu()])

    def restore(self, slot: int, snapshot: Tensor) -> None:
        """Write a snapshot of this pool, or of another pool of the same model and dtypes, into a slot.

        Raises:
            ValueError: the snapshot does not fit this pool.
        """
        self._check(slot)
        tag, size = len(self._tag), len(self._tag) + self._memory.shape[1]
        if snapshot.shape != (size,) or snapshot.dtype != self._memory.dtype:
            raise ValueError(
                f"a snapshot of this pool is {size} numbers of {self._memory.dtype}, "
                f"got {tuple(snapshot.shape)} of {snapshot.dtype}"
            )
        if not torch.equal(snapshot[:tag].cpu(), self._tag):
            raise ValueError("the snapshot is of a pool whose states or rings have other dtypes")
        self._memory[slot] = snapshot[tag:].to(self._memory.device)

    def _check(self, *slots: int) -> None:
        for slot in slots:
            if not 0 <= slot < self.num_slots:
                raise ValueError(f"a slot must be in [0, {self.num_slots}), got {slot}")
            if not self._is_used[slot]:
                raise ValueError(f"slot {slot} is not allocated")


def _tag(dtype: torch.dtype, ring_dtype: torch.dtype) -> list[int]:
    return list(blake2b(f"{dtype} {ring_dtype}".encode(), digest_size=TAG).digest())


def _parts(
    shape: tuple[int, int, int], dtype: torch.dtype, ring_dtype: torch.dtype | None, device: torch.device
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the state of a layer, or of the parts of its decoding state."""
    if ring_dtype is None:
        return [(shape, dtype)]
    H, K, V = shape
    size = chunk_size(H, K, V, ring_dtype, device)
    return [(shape, dtype), ((H, size, K), ring_dtype), ((H, size, V), ring_dtype), ((H,), torch.int32)]
