"""What a process reads, rows in data parallelism or the tokens of a row in sequence parallelism, and what it keeps."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..distributed.parallel import SequenceParallel
from ..models import LightningForCausalLM
from ..models.heads import IGNORED


@dataclass(frozen=True)
class Ranks:
    """This process among all: `data_size` groups of processes, each of which shares the tokens of its rows.

    Attributes:
        data_rank: which group.
        data_size: how many.
        sequence_parallel: the processes of the group.
    """

    data_rank: int
    data_size: int
    sequence_parallel: SequenceParallel

    @classmethod
    def of(cls, world_size: int, sequence_size: int, strategy: str, timeout: float) -> "Ranks":
        """Neighbours in rank share a row, so that its states stay on one machine where they can.

        They wait `timeout` seconds for one of them that does not answer.

        Raises:
            ValueError: the processes cannot be divided into groups of this size.
        """
        if world_size % sequence_size or not dist.is_initialized():
            raise ValueError(
                f"sequence_parallel must divide the number of processes, which torchrun sets: {world_size}, "
                f"got {sequence_size}"
            )
        group: Any = dist.new_subgroups(sequence_size, timeout=timedelta(seconds=timeout))[0]
        data_rank, data_size = dist.get_rank() // sequence_size, world_size // sequence_size
        return cls(data_rank, data_size, SequenceParallel(group, strategy))

    def collate(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """This process's slice of the rows of a `PackedDataset`, one after the other as one row.

        Tokens, positions and the labels to predict are those of the slice, `cu_seqlens` those of the whole.
        """
        whole = one_row(rows)
        length = whole["input_ids"].shape[1]
        whole["shift_labels"] = whole["labels"] = F.pad(whole["labels"][:, 1:], (0, 1), value=IGNORED)
        starts = (whole["position_ids"][0] == 0).nonzero()[:, 0]
        held = self.sequence_parallel.slice(length)
        sliced = {name: x[:, held] for name, x in whole.items()}
        return sliced | {"cu_seqlens": F.pad(starts, (0, 1), value=length)}


def one_row(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of a `PackedDataset` `[T]`, one after the other as `[1, B T]`; by its positions each begins a document."""
    names = "input_ids", "position_ids", "labels"
    return {name: torch.cat([row[name] for row in rows])[None] for name in names}


def all_processes(device_type: str) -> DeviceMesh:
    """A mesh of one dimension.

    Raises:
        ValueError: torchrun has started none.
    """
    if not dist.is_initialized():
        raise ValueError("fsdp needs the processes that torchrun starts")
    return init_device_mesh(device_type, (dist.get_world_size(),))


def shard(model: LightningForCausalLM, mesh: DeviceMesh) -> None:
    """Spread parameters, gradients and what the optimizer keeps over processes: FSDP2, a layer at a time."""
    modules: list[nn.Module] = [*model.model.layers, model]
    for module in modules:
        fully_shard(module, mesh=mesh)


def sum_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """Add up each of the values over all processes, in float64."""
    if not dist.is_initialized():
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return totals.tolist()
