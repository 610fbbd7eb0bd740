"""Parts that both families of GPU kernels, `triton` and `hopper`, share: plans, segments, primitives of kernels."""

import torch


def product_precision(dtype: torch.dtype) -> str:
    """Precision of products, "tf32" or "ieee": for float32 as set for PyTorch's own products on a GPU."""
    is_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if is_tf32 else "ieee"
