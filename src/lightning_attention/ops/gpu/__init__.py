"""Parts that both families of GPU kernels, `triton` and `hopper`, share: plans, segments, primitives of kernels."""

from collections.abc import Callable
from functools import cache

import torch


def product_precision(dtype: torch.dtype) -> str:
    """Precision of products, "tf32" or "ieee": for float32 as set for PyTorch's own products on a GPU."""
    is_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if is_tf32 else "ieee"


def device_reasons(reasons: Callable[[torch.device], list[str]], device: torch.device) -> list[str]:
    """Reasons why a device cannot run a family of kernels: cached, and a constant in a traced graph."""
    if torch.compiler.is_dynamo_compiling():
        from ..compiler import constant_reasons

        return constant_reasons(reasons, device)
    return cached_reasons(reasons, device)


@cache
def cached_reasons(reasons: Callable[[torch.device], list[str]], device: torch.device) -> list[str]:
    return reasons(device)
