"""Position encodings."""

import math

import torch
from torch import Tensor, nn

from .float32 import Float32Module
from .sizes import check_size
from .values import has_values

# Tokens per block of positions: within a block, θ t in float32 is off by less than 3e-4.
BLOCK = 4096
# 2π as a sum whose first term has few bits, so that its multiples are exact in float32.
TWO_PI_HIGH, TWO_PI_LOW = 6.28125, 2 * math.pi - 6.28125


def _reduce_angle(angles: Tensor) -> Tensor:
    """Subtract the nearest multiple of 2π, to the precision of float32, for angles up to some thousands."""
    turns = (angles.detach() / (2 * math.pi)).round()
    return (angles - turns * TWO_PI_HIGH) - turns * TWO_PI_LOW


def _angles(theta: Tensor, positions: Tensor) -> Tensor:
    """θ t modulo 2π, of float32 θ `[...]` and int64 positions `[B, T]`: `[B, T, ...]`.

    In float32 θ t is off by a quarter of a radian at 4 million tokens. The angle of a block is reduced first.
    """
    blocks, rest = (
        t.view(*t.shape, *[1] * theta.dim()).to(theta.dtype) for t in (positions // BLOCK, positions % BLOCK)
    )
    return rest * theta + blocks * _reduce_angle(BLOCK * theta)


def int64_positions(positions: Tensor) -> Tensor:
    """Positions of any integer dtype as int64: other dtypes may not hold the bounds they are compared with.

    Raises:
        TypeError: positions are not integers.
    """
    if positions.dtype.is_floating_point or positions.dtype.is_complex or positions.dtype == torch.bool:
        raise TypeError(f"positions must be integers, got {positions.dtype}")
    return positions.long()


def out_of_range(positions: Tensor, max_positions: int) -> Tensor:
    """Mask of int64 positions that are not in `[0, max_positions)`.

    Raises:
        ValueError: there is one, where values are at hand: on a CPU, outside of traced graphs.
    """
    wrong = (positions < 0) | (positions >= max_positions)
    if has_values(positions) and wrong.any():
        raise ValueError(f"positions must be in [0, {max_positions}), got {positions[wrong][0].item()}")
    return wrong


class LearnedPositions(nn.Embedding):
    """Learned embeddings of integer positions `[B, T]`, to be added to those of tokens, `[B, T, W]`.

    A position out of range raises ValueError on a CPU, and gives NaN elsewhere.

    Args:
        max_positions: number of positions.
        hidden_size: width W.

    Raises:
        ValueError: a size is less than 1.
        TypeError: a size is not an integer.

    Source: BERT (arXiv 1810.04805), section 3; GPT.

    Example:
        >>> import torch
        >>> from lightning_attention.nn import LearnedPositions
        >>> LearnedPositions(128, 64)(torch.arange(10)[None]).shape
        torch.Size([1, 10, 64])
    """

    def __init__(self, max_positions: int, hidden_size: int):
        check_size("max_positions", max_positions)
        check_size("hidden_size", hidden_size)
        super().__init__(max_positions, hidden_size)

    def forward(self, positions: Tensor) -> Tensor:
        positions = int64_positions(positions)
        wrong = out_of_range(positions, self.num_embeddings)
        return super().forward(positions.masked_fill(wrong, 0)).masked_fill(wrong[..., None], torch.nan)


class LRPE(Float32Module):
    """LRPE-d: `x -> [x cos(θ t), x sin(θ t)]` at position t with learned θ, `[B, T, H, D]` to `[B, T, H, 2 D]`.

    Products of queries and keys then depend on positions only through their distance. θ is initialised as
    `10000^(-2 i / d)`, `i = 0..d-1`, over the `d` channels of all heads. Angles are float32 in models of any dtype.

    Args:
        num_heads: number of heads H.
        head_dim: channels D of a head of the input.

    Raises:
        ValueError: a size is less than 1.
        TypeError: a size is not an integer.

    Source: TransNormerLLM (arXiv 2307.14995), equations 3 and 4.

    Example:
        >>> import torch
        >>> from lightning_attention.nn import LRPE
        >>> LRPE(num_heads=4, head_dim=16)(torch.randn(2, 10, 4, 16), torch.arange(10)[None]).shape
        torch.Size([2, 10, 4, 32])
    """

    theta: nn.Parameter

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        check_size("num_heads", num_heads)
        check_size("head_dim", head_dim)
        self.theta = nn.Parameter(self.initial_theta(num_heads, head_dim))

    @staticmethod
    def initial_theta(num_heads: int, head_dim: int, device: torch.device | None = None) -> Tensor:
        """θ as published, `[H, D]` float32."""
        channels = num_heads * head_dim
        exponents = torch.arange(channels, dtype=torch.float64, device=device) * (-2 / channels)
        return torch.pow(10000.0, exponents).float().view(num_heads, head_dim)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Encode integer `positions` `[B, T]` or `[1, T]` in x `[B, T, H, D]`; returns `[B, T, H, 2 D]`."""
        positions = int64_positions(positions)
        theta = self.theta.to(torch.promote_types(self.theta.dtype, torch.float32))  # a loader may have rounded it
        angles = _angles(theta, positions)
        return torch.cat([x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)], dim=-1)


class RoPE(nn.Module):
    """Rotary positions: rotate channels `i` and `i + D / 2` of a head by the angle `θ_i t / s`, `θ_i = b^(-2 i / D)`.

    Products of queries and keys depend on positions only through their distance. A factor s above 1 is Position
    Interpolation: positions up to s times those of training, at the angles of training.

    Args:
        head_dim: channels D of a head, even.
        base: b, above 1.
        factor: s, at least 1.

    Raises:
        ValueError: a value is out of range.
        TypeError: head_dim is not an integer.

    Source: RoFormer (arXiv 2104.09864), section 3.2.2; Position Interpolation (arXiv 2306.15595), equation 4.

    Example:
        >>> import torch
        >>> from lightning_attention.nn import RoPE
        >>> RoPE(16)(torch.randn(2, 10, 4, 16), torch.arange(10)[None]).shape
        torch.Size([2, 10, 4, 16])
    """

    def __init__(self, head_dim: int, *, base: float = 10000.0, factor: float = 1.0):
        super().__init__()
        check_size("head_dim", head_dim)
        if head_dim % 2:
            raise ValueError(f"head_dim must be even, got {head_dim}")
        if not 1 < base < math.inf:
            raise ValueError(f"base must be above 1 and finite, got {base}")
        if not 1 <= factor < math.inf:
            raise ValueError(f"factor must be at least 1 and finite, got {factor}")
        self.head_dim, self.base, self.factor = head_dim, float(base), float(factor)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x `[B, T, H, D]` by integer `positions` `[B, T]` or `[1, T]`."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=x.device) / -self.head_dim
        theta = (torch.pow(self.base, exponents) / self.factor).to(torch.promote_types(x.dtype, torch.float32))
        angles = _angles(theta, int64_positions(positions))[:, :, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base}, factor={self.factor}"
