"""CUDA graphs."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def record(call: Callable[[], Result], memory: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A call as a graph, and what it returned, which every replay makes anew.

    Args:
        call: run once before, so that what it compiles and allocates at first is not recorded.
        memory: `pool()` of another graph, whose memory this one may use while that one does not.
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
