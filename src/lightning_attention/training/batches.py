"""Batches of packed sequences for every process: endless for training, one pass for evaluation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed.parallel import SequenceParallel
from ..models.heads import IGNORED
from .corpus import PackedDataset
from .prefetch import prefetch

Items = list[dict[str, Tensor]]  # of a PackedDataset


@dataclass(frozen=True)
class Share:
    """Part of every batch that a data process reads: a process, or a group of processes that share sequences.

    Attributes:
        data_rank: index of the data process.
        data_size: number of data processes.
        batch_size: sequences of one data process in one batch.
    """

    data_rank: int
    data_size: int
    batch_size: int

    @property
    def total(self) -> int:
        """Sequences of all data processes in one batch."""
        return self.data_size * self.batch_size


@dataclass(frozen=True)
class TrainingBatches:
    """Endless batches of one process: shuffled epochs of the dataset, joined end to end.

    All data processes together read the sequences in this order. The sequences of an optimizer step therefore depend
    on their number alone, not on the number of processes, the batch size or gradient accumulation. If an epoch ends
    within a step, the next epoch fills the step.

    Attributes:
        dataset: the sequences.
        collate: makes a batch of sequences.
        share: part of every batch that this process reads.
        seed: seed of the order.
        num_batches: length to report, for the run as a whole.
        start: returns the number of sequences that were read before.
        device: where batches are yielded; a thread reads them ahead.
    """

    dataset: PackedDataset
    collate: Callable[[Items], Any]
    share: Share
    seed: int
    num_batches: int
    start: Callable[[], int]
    device: torch.device

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Any]:
        return prefetch(self._read(), self.device)

    def _read(self) -> Iterator[Any]:
        order = shuffled_epochs(len(self.dataset), self.seed, self.start())
        first, size = self.share.data_rank * self.share.batch_size, self.share.batch_size
        while True:
            batch = list(islice(order, self.share.total))
            yield self.collate([self.dataset[i] for i in batch[first : first + size]])


def shuffled_epochs(length: int, seed: int, start: int = 0) -> Iterator[int]:
    """Yield the indices below `length` epoch after epoch, shuffled by seed and epoch, from position `start` on."""
    first, skipped = divmod(start, length)
    for epoch in count(first):
        yield from map(int, _shuffled(length, [seed, epoch])[skipped:])
        skipped = 0


def _shuffled(length: int, seed: list[int]) -> np.ndarray:
    """Indices below `length` in random order, in as few bytes as they need."""
    indices = np.arange(length, dtype=np.min_scalar_type(length))
    np.random.default_rng(seed).shuffle(indices)
    return indices


def held_out_batches(dataset: PackedDataset, share: Share) -> Iterator[Items]:
    """Yield the sequences of one data process in batches; every sequence of the dataset goes to one data process.

    Data processes communicate while they read a batch, so all get equally many batches of equal size, filled up with
    sequences without labels.
    """
    for start in range(0, len(dataset), share.total):
        size = -(-min(share.total, len(dataset) - start) // share.data_size)
        first = start + share.data_rank * size
        yield [_item_or_filler(dataset, index) for index in range(first, first + size)]


def join_sequences(items: Items) -> dict[str, Tensor]:
    """Join sequences `[T]` of a `PackedDataset` into one batch row `[1, B T]`; positions restart with each."""
    names = "input_ids", "position_ids", "labels"
    return {name: torch.cat([item[name] for item in items])[None] for name in names}


def pack_sequences(items: Items) -> dict[str, Tensor]:
    """Join sequences into one batch row, with the `cu_seqlens` of their documents.

    The host counts the documents: a model that finds them in positions on a GPU waits for the GPU.
    """
    batch = join_sequences(items)
    return {"input_ids": batch["input_ids"], "labels": batch["labels"], "cu_seqlens": _cu_seqlens(batch)}


def join_and_slice(parallel: SequenceParallel, items: Items) -> dict[str, Tensor]:
    """Join sequences into one batch row and cut out the slice of this rank.

    Tokens, positions and shifted labels are those of the slice; `cu_seqlens` are those of the batch row.
    """
    batch = join_sequences(items)
    length = batch["input_ids"].shape[1]
    batch["shift_labels"] = batch["labels"] = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    tokens = parallel.slice(length)
    return {name: x[:, tokens] for name, x in batch.items()} | {"cu_seqlens": _cu_seqlens(batch)}


def _cu_seqlens(batch: dict[str, Tensor]) -> Tensor:
    """`[N + 1]` bounds of the documents in a batch row."""
    positions = batch["position_ids"][0]
    return F.pad((positions == 0).nonzero()[:, 0], (0, 1), value=len(positions))


def num_labels(items: Items) -> int:
    """Count the tokens to predict; the first token of a sequence is never predicted."""
    return sum(int((item["labels"][1:] != IGNORED).sum()) for item in items)


def has_labels(dataset: PackedDataset) -> bool:
    return any(num_labels([dataset[index]]) for index in range(len(dataset)))


def _item_or_filler(dataset: PackedDataset, index: int) -> dict[str, Tensor]:
    if index < len(dataset):
        return dataset[index]
    item = dataset[0]
    return item | {"labels": torch.full_like(item["labels"], IGNORED)}
