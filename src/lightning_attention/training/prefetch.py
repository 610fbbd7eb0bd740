"""Batches that are read in the background, while the device computes."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor

T = TypeVar("T")
AHEAD = 2  # batches


def prefetch(batches: Iterator[T], device: torch.device) -> Generator[T, None, None]:
    """Yield batches in their order, on a device, while a thread reads the next ones.

    The thread copies batches to pinned memory, from where they are sent to an accelerator without waiting. An error in
    `batches` is raised here, in place of the batch. The thread ends with this iterator.

    Args:
        batches: tensors on the CPU, in any structure of tuples, lists and dicts; other values are yielded as they are.
        device: where to yield them.
    """
    is_host = device.type == "cpu"
    end: Any = object()

    def read() -> Any:
        batch = next(batches, end)
        return batch if is_host else recursively_apply(Tensor.pin_memory, batch)

    # Pinned memory belongs to the current device, which each thread has its own of.
    start = None if is_host else partial(torch.accelerator.set_device_index, device)
    reader = ThreadPoolExecutor(1, "batches", start)
    try:
        ahead = deque(reader.submit(read) for _ in range(AHEAD))
        while (batch := ahead.popleft().result()) is not end:
            ahead.append(reader.submit(read))
            yield batch if is_host else cast(T, send_to_device(batch, device, non_blocking=True))
    finally:
        reader.shutdown(cancel_futures=True)
