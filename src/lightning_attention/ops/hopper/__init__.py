"""Kernels for Hopper GPUs (H100, H200), in Gluon, for bfloat16 and heads of 64 and 128: forward and backward."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

from ..problem import Problem
from .config import HEAD_DIMS, MIN_ELEMENTS, C

supports_cuda_graphs = True


def unsupported_reasons(problem: Problem) -> list[str]:
    if reasons := _reasons_of_device(problem.device):
        return reasons
    if problem.dtype == torch.float16:
        reasons = ["float16 scores and states could overflow here; the portable kernels scale them"]
    elif problem.dtype != torch.bfloat16:
        reasons = [f"q, k and v must be bfloat16, got {problem.dtype}"]
    if problem.key_dim not in HEAD_DIMS or problem.value_dim not in HEAD_DIMS:
        sizes = f"K = {problem.key_dim} and V = {problem.value_dim}"
        reasons = [*reasons, f"head sizes must be 64 or 128, got {sizes}"]
    return reasons


def is_slow(problem: Problem) -> bool:
    """True if the portable kernels are preferable: small forward problems, where launch overhead dominates."""
    head_dim = max(problem.key_dim, problem.value_dim)
    elements = problem.batch_size * problem.length * problem.num_heads * head_dim
    return not problem.is_backward and elements < MIN_ELEMENTS[head_dim]


def chunk_size(problem: Problem) -> int:
    return C


def __getattr__(name: str) -> Callable:
    """Import the other functions of a backend when they are first called: triton need not be installed."""
    if name not in ("forward", "prefill_", "backward", "append"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = globals()[name] = getattr(import_module(".launch", __name__), name)
    return function


@cache
def _reasons_of_device(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return [f"it runs on Hopper GPUs, got {device}"]
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return [f"compute capability must be 9.0, {device} has {capability[0]}.{capability[1]}"]
    return [] if _has_gluon() else ["triton must be 3.6 or later, for Gluon, which its kernels are written in"]


def _has_gluon() -> bool:
    """True if the installed Triton has the parts of Gluon that the kernels import."""
    if find_spec("triton") is None or find_spec("triton.experimental.gluon") is None:
        return False
    try:
        import_module(".kernels", __name__)
    except (ImportError, AttributeError):
        return False
    return True
