"""Linear attention with a feature map and a denominator."""

from contextlib import nullcontext

import torch
from torch import Tensor

from ..ops.custom_ops import autocast_dtype
from ..ops.decoding_state import DecodingState
from .feature_maps import FeatureMap
from .float32 import without_autocast
from .token_mixer import Slots, TokenMixer


class NormalizedLinearAttention(TokenMixer):
    """Linear attention with a feature map φ, in the block of `GatedLightningAttention`: `W_o(SRMSNorm(o) ⊙ u)`.

    `o_t = Σ_s φ(q_t)ᵀ φ(k_s) v_s / max(Σ_s φ(q_t)ᵀ φ(k_s), eps)` over tokens `s <= t`, with `q = x W_q`, `k = x W_k`,
    `v = x W_v` and `u = x W_u`. The state is `[N, H, F, D + 1]`: its last column sums keys, for the denominators.

    Args:
        hidden_size: width W of input and output, a multiple of `num_heads`.
        num_heads: number of heads H, of D = W / H channels each.
        feature_map: φ for heads of D channels; it has F features and the smallest denominator `eps`.
        eps: added to the mean square in the norm.
        norm, gate: see `TokenMixer`.

    Raises:
        ValueError: `hidden_size` is not a multiple of `num_heads`; a size is less than 1; eps is negative; the norm
            is unknown; or the feature map is made for another number of heads or channels.
        TypeError: a size is not an integer, gate is not a bool, or feature_map is not a `FeatureMap`.

    Source: Transformers are RNNs (arXiv 2006.16236), equations 9 to 12.

    Example:
        >>> import torch
        >>> from lightning_attention import nn
        >>> layer = nn.NormalizedLinearAttention(64, 4, nn.EluFeatures(16))
        >>> y, _ = layer(torch.randn(2, 10, 64), torch.arange(10)[None])
        >>> y.shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        feature_map: FeatureMap,
        *,
        eps: float = 1e-6,
        norm: str = "simple_rms",
        gate: bool = True,
    ):
        super().__init__(hidden_size, num_heads, eps, norm=norm, gate=gate)
        if not isinstance(feature_map, FeatureMap):
            raise TypeError(f"feature_map must be a FeatureMap, got {feature_map!r}")
        if feature_map.num_heads not in (None, num_heads):
            raise ValueError(f"feature_map must be made for {num_heads} heads, got {feature_map.num_heads}")
        if feature_map.head_dim not in (None, self.head_dim):
            channels = f"{self.head_dim} channels, got {feature_map.head_dim}"
            raise ValueError(f"feature_map must be made for heads of {channels}")
        self.feature_map = feature_map

    @property
    def can_be_invariant(self) -> bool:
        return self.feature_map.is_invariant

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.feature_map.num_features, self.head_dim + 1

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v, u = self.split_parts(self.qkvu_proj(x))
        q, k, v = self.split_heads(q, k, v)
        if q.dtype == torch.float16:  # denominators grow with the context, beyond the range of float16
            q, k, v = q.float(), k.float(), v.float()
        return self.feature_map(q, positions, is_query=True), self.feature_map(k, positions, is_query=False), v, u

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        state: Tensor | DecodingState | None,
        slots: Slots | None,
    ) -> tuple[Tensor, Tensor | DecodingState | None]:
        v = torch.cat([v, v.new_ones(1).expand(*v.shape[:-1], 1)], dim=-1)
        with without_autocast(q) if autocast_dtype(q) == torch.float16 else nullcontext():
            o, state = super().attend(q, k, v, cu_seqlens, state, slots)
        return o[..., :-1] / o[..., -1:].clamp_min(self.feature_map.eps), state
