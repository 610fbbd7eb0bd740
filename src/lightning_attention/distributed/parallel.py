"""How a model's tokens are spread over a process group."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.api import LightningAttentionOutput
from ..ops.problem import sequence_bounds
from .agreement import Agreement
from .attention import lightning_attention


@dataclass(frozen=True)
class SequenceParallel:
    """Rank r of W holds the tokens `[T r // W, T (r + 1) // W)` of a row of T, whatever its documents.

    Args:
        group: process group; None is the default one.
        strategy: how states travel, see `lightning_attention`.
    """

    group: "dist.ProcessGroup | None" = None
    strategy: str = "all-gather"

    @property
    def size(self) -> int:
        """W."""
        return dist.get_world_size(self.group)

    def bounds(self, length: int) -> list[int]:
        """`[W + 1]`, where slices of a row begin and end."""
        return [length * rank // self.size for rank in range(self.size + 1)]

    def slice(self, length: int) -> slice:
        """The tokens of this rank."""
        rank = dist.get_rank(self.group)
        return slice(*self.bounds(length)[rank : rank + 2])

    def agreement(self, near: Tensor) -> Agreement:
        """Context in which an error on one rank raises on every rank, until they `settle`.

        Args:
            near: a tensor on the device that this rank works on.
        """
        return Agreement(self.group, near)

    def settle(self, agreement: Agreement, length: int, cu_seqlens: Tensor, terms: Mapping[str, object]) -> None:
        """Raise on every rank unless each holds its slice of one row of tokens, and all agree on the terms.

        Args:
            agreement: the context that is open.
            length: the number of tokens that this rank holds.
            cu_seqlens: bounds of the documents in the whole row, on the host.
            terms: further values that must be equal on every rank, by their names in errors.

        Raises:
            ValueError: the ranks differ, or a slice has another length than `slice` says.
        """
        if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
            given = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
            raise ValueError(f"cu_seqlens must be [N + 1], int32 or int64, got {given}")
        bounds = sequence_bounds(cu_seqlens, total := int(cu_seqlens[-1]))
        lengths = agreement.settle(length, {"strategy": self.strategy, "cu_seqlens": bounds} | dict(terms))
        if lengths != (expected := self._lengths(total)):
            raise ValueError(f"the ranks must hold {expected} of the {total} tokens in cu_seqlens, got {lengths}")

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, cu_seqlens: Tensor, initial_state: Tensor | None
    ) -> LightningAttentionOutput:
        """The attention of this rank's tokens, with `cu_seqlens` of the whole row, on the host.

        Nothing is compared between ranks: a model calls `settle` once for all of its layers. With initial states
        there are final ones: each on the rank where the sequence ends, zero elsewhere.
        """
        return lightning_attention(
            q,
            k,
            v,
            log_decay,
            group=self.group,
            initial_state=initial_state,
            output_final_state=initial_state is not None,
            cu_seqlens=cu_seqlens,
            lengths=self._lengths(int(cu_seqlens[-1])),
            strategy=self.strategy,
            check=False,
        )

    def _lengths(self, length: int) -> list[int]:
        return [end - start for start, end in pairwise(self.bounds(length))]

    def sum(self, states: list[Tensor]) -> list[Tensor]:
        """Over the ranks, in place."""
        for state in states:
            dist.all_reduce(state, group=self.group)
        return states
