"""Portable GPU kernels, in Triton: NVIDIA from Ampere on. On a CPU they run under Triton's interpreter, for tests."""

import os
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

from ..problem import Problem
from .config import MAX_HEAD_DIM, MAX_TREE

supports_cuda_graphs = True


def unsupported_reasons(problem: Problem) -> list[str]:
    reasons = reasons_of_device(problem.device)
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


def __getattr__(name: str) -> Callable:
    """Import the other functions of a backend when they are first called: triton need not be installed."""
    if name in ("forward", "prefill", "backward", "write_state", "read_state_"):
        module = ".launch"
    elif name in ("step", "verify", "commit"):
        module = ".decoding"
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = globals()[name] = getattr(import_module(module, __name__), name)
    return function


@cache
def reasons_of_device(device: torch.device) -> list[str]:
    """Why Triton kernels do not run on a device; empty if they do."""
    if find_spec("triton") is None:
        return ["triton is not installed"]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return [] if major >= 8 else [f"compute capability must be 8.0 or more, {device} has {major}.{minor}"]
    return [] if device.type == "cpu" and _is_interpreted() else [f"it runs on GPUs, got {device}"]


def _is_interpreted() -> bool:
    if "TRITON_INTERPRET" not in os.environ and "triton" not in sys.modules:
        return False  # without an import of triton, which takes 75 MB
    from triton import knobs

    return knobs.runtime.interpret
