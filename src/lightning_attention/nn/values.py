"""Values of tensors that the host may read."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(x: Tensor) -> bool:
    """True if the host can read the values of x without waiting: on a CPU, outside of traced graphs."""
    return not torch.compiler.is_compiling() and x.is_cpu and not isinstance(x, FakeTensor)
