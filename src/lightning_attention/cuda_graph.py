"""Capture of CUDA graphs."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def record(call: Callable[[], Result], memory: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Capture a call as a CUDA graph; return the graph and the result, which every replay overwrites.

    Args:
        call: called once before the capture, for compilation and first allocations.
        memory: `pool()` of another graph, to share its memory; the two graphs must not run at the same time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory):
        result = call()
    return graph, result
