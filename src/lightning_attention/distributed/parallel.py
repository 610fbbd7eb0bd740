"""How a model's tokens are spread over a process group."""

from dataclasses import dataclass
from itertools import pairwise

import torch.distributed as dist
from torch import Tensor

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

    def bounds(self, length: int) -> list[int]:
        """`[W + 1]`, where slices of a row begin and end."""
        size = dist.get_world_size(self.group)
        return [length * rank // size for rank in range(size + 1)]

    def slice(self, length: int) -> slice:
        """The tokens of this rank."""
        rank = dist.get_rank(self.group)
        return slice(*self.bounds(length)[rank : rank + 2])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The attention of this rank's tokens, with `cu_seqlens` of the whole row, on the host."""
        lengths = [end - start for start, end in pairwise(self.bounds(int(cu_seqlens[-1])))]
        return lightning_attention(
            q, k, v, log_decay, group=self.group, cu_seqlens=cu_seqlens, lengths=lengths, strategy=self.strategy
        ).output
