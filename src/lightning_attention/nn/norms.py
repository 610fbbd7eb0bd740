"""Norms, by their names in a configuration."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .sizes import check_choice, check_eps


class SimpleRMSNorm(nn.Module):
    """SRMSNorm: `x / (‖x‖₂ / √d)` over the last dimension `d`, without a weight.

    Args:
        eps: added to the mean square, >= 0.

    Raises:
        ValueError: eps is negative or not finite.
        TypeError: eps is not a number.

    Source: TransNormerLLM (arXiv 2307.14995), equation 10.

    Example:
        >>> import torch
        >>> from lightning_attention.nn import SimpleRMSNorm
        >>> SimpleRMSNorm(eps=0.0)(torch.tensor([3.0, 4.0])).square().mean()
        tensor(1.)
    """

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        check_eps(eps)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` with its weight in the dtype of the input, which may be bfloat16 in autocast.

    PyTorch has a kernel for one dtype alone, and warns of two.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


# From the size of the last dimension, and eps.
NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "simple_rms": lambda size, eps: SimpleRMSNorm(eps),
    "rms": RMSNorm,
    "layer": nn.LayerNorm,
}


def make_norm(name: str, size: int, eps: float) -> nn.Module:
    """A norm over a last dimension: "simple_rms", SRMSNorm; "rms", with a weight; "layer", with weight and bias.

    Raises:
        ValueError: the name is unknown, or eps is negative or not finite.
        TypeError: eps is not a number.

    Example:
        >>> from lightning_attention.nn import make_norm
        >>> make_norm("rms", 64, 1e-6)
        RMSNorm((64,), eps=1e-06, elementwise_affine=True)
    """
    check_choice("norm", name, NORMS)
    check_eps(eps)
    return NORMS[name](size, eps)
