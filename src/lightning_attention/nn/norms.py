"""Normalisation."""

import torch.nn.functional as F
from torch import Tensor, nn


class SimpleRMSNorm(nn.Module):
    """SRMSNorm: `x / (‖x‖₂ / √d)` over the last dimension, no weight.

    Args:
        eps: added to the mean square.

    Source: TransNormerLLM (arXiv 2307.14995), equation 10.
    """

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
