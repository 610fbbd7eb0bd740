"""Parts that both families of GPU kernels, `triton` and `hopper`, share: plans, segments, primitives of kernels."""

import os
import sys
from functools import cache
from importlib.util import find_spec

import torch


def product_precision(dtype: torch.dtype) -> str:
    """Precision of products, "tf32" or "ieee": for float32 as set for PyTorch's own products on a GPU."""
    is_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if is_tf32 else "ieee"


@cache
def triton_reasons(device: torch.device) -> list[str]:
    """Return reasons against Triton kernels on a device; none if they run."""
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
