"""Positions."""

import math

import torch
from torch import Tensor, nn

from .float32 import Float32Module
from .sizes import check_size

BLOCK = 4096
# 2π in two parts, of which the first has so few bits that its multiples are exact.
TURN = 6.28125, 2 * math.pi - 6.28125


def _without_turns(angles: Tensor) -> Tensor:
    """Less the nearest multiple of 2π, to the precision of float32, for angles up to some thousands."""
    turns = (angles.detach() / (2 * math.pi)).round()
    return (angles - turns * TURN[0]) - turns * TURN[1]


class LRPE(Float32Module):
    """LRPE-d: `x -> [x cos(θ t), x sin(θ t)]` at position t, θ learned; doubles the head size.

    The products of queries and keys then depend on distance alone. θ starts as `10000^(-2 i / d)`, `i = 0..d-1`, over
    the `d` channels of all heads together. Angles are float32 whatever the dtype of the model.

    Args:
        num_heads: number of heads H.
        head_dim: head size D of the input.

    Raises:
        ValueError: a size is less than 1.
        TypeError: a size is not an integer.

    Source: TransNormerLLM (arXiv 2307.14995), equations 3 and 4.
    """

    theta: nn.Parameter

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        check_size("num_heads", num_heads)
        check_size("head_dim", head_dim)
        self.theta = nn.Parameter(self.initial_theta(num_heads, head_dim))

    @staticmethod
    def initial_theta(num_heads: int, head_dim: int, device: torch.device | None = None) -> Tensor:
        """`[H, D]` float32."""
        channels = num_heads * head_dim
        exponents = torch.arange(channels, dtype=torch.float64, device=device) * (-2 / channels)
        return torch.pow(10000.0, exponents).float().view(num_heads, head_dim)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x `[B, T, H, D]`, positions `[B, T]` or `[1, T]` integers; returns `[B, T, H, 2 D]`."""
        # θ t in float32 is off by a quarter of a radian at 4 million tokens; what BLOCK positions turn is not.
        blocks, rest = (t[..., None, None].to(self.theta.dtype) for t in (positions // BLOCK, positions % BLOCK))
        angles = rest * self.theta + blocks * _without_turns(BLOCK * self.theta)
        return torch.cat([x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)], dim=-1)
