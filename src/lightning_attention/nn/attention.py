"""The lightning attention layer."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..ops.decoding_state import DecodingState
from ..ops.problem import check_tensors
from ..ops.quadratic import quadratic_attention
from ..ops.values import check_log_decay
from .activations import ACTIVATIONS
from .float32 import Float32Module
from .gates import activated_parts
from .positions import LRPE
from .sizes import check_bool, check_choice
from .token_mixer import Slots, TokenMixer


class Decay(Float32Module):
    """Constant decay of one layer: `log_decay` `[H]` float32, natural logarithm per token, not in checkpoints.

    A module keeps the values, changed ones too, while it is on the device "meta", and `to_empty` restores them.
    """

    log_decay: Tensor

    def __init__(self, log_decay: Tensor):
        super().__init__()
        _check_constant_decay(log_decay)
        self.values = _values(log_decay)
        self.register_buffer("log_decay", self.initial_log_decay(), persistent=False)

    def initial_log_decay(self, device: torch.device | str | None = None) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float32, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decay":
        if not self.log_decay.is_meta:
            self.values = _values(self.log_decay)
        super()._apply(fn, recurse)
        if not self.log_decay.is_meta:
            # After `to_empty` memory is uninitialised, and fn may be any function.
            with torch.no_grad(), torch.inference_mode(self.log_decay.is_inference()):
                self.log_decay.copy_(self.initial_log_decay("cpu"))
        return self


def _values(log_decay: Tensor) -> list[float]:
    """The values; NaN for a fake tensor, which has none."""
    return [math.nan] * len(log_decay) if isinstance(log_decay, FakeTensor) else log_decay.tolist()


def _check_constant_decay(log_decay: Tensor) -> None:
    check_tensors({"log_decay": log_decay}, {})
    if log_decay.is_meta:
        raise ValueError("log_decay must have values, got a tensor on meta: make it with device='cpu'")
    if log_decay.dtype != torch.float32:
        raise TypeError(f"log_decay must be torch.float32, got {log_decay.dtype}")
    if log_decay.dim() != 1:
        raise ValueError(f"log_decay must be [H], got shape {tuple(log_decay.shape)}")
    if log_decay.requires_grad:
        raise ValueError("log_decay must not require a gradient: it is a constant; pass log_decay.detach()")
    if not isinstance(log_decay, FakeTensor):
        check_log_decay(log_decay.cpu())


class GatedLightningAttention(TokenMixer):
    """Gated lightning attention (GLA): `W_o(SRMSNorm(attention(q, k, v)) ⊙ u)`.

    `q = silu(x W_q)`, `k = silu(x W_k)`, `v = x W_v`, `u = x W_u`, without biases. The norm runs over all heads
    together.

    Args:
        hidden_size: width W of input and output, a multiple of `num_heads`.
        num_heads: number of heads H, of D = W / H channels each.
        log_decay: `[H]` float32, natural logarithm of the decay per token, <= 0.
        lrpe: whether LRPE-d encodes positions in queries and keys, so that K = 2 D.
        eps: added to the mean square in the norm.
        activation: of q and k: "silu", "1+elu" or "none".
        norm, gate: see `TokenMixer`.

    Raises:
        ValueError: `hidden_size` is not a multiple of `num_heads`; a size is less than 1; eps is negative; the
            activation or the norm is unknown; or log_decay is not `[H]`, not <= 0, on the device meta, or requires a
            gradient.
        TypeError: a size is not an integer, lrpe or gate is not a bool, or log_decay is not a float32 tensor.

    Source: TransNormerLLM (arXiv 2307.14995), section 3.1.

    Example:
        >>> import torch
        >>> from lightning_attention import decay, nn
        >>> layer = nn.GatedLightningAttention(64, 4, decay.log_decay(4, preset="alibi"))
        >>> x, positions = torch.randn(2, 10, 64), torch.arange(10)[None]
        >>> y, _ = layer(x, positions)
        >>> y.shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        log_decay: Tensor,
        *,
        lrpe: bool = False,
        eps: float = 1e-6,
        activation: str = "silu",
        norm: str = "simple_rms",
        gate: bool = True,
    ):
        super().__init__(hidden_size, num_heads, eps, norm=norm, gate=gate)
        check_choice("activation", activation, ACTIVATIONS)
        check_bool("lrpe", lrpe)
        self.activation = activation
        self.decay = Decay(log_decay)
        if len(log_decay) != num_heads:
            raise ValueError(f"log_decay must be [H] = [{num_heads}], got shape {tuple(log_decay.shape)}")
        self.lrpe = LRPE(num_heads, self.head_dim) if lrpe else None

    @property
    def log_decay(self) -> Tensor:
        return self.decay.log_decay

    @property
    def can_be_invariant(self) -> bool:
        return True

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.head_dim * (1 if self.lrpe is None else 2), self.head_dim

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        qkvu = self.qkvu_proj(x)
        if self.gate and self.activation == "silu":
            q, k, v, u = activated_parts(qkvu)
        else:
            q, k, v, u = self.split_parts(qkvu)
            q, k = ACTIVATIONS[self.activation](q), ACTIVATIONS[self.activation](k)
        q, k, v = self.split_heads(q, k, v)
        if self.lrpe is not None:
            q, k = self.lrpe(q, positions), self.lrpe(k, positions)
        return q, k, v, u


class QuadraticLightningAttention(GatedLightningAttention):
    """`GatedLightningAttention` by Lightning Attention-1: products of all pairs of tokens, in quadratic time.

    It computes the same, and takes the same arguments. From a state, as in decoding, it goes on in linear time.

    Raises:
        ValueError: tokens are shared by ranks, which exchange states; and as `GatedLightningAttention`.

    Source: TransNormerLLM (arXiv 2307.14995), section 3.3.

    Example:
        >>> import torch
        >>> from lightning_attention import decay, nn
        >>> layer = nn.QuadraticLightningAttention(64, 4, decay.log_decay(4, preset="alibi"))
        >>> y, _ = layer(torch.randn(2, 10, 64), torch.arange(10)[None])
        >>> y.shape
        torch.Size([2, 10, 64])
    """

    @property
    def can_be_invariant(self) -> bool:
        return False

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        state: Tensor | DecodingState | None,
        slots: Slots | None,
    ) -> tuple[Tensor, Tensor | DecodingState | None]:
        if self.sequence_parallel is not None:
            raise ValueError("lightning-1 has no states to exchange: sequence parallelism needs another attention")
        if state is not None:
            return super().attend(q, k, v, cu_seqlens, state, slots)
        return quadratic_attention(q, k, v, self.log_decay, cu_seqlens=cu_seqlens), None
