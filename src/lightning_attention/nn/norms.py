"""Normalisation."""

import torch.nn.functional as F
from torch import Tensor, nn

from .sizes import check_eps


class SimpleRMSNorm(nn.Module):
    """SRMSNorm: `x / (‖x‖₂ / √d)` over the last dimension, no weight.

    Args:
        eps: added to the mean square, >= 0.

    Raises:
        ValueError: eps is negative or not finite.
        TypeError: eps is not a number.

    Source: TransNormerLLM (arXiv 2307.14995), equation 10.
    """

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        check_eps(eps)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
