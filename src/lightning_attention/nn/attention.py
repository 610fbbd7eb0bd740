"""The lightning attention layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops.api import lightning_attention, lightning_attention_prefill, lightning_attention_step
from ..ops.problem import check_log_decay, check_tensors, state_dtype
from .float32 import Float32Module
from .gates import activated_parts, gated_norm_linear
from .norms import SimpleRMSNorm
from .positions import LRPE
from .sizes import check_size

if TYPE_CHECKING:
    from ..distributed.parallel import SequenceParallel  # imports torch._dynamo, as `ops.compiler` does


class Decay(Float32Module):
    """Constant decay of one layer: `log_decay` `[H]` float32, natural logarithm per token, not in checkpoints.

    A module on the device "meta" keeps the values, and `to_empty` restores them.
    """

    log_decay: Tensor

    def __init__(self, log_decay: Tensor):
        super().__init__()
        _check_constant_decay(log_decay)
        self.values: list[float] = log_decay.tolist()
        self.register_buffer("log_decay", self.initial_log_decay(), persistent=False)

    def initial_log_decay(self, device: torch.device | str | None = None) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float32, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decay":
        super()._apply(fn, recurse)
        if not self.log_decay.is_meta:
            # After `to_empty` memory is uninitialised, and fn may be any function.
            with torch.no_grad(), torch.inference_mode(self.log_decay.is_inference()):
                self.log_decay.copy_(self.initial_log_decay("cpu"))
        return self


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
    check_log_decay(log_decay.cpu())


@dataclass(frozen=True)
class Slots:
    """Slots of a call's sequences in state pools `[num_slots, H, K, V]`; the same in every layer.

    Attributes:
        of_sequences: `[N]` int64, slot of each sequence; when single tokens are decoded, -1 is padding.
        saved: `[M]` int64, slots that receive intermediate states.
        saved_after: `[M]` int64, numbers of tokens of the packed input before each of these states, rising.
    """

    of_sequences: Tensor
    saved: Tensor | None = None
    saved_after: Tensor | None = None


class GatedLightningAttention(nn.Module):
    """Gated lightning attention (GLA): `W_o(SRMSNorm(attention(q, k, v)) ⊙ u)`.

    `q = silu(x W_q)`, `k = silu(x W_k)`, `v = x W_v`, `u = x W_u`, without biases. The norm runs over all heads
    together.

    Args:
        hidden_size: width W of input and output, a multiple of `num_heads`.
        num_heads: number of heads H, of D = W / H channels each.
        log_decay: `[H]` float32, natural logarithm of the decay per token, <= 0.
        lrpe: whether LRPE-d encodes positions in queries and keys, so that K = 2 D.
        eps: added to the mean square in the norm.

    Raises:
        ValueError: `hidden_size` is not a multiple of `num_heads`; a size is less than 1; eps is negative; or log_decay
            is not `[H]`, not <= 0, on the device meta, or requires a gradient.
        TypeError: a size is not an integer, or log_decay is not a float32 tensor.

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

    def __init__(self, hidden_size: int, num_heads: int, log_decay: Tensor, *, lrpe: bool = False, eps: float = 1e-6):
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_size("num_heads", num_heads)
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads = {num_heads}, got {hidden_size}")
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.qkvu_proj = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm = SimpleRMSNorm(eps)
        self.decay = Decay(log_decay)
        if len(log_decay) != num_heads:
            raise ValueError(f"log_decay must be [H] = [{num_heads}], got shape {tuple(log_decay.shape)}")
        self.lrpe = LRPE(num_heads, self.head_dim) if lrpe else None
        self.sequence_parallel: SequenceParallel | None = None

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        state: Tensor | None = None,
        slots: Slots | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix tokens.

        Args:
            x: `[B, T, W]`.
            positions: `[B, T]` or `[1, T]` integers, read by LRPE-d only.
            cu_seqlens: `[N + 1]` bounds of sequences packed into one batch row, see `lightning_attention`. With
                `sequence_parallel`, bounds in the tokens of all ranks, while x is this rank's slice.
            state: `[N, H, K, V]` float32, before the tokens. A single token without gradients updates it in place.
            slots: if `state` is a pool, the slots of the sequences, updated in place.

        Returns:
            Output `[B, T, W]`, and the state after the tokens, with gradients; None without `state`.
        """
        q, k, v, u = activated_parts(self.qkvu_proj(x))
        q, k, v = (y.unflatten(-1, (self.num_heads, self.head_dim)) for y in (q, k, v))
        if self.lrpe is not None:
            q, k = self.lrpe(q, positions), self.lrpe(k, positions)
        o, state = self._attend(q, k, v, cu_seqlens, state, slots)
        return gated_norm_linear(o.flatten(-2), u, self.norm, self.out_proj), state

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, state: Tensor | None, slots: Slots | None
    ) -> tuple[Tensor, Tensor | None]:
        log_decay = self.decay.log_decay
        if self.sequence_parallel is not None:
            assert cu_seqlens is not None
            return self.sequence_parallel.attend(q, k, v, log_decay, cu_seqlens, state)
        if state is None:
            return lightning_attention(q, k, v, log_decay, cu_seqlens=cu_seqlens)
        if cu_seqlens is None and q.shape[1] == 1 and not torch.is_grad_enabled():
            indices = None if slots is None else slots.of_sequences
            return lightning_attention_step(q, k, v, log_decay, state=state, state_indices=indices), state
        if slots is not None:
            return self._prefill(q, k, v, cu_seqlens, state, slots), state
        return lightning_attention(
            q, k, v, log_decay, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens
        )

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, pool: Tensor, slots: Slots
    ) -> Tensor:
        """Attend from the pool's states, and store the final states and copies in between in the pool."""
        inputs = {"initial_state": pool[slots.of_sequences].to(state_dtype(q.dtype)), "cu_seqlens": cu_seqlens}
        if slots.saved is None or slots.saved_after is None:
            o, final_state = lightning_attention(q, k, v, self.decay.log_decay, output_final_state=True, **inputs)
        else:
            o, final_state, saved = lightning_attention_prefill(
                q, k, v, self.decay.log_decay, state_positions=slots.saved_after, **inputs
            )
            pool[slots.saved] = saved[0].to(pool.dtype)
        assert final_state is not None
        pool[slots.of_sequences] = final_state.to(pool.dtype)
        return o
