"""Feature maps φ of linear attention: softmax's `exp(qᵀ k)` is replaced by `φ(q)ᵀ φ(k)`."""

import math

import torch
from torch import Tensor, nn

from .activations import one_plus_elu
from .float32 import Float32Module, without_autocast
from .positions import int64_positions, out_of_range
from .sizes import check_size


class FeatureMap(nn.Module):
    """Maps queries and keys `[B, T, H, D]` to features `[B, T, H, F]`.

    Attributes:
        num_features: F.
        eps: smallest denominator of an attention with these features.
        num_heads: number of heads H that the map is made for; None is any number.
        head_dim: channels D of a head that the map is made for; None is any number.
        is_invariant: whether features of a token have the same bits whatever else is in the batch, see
            `TokenMixer.invariant`.
    """

    num_features: int
    is_invariant: bool = False
    eps: float = 1e-6
    num_heads: int | None = None
    head_dim: int | None = None

    def forward(self, x: Tensor, positions: Tensor, *, is_query: bool) -> Tensor:
        """Features of x at integer `positions` `[B, T]` or `[1, T]`."""
        raise NotImplementedError


class EluFeatures(FeatureMap):
    """`φ(x) = elu(x) + 1`, positive, F = D.

    Args:
        head_dim: channels D of a head.

    Raises:
        TypeError, ValueError: a size is not an integer >= 1.

    Source: Transformers are RNNs (arXiv 2006.16236), equation 7.

    Example:
        >>> import torch
        >>> from lightning_attention.nn import EluFeatures
        >>> x, positions = torch.tensor([[[[0.0, 2.0]]]]), torch.zeros(1, 1, dtype=torch.int64)
        >>> EluFeatures(2)(x, positions, is_query=True)
        tensor([[[[1., 3.]]]])
    """

    is_invariant = True

    def __init__(self, head_dim: int):
        super().__init__()
        check_size("head_dim", head_dim)
        self.num_features = self.head_dim = head_dim

    def forward(self, x: Tensor, positions: Tensor, *, is_query: bool) -> Tensor:
        return one_plus_elu(x)


class CosFormerFeatures(FeatureMap):
    """`φ(x) = [relu(x) cos a, relu(x) sin a]` at position t, with `a = π (t + 1) / (2 M)`; F = 2 D.

    Products weigh a pair by `cos(π (i - j) / (2 M))`, which is positive for distances below M. A position that is not
    below M raises ValueError on a CPU, and gives NaN elsewhere.

    Args:
        head_dim: channels D of a head.
        max_positions: M.

    Raises:
        TypeError, ValueError: a size is not an integer >= 1.

    Source: cosFormer (arXiv 2202.08791), section 3.3.

    Example:
        >>> import torch
        >>> from lightning_attention.nn import CosFormerFeatures
        >>> x, positions = torch.randn(2, 10, 4, 16), torch.arange(10)[None]
        >>> CosFormerFeatures(16, max_positions=1024)(x, positions, is_query=True).shape
        torch.Size([2, 10, 4, 32])
    """

    is_invariant = True

    def __init__(self, head_dim: int, max_positions: int):
        super().__init__()
        check_size("head_dim", head_dim)
        check_size("max_positions", max_positions)
        self.num_features, self.head_dim, self.max_positions = 2 * head_dim, head_dim, max_positions

    def forward(self, x: Tensor, positions: Tensor, *, is_query: bool) -> Tensor:
        positions, dtype = int64_positions(positions), torch.promote_types(x.dtype, torch.float32)
        angles = (positions.to(dtype) + 1) * (math.pi / (2 * self.max_positions))
        angles = angles.masked_fill(out_of_range(positions, self.max_positions), torch.nan)[..., None, None]
        x = x.relu()
        return torch.cat([x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)], dim=-1)

    def extra_repr(self) -> str:
        return f"max_positions={self.max_positions}"


