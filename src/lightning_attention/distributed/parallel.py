"""How a model's tokens are spread over a process group."""

from dataclasses import dataclass
from itertools import pairwise

import torch.distributed as dist
from torch import Tensor

from ..ops.api import LightningAttentionOutput
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

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, cu_seqlens: Tensor, initial_state: Tensor | None
    ) -> LightningAttentionOutput:
        """The attention of this rank's tokens, with `cu_seqlens` of the whole row, on the host.

        With initial states there are final ones: each on the rank where the sequence ends, zero elsewhere.
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
            lengths=[end - start for start, end in pairwise(self.bounds(int(cu_seqlens[-1])))],
            strategy=self.strategy,
        )

    def sum(self, states: list[Tensor]) -> list[Tensor]:
        """Over the ranks, in place."""
        for state in states:
            dist.all_reduce(state, group=self.group)
        return states
