"""Batches read in the background are those of the iterator, and its thread ends."""

import threading
from collections.abc import Iterator
from itertools import count, islice

import pytest
import torch
from oracle import HAS_GPU

from lightning_attention.training.prefetch import AHEAD, prefetch

CPU = torch.device("cpu")


def failing_after(number: int) -> Iterator[int]:
    yield from range(number)
    raise ValueError("a damaged file")


@pytest.mark.parametrize("length", [0, 1, AHEAD, 10])
def test_batches_keep_their_order_and_end(length):
    assert list(prefetch(iter(range(length)), CPU)) == list(range(length))


def test_few_batches_are_read_ahead():
    read = []
    batches = prefetch(map(read.append, count()), CPU)
    list(islice(batches, 3))
    batches.close()
    assert 3 <= len(read) <= 3 + AHEAD


@pytest.mark.parametrize("number", [0, 1, 5])
def test_an_error_is_raised_in_place_of_its_batch(number):
    batches = prefetch(failing_after(number), CPU)
    assert list(islice(batches, number)) == list(range(number))
    with pytest.raises(ValueError, match="a damaged file"):
        next(batches)


@pytest.mark.parametrize("taken", [1, 5])
def test_the_thread_ends_with_the_iterator(taken):
    batches = prefetch(count(), CPU)
    threads = set(threading.enumerate())
    list(islice(batches, taken))
    (reader,) = set(threading.enumerate()) - threads
    batches.close()
    reader.join(timeout=10)
    assert not reader.is_alive()


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_batches_arrive_on_the_device():
    items = [(i, {"x": torch.full((1000,), i)}) for i in range(5)]
    for (number, batch), (expected, _) in zip(prefetch(iter(items), torch.device("cuda", 0)), items, strict=True):
        assert number == expected
        assert batch["x"].is_cuda
        assert batch["x"].eq(expected).all()