class RandomFeatures(FeatureMap, Float32Module):
    """Features by random directions, a constant buffer that is part of checkpoints and stays float32.

    Args:
        shape: shape of the directions, `[..., D]`.
        num_features: F.
        seed: seed of the directions: equal sizes and seeds give equal directions.
    """

    directions: Tensor

    def __init__(self, shape: tuple[int, ...], num_features: int, seed: int):
        super().__init__()
        self.shape, self.head_dim, self.num_features, self.seed = shape, shape[-1], num_features, seed
        device = torch.get_default_device()
        directions = torch.empty(shape, dtype=torch.float32) if device.type == "meta" else self.draw().to(device)
        self.register_buffer("directions", directions)

    def draw(self) -> Tensor:
        """Return the directions of this seed, float32 on the CPU."""
        return self._draw(torch.Generator("cpu").manual_seed(self.seed)).float()

    def _draw(self, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def _projected(self, x: Tensor, directions: Tensor) -> Tensor:
        """Products of x, float32 or float64, with directions `[..., R, D]`, without autocast."""
        with without_autocast(x):
            if directions.dim() == 2:
                return nn.functional.linear(x, directions)
            return torch.einsum("bthd,hrd->bthr", x, directions)

    def extra_repr(self) -> str:
        return f"num_features={self.num_features}, seed={self.seed}"


class RandomFourierFeatures(RandomFeatures):
    """Random Fourier features of random feature attention (RFA): `φ(x) = [sin(W x), cos(W x)] / √R` of normalised x.

    `x` is divided by its norm, so that `φ(q)ᵀ φ(k)` estimates `exp(qᵀ k)` up to a factor. The directions are `R` rows
    `W_r = σ ⊙ w_r` a head, with `w_r ~ N(0, I)` and a learned float32 σ `[H, D]`, 1 at first; F = 2 R. Estimates may be
    negative: denominators below `eps = 10 / R` are raised to it, the published code's bound at this scale.

    Args:
        num_heads: number of heads H.
        head_dim: channels D of a head.
        num_features: F, even; by default 2 D.
        seed: seed of the directions.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is less than 1, or the number of features is odd.

    Source: Random Feature Attention (arXiv 2103.02143), section 3.1, equations 4 and 8.

    Example:
        >>> import torch
        >>> from lightning_attention.nn import RandomFourierFeatures
        >>> x, positions = torch.randn(2, 10, 4, 16), torch.arange(10)[None]
        >>> RandomFourierFeatures(4, 16)(x, positions, is_query=True).shape
        torch.Size([2, 10, 4, 32])
    """

    def __init__(self, num_heads: int, head_dim: int, num_features: int | None = None, *, seed: int = 0):
        check_size("num_heads", num_heads)
        check_size("head_dim", head_dim)
        num_features = 2 * head_dim if num_features is None else num_features
        check_size("num_features", num_features)
        if num_features % 2:
            raise ValueError(f"num_features must be even, sines and cosines, got {num_features}")
        super().__init__((num_heads, num_features // 2, head_dim), num_features, seed)
        self.num_heads, self.eps = num_heads, 20 / num_features
        self.sigma = nn.Parameter(torch.ones(num_heads, head_dim, dtype=torch.float32))

    def _draw(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.shape, dtype=torch.float32, generator=generator, device="cpu")

    def forward(self, x: Tensor, positions: Tensor, *, is_query: bool) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y / (y.norm(dim=-1, keepdim=True) + 1e-3)
        angles = self._projected(y, (self.directions * self.sigma[:, None]).to(y.dtype))
        return (torch.cat([angles.sin(), angles.cos()], dim=-1) * (2 / self.num_features) ** 0.5).to(x.dtype)


class PositiveRandomFeatures(RandomFeatures):
    """Positive orthogonal random features (FAVOR+) of Performer: `φ(x)_r = (exp(w_r·x - ‖x‖²/2 - c) + ε) / √F`.

    `x` is divided by `D^(1/4)`, so that `φ(q)ᵀ φ(k)` estimates `exp(qᵀ k / √D)`. The directions w are orthogonal in
    blocks of D, with the lengths of normal vectors. For a query, c is the largest exponent among its features, which
    cancels in the attention; for a key it is 0, since a maximum over other tokens would not be causal. ε is 1e-6.

    Args:
        head_dim: channels D of a head.
        num_features: F; by default `D ln D`, rounded up to a multiple of 16, at most 256.
        seed: seed of the directions.

    Raises:
        TypeError, ValueError: a size is not an integer >= 1.

    Source: Performers (arXiv 2009.14794), lemma 1 and section 2.4.

    Example:
        >>> import torch
        >>> from lightning_attention.nn import PositiveRandomFeatures
        >>> x, positions = torch.randn(2, 10, 4, 16), torch.arange(10)[None]
        >>> PositiveRandomFeatures(16, 32)(x, positions, is_query=True).shape
        torch.Size([2, 10, 4, 32])
    """

    is_invariant = True

    def __init__(self, head_dim: int, num_features: int | None = None, *, seed: int = 0):
        check_size("head_dim", head_dim)
        num_features = default_positive_features(head_dim) if num_features is None else num_features
        check_size("num_features", num_features)
        super().__init__((num_features, head_dim), num_features, seed)

    def _draw(self, generator: torch.Generator) -> Tensor:
        F, D = self.shape
        blocks = torch.randn(-(-F // D), D, D, dtype=torch.float64, generator=generator, device="cpu")
        lengths = torch.randn(F, D, dtype=torch.float64, generator=generator, device="cpu").norm(dim=-1, keepdim=True)
        return torch.linalg.qr(blocks).Q.mT.flatten(0, 1)[:F] * lengths

    def forward(self, x: Tensor, positions: Tensor, *, is_query: bool) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32)) * self.shape[-1] ** -0.25
        exponents = self._projected(y, self.directions.to(y.dtype)) - y.square().sum(dim=-1, keepdim=True) / 2
        if is_query:
            exponents = exponents - exponents.detach().amax(dim=-1, keepdim=True)
        return ((exponents.exp() + 1e-6) * self.num_features**-0.5).to(x.dtype)


def default_positive_features(head_dim: int) -> int:
    """`D ln D`, rounded up to a multiple of 16; at most 256, the largest head size of the kernels on a GPU."""
    return min(16 * max(math.ceil(head_dim * math.log(head_dim) / 16), 1), 256)
