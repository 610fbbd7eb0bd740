"""Sequence parallelism of a model: its tokens are split evenly over a process group."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.api import LightningAttentionOutput
from ..ops.values import sequence_bounds
from .agreement import Agreement
from .attention import lightning_attention


@dataclass(frozen=True)
class SequenceParallel:
    """Rank r of W holds the tokens `[T r // W, T (r + 1) // W)` of a batch row of T tokens, for any sequences in it.

    Args:
        group: process group; None is the default group.
        strategy: how states are sent, see `lightning_attention`.

    Example:
        >>> import torch.distributed as dist
        >>> from lightning_attention.distributed.parallel import SequenceParallel
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun starts several
        >>> SequenceParallel().slice(10)
        slice(0, 10, None)
        >>> dist.destroy_process_group()
    """

    group: "dist.ProcessGroup | None" = None
    strategy: str = "all-gather"

    @property
    def size(self) -> int:
        """Number of ranks W."""
        return dist.get_world_size(self.group)

    def bounds(self, length: int) -> list[int]:
        """`[W + 1]` bounds of the slices of `length` tokens."""
        return [length * rank // self.size for rank in range(self.size + 1)]

    def slice(self, length: int) -> slice:
        """Tokens of this rank among `length`."""
        rank = dist.get_rank(self.group)
        return slice(*self.bounds(length)[rank : rank + 2])

    def agreement(self, tensor: Tensor) -> Agreement:
        """Context in which an error on one rank raises on every rank, until `compare`.

        Args:
            tensor: any tensor on the device of this rank.
        """
        return Agreement(self.group, tensor)

    def compare(self, agreement: Agreement, length: int, cu_seqlens: Tensor, terms: Mapping[str, object]) -> None:
        """Raise on every rank unless each holds its slice of one batch row and all have the same terms.

        Args:
            agreement: the open context.
            length: number of tokens on this rank.
            cu_seqlens: `[N + 1]` bounds of the sequences in the complete batch row, on the CPU.
            terms: other values that must be equal on every rank, by their names in errors.

        Raises:
            ValueError: the ranks differ, or a slice does not have the length of `slice`.
        """
        if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
            given = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
            raise ValueError(f"cu_seqlens must be [N + 1], int32 or int64, got {given}")
        bounds = sequence_bounds(cu_seqlens, total := int(cu_seqlens[-1]))
        lengths = agreement.compare(length, {"strategy": self.strategy, "cu_seqlens": bounds} | dict(terms))
        if lengths != (expected := self._lengths(total)):
            raise ValueError(f"the ranks must hold {expected} of the {total} tokens in cu_seqlens, got {lengths}")

    @torch.compiler.disable(reason="ranks that share a sequence communicate outside of graphs")
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        cu_seqlens: Tensor,
        initial_state: Tensor | None,
    ) -> LightningAttentionOutput:
        """Attention of this rank's tokens, with `cu_seqlens` of the complete batch row on the CPU.

        Compares nothing between ranks: a model calls `compare` once for all of its layers. With initial states, final
        states are returned: each on the rank where its sequence ends, zero elsewhere.
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
        """Sum states over the ranks, in place."""
        for state in states:
            dist.all_reduce(state, group=self.group)
        return states
