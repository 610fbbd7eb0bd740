"""Portable GPU kernels, in Triton: NVIDIA from Ampere on. On a CPU they run under Triton's interpreter, for tests."""

from collections.abc import Callable
from importlib import import_module

import torch

from ..gpu import product_precision, triton_reasons
from ..problem import Problem
from .config import MAX_HEAD_DIM, MAX_TREE, scan_tiles

supports_cuda_graphs = True


def unsupported_reasons(problem: Problem) -> list[str]:
    reasons = triton_reasons(problem.device)
    if problem.dtype == torch.float64:
        reasons = [*reasons, "float64 has no tensor cores"]
    if problem.dtype == torch.bfloat16 and problem.device.type == "cpu":
        reasons = [*reasons, "the interpreter has no bfloat16 products"]
    if not (1 <= problem.key_dim <= MAX_HEAD_DIM and 1 <= problem.value_dim <= MAX_HEAD_DIM):
        sizes = f"K = {problem.key_dim} and V = {problem.value_dim}"
        reasons = [*reasons, f"head sizes must be 1 to {MAX_HEAD_DIM}, got {sizes}"]
    if problem.is_tree and problem.length > MAX_TREE:
        reasons = [*reasons, f"a tree must have at most {MAX_TREE} drafts, got {problem.length}"]
    return reasons


def is_slow(problem: Problem) -> bool:
    return False


def chunk_size(problem: Problem) -> int:
    dtype = problem.dtype
    return scan_tiles(problem.key_dim, problem.value_dim, dtype, product_precision(dtype)).C


def __getattr__(name: str) -> Callable:
    """Import the other functions of a backend when they are first called: triton need not be installed."""
    if name in ("forward", "prefill", "prefill_", "backward", "write_state", "read_state_"):
        module = ".launch"
    elif name in ("step", "verify", "commit"):
        module = ".decoding"
    elif name in ("append", "fold"):
        module = ".ring"
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = globals()[name] = getattr(import_module(module, __name__), name)
    return function
