"""Which sequences a process reads: in training without end, in evaluation each sequence once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.heads import IGNORED
from .corpus import PackedDataset

Items = list[dict[str, Tensor]]  # of a PackedDataset


@dataclass(frozen=True)
class Share:
    """Which part of every batch a process reads.

    Attributes:
        data_rank: index of the process, or of its group if processes share sequences.
        data_size: number of processes, or of groups.
        batch_size: sequences of a process, or of a group, in one batch.
    """

    data_rank: int
    data_size: int
    batch_size: int

    @property
    def total(self) -> int:
        """Sequences of all processes in one batch."""
        return self.data_size * self.batch_size


@dataclass(frozen=True)
class TrainingBatches:
    """The batches of one process, without end: shuffled epochs of the dataset, joined end to end.

    All processes together read the sequences of that order in turn. So the sequences of an optimizer step depend on
    how many there are in a step, but not on how processes, batches and accumulation share them, and where an epoch
    ends in the middle of a step, the next epoch fills the step.

    Attributes:
        dataset: the sequences.
        collate: makes a batch of sequences.
        share: the part of this process.
        seed: of the order.
        num_batches: the length that is reported, of a whole run.
        start: returns the number of sequences that were read before.
    """

    dataset: PackedDataset
    collate: Callable[[Items], Any]
    share: Share
    seed: int
    num_batches: int
    start: Callable[[], int]

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Any]:
        order = shuffled_epochs(len(self.dataset), self.seed, self.start())
        first, size = self.share.data_rank * self.share.batch_size, self.share.batch_size
        while True:
            batch = list(islice(order, self.share.total))
            yield self.collate([self.dataset[i] for i in batch[first : first + size]])


def shuffled_epochs(length: int, seed: int, start: int = 0) -> Iterator[int]:
    """Indices below `length`, each once an epoch, in an order that seed and epoch determine, from position `start`."""
    first, skipped = divmod(start, length)
    for epoch in count(first):
        yield from map(int, np.random.default_rng([seed, epoch]).permutation(length)[skipped:])
        skipped = 0


def held_out_batches(dataset: PackedDataset, share: Share) -> Iterator[Items]:
    """The sequences of a process, each sequence of the dataset on one process.

    All processes get as many batches, of as many sequences, because they exchange data while they read a batch:
    a sequence without labels stands where there is none left.
    """
    for start in range(0, len(dataset), share.total):
        size = -(-min(share.total, len(dataset) - start) // share.data_size)
        first = start + share.data_rank * size
        yield [_or_ignored(dataset, index) for index in range(first, first + size)]


def num_labels(sequences: Items) -> int:
    """Tokens to predict: the first token of a sequence has no token before it."""
    return sum(int((sequence["labels"][1:] != IGNORED).sum()) for sequence in sequences)


def has_labels(dataset: PackedDataset) -> bool:
    return any(num_labels([dataset[index]]) for index in range(len(dataset)))


def _or_ignored(dataset: PackedDataset, index: int) -> dict[str, Tensor]:
    if index < len(dataset):
        return dataset[index]
    sequence = dataset[0]
    return sequence | {"labels": torch.full_like(sequence["labels"], IGNORED)}
