"""Gated linear unit."""

from torch import Tensor, nn

from .activations import ACTIVATIONS
from .gates import gated_linear
from .sizes import check_choice, check_size

GLU_ACTIVATIONS = "none", "silu"


class SimpleGLU(nn.Module):
    """SGLU: `W_o((x W_v) ⊙ (x W_u))`, a gated linear unit without biases, and by default without activation.

    Args:
        hidden_size: width W of input and output `[..., W]`.
        intermediate_size: width of `x W_v` and `x W_u`.
        activation: of `x W_v`: "none", or "silu" for SwiGLU.

    Raises:
        ValueError: a size is less than 1, or the activation is unknown.
        TypeError: a size is not an integer.

    Source: TransNormerLLM (arXiv 2307.14995), section 3.1.

    Example:
        >>> import torch
        >>> from lightning_attention.nn import SimpleGLU
        >>> SimpleGLU(64, 176)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, activation: str = "none"):
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_size("intermediate_size", intermediate_size)
        check_choice("activation", activation, GLU_ACTIVATIONS)
        self.activation = activation
        self.vu_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.out_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "none":
            return gated_linear(self.vu_proj(x), self.out_proj)
        v, u = self.vu_proj(x).chunk(2, dim=-1)
        return self.out_proj(ACTIVATIONS[self.activation](v) * u)
