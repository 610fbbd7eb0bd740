"""Positions."""

import torch
from torch import Tensor, nn

from .float32 import Float32Module


class LRPE(Float32Module):
    """LRPE-d: `x -> [x cos(θ t), x sin(θ t)]` at position t, θ learned; doubles the head size.

    The products of queries and keys then depend on distance alone. θ starts as `10000^(-2 i / d)`, `i = 0..d-1`, over
    the `d` channels of all heads together. Angles are float32 whatever the dtype of the model.

    Args:
        num_heads: number of heads H.
        head_dim: head size D of the input.

    Source: TransNormerLLM (arXiv 2307.14995), equations 3 and 4.
    """

    theta: nn.Parameter

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.theta = nn.Parameter(self.initial_theta(num_heads, head_dim))

    @staticmethod
    def initial_theta(num_heads: int, head_dim: int) -> Tensor:
        """`[H, D]` float32."""
        channels = num_heads * head_dim
        exponents = torch.arange(channels, dtype=torch.float64) * (-2 / channels)
        return torch.pow(10000.0, exponents).float().view(num_heads, head_dim)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x `[B, T, H, D]`, positions `[B, T]` or `[1, T]` integers; returns `[B, T, H, 2 D]`."""
        angles = positions[..., None, None].to(self.theta.dtype) * self.theta
        return torch.cat([x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)], dim=-1)
