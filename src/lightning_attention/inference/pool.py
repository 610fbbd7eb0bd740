"""Fixed memory for the states of many sequences."""

from collections import deque
from collections.abc import Collection, Sequence
from math import prod

import torch
from torch import Tensor

from ..models import LightningConfig

# A layer's states start at a multiple of so many numbers, as kernels like their addresses.
ALIGNMENT = 64


class PoolExhaustedError(RuntimeError):
    """Every slot is in use."""


class StatePool:
    """The states of at most `num_slots` sequences of a model, taken once and never more.

    A slot holds the states of all layers side by side, so that it is zeroed, copied or moved to the host at once. Slots
    are checked on the host: what is not allocated cannot be read or written.

    Args:
        config: of the model.
        num_slots: sequences, at most.
        device: where.
        dtype: float32, or bfloat16 for half the memory (and rounded at every token); float64 for a float64 model.

    Attributes:
        states: of every layer `[num_slots, H, K, V]`, as `LightningModel.advance` takes them.

    Raises:
        ValueError: `num_slots` is less than 1.
    """

    def __init__(
        self,
        config: LightningConfig,
        num_slots: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        self.num_slots = num_slots
        shapes = [config.layer_state_shape(i) for i in range(config.num_hidden_layers)]
        sizes = [-(-prod(shape) // ALIGNMENT) * ALIGNMENT for shape in shapes]
        with torch.inference_mode(False):  # or nothing outside of inference mode could write to them
            self._memory = torch.zeros(num_slots, sum(sizes), dtype=dtype, device=device)
            self.states = [
                layer[:, : prod(shape)].unflatten(1, shape)
                for layer, shape in zip(self._memory.split(sizes, dim=1), shapes, strict=True)
            ]
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
        """A slot, whatever is in it: `zero`, `copy` or `restore` comes next.

        Raises:
            PoolExhaustedError: all are in use.
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
        """The state before the first token."""
        self._check(*slots)
        if slots:
            self._memory[torch.tensor(slots, device=self._memory.device)] = 0

    def copy(self, source: int, target: int) -> None:
        self._check(source, target)
        self._memory[target] = self._memory[source]

    def snapshot(self, slot: int) -> Tensor:
        """A copy on the host, one row of numbers for all layers."""
        self._check(slot)
        return self._memory[slot].to("cpu", copy=True)

    def restore(self, slot: int, snapshot: Tensor) -> None:
        """What `snapshot` has returned, of this pool or another of the same model and dtype.

        Raises:
            ValueError: it does not fit this pool.
        """
        self._check(slot)
        if snapshot.shape != self._memory.shape[1:] or snapshot.dtype != self._memory.dtype:
            raise ValueError(
                f"a snapshot of this pool is {self._memory.shape[1]} numbers of {self._memory.dtype}, "
                f"got {tuple(snapshot.shape)} of {snapshot.dtype}"
            )
        self._memory[slot] = snapshot.to(self._memory.device)

    def _check(self, *slots: int) -> None:
        for slot in slots:
            if not 0 <= slot < self.num_slots:
                raise ValueError(f"a slot must be in [0, {self.num_slots}), got {slot}")
            if not self._is_used[slot]:
                raise ValueError(f"slot {slot} is not allocated")
