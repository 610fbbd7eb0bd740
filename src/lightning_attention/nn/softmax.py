"""Softmax attention in the block of the other token mixers."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.values import sequence_bounds
from .key_values import KeyValues
from .positions import RoPE
from .sizes import check_size
from .token_mixer import Slots, TokenMixer

MAX_FLASH_HEAD_DIM = 256


class SoftmaxAttention(TokenMixer):
    """Causal softmax attention, in the block of `GatedLightningAttention`: `W_o(SRMSNorm(o) ⊙ u)`.

    `o_t = Σ_s softmax_s(q_tᵀ k_s / √D) v_s` over tokens `s <= t`, with a window w over `t - w < s <= t`. Computed by
    `scaled_dot_product_attention`, FlashAttention-2 and others; packed sequences and windows on a GPU in bfloat16 or
    float16 by FlashAttention-2 for sequences of any length.

    In place of a state it takes `KeyValues`, and appends to them. It has no state of constant size, so there are no
    slots of a pool, training segments or ranks.

    Args:
        hidden_size: width W of input and output, a multiple of `num_heads`.
        num_heads: number of heads H, of D = W / H channels each.
        num_key_value_heads: heads of keys and values, which divide `num_heads` (grouped-query attention); by default H.
        rope: rotary positions of queries and keys; None is none.
        window: tokens that one attends to, itself included; None is all.
        eps: added to the mean square in the norm.
        norm, gate: see `TokenMixer`.

    Raises:
        ValueError: sizes do not divide each other, or one is less than 1; rope is made for other heads; tokens are
            shared by ranks.
        TypeError: a size is not an integer, or rope is not a `RoPE`.

    Source: Attention is all you need (arXiv 1706.03762); GQA (arXiv 2305.13245); Longformer (arXiv 2004.05150) for the
    window.

    Example:
        >>> import torch
        >>> from lightning_attention import nn
        >>> layer = nn.SoftmaxAttention(64, 4, rope=nn.RoPE(16))
        >>> y, _ = layer(torch.randn(2, 10, 64), torch.arange(10)[None])
        >>> y.shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_key_value_heads: int | None = None,
        rope: RoPE | None = None,
        window: int | None = None,
        eps: float = 1e-6,
        norm: str | None = "simple_rms",
        gate: bool = True,
    ):
        super().__init__(hidden_size, num_heads, eps, norm=norm, gate=gate, num_key_value_heads=num_key_value_heads)
        if window is not None:
            check_size("window", window)
        if rope is not None and not isinstance(rope, RoPE):
            raise TypeError(f"rope must be a RoPE or None, got {rope!r}")
        if rope is not None and rope.head_dim != self.head_dim:
            raise ValueError(f"rope must be made for heads of {self.head_dim} channels, got {rope.head_dim}")
        self.rope, self.window = rope, window

    def extra_repr(self) -> str:
        return f"num_key_value_heads={self.num_key_value_heads}, window={self.window}"

    @property
    def state_shape(self) -> tuple[int, int, int]:
        raise ValueError("softmax attention keeps keys and values of earlier tokens, and no state of constant size")

    def make_key_values(
        self,
        num_sequences: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        window: int | None = None,
        sinks: int = 0,
    ) -> KeyValues:
        """What to give as `state` before the first token of N sequences.

        With `window` and `sinks` it is StreamingLLM: an attention to all tokens keeps the first `sinks` and the last
        `window` of them alone, and sees sinks from no further away than the oldest of the others.

        Source: StreamingLLM (arXiv 2309.17453), section 3.2.
        """
        sizes = num_sequences, self.num_key_value_heads, self.head_dim
        if self.window is not None:
            window, sinks = self.window, 0
        return KeyValues(*sizes, window=window, sinks=sinks, dtype=dtype, device=device)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v, u = self.split_parts(self.qkvu_proj(x))
        q, k, v = self.split_heads(q, k, v)
        if self.rope is not None:
            heads = q.shape[2], k.shape[2]
            q, k = self.rope(torch.cat([q, k], dim=2), positions).split(heads, dim=2)
        return q, k, v, u

    def _check_slots(self, slots: Slots, q: Tensor, k: Tensor, v: Tensor, cu_seqlens, state) -> None:
        if not isinstance(state, KeyValues) or q.shape[1] != 1 or slots.saved is not None:
            raise ValueError("softmax attention has no pool of states: slots go with KeyValues, for single tokens")

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, state: Any, slots: Slots | None
    ) -> tuple[Tensor, KeyValues | None]:
        """Attention; keys and values are appended to the state."""
        if self.sequence_parallel is not None:
            raise ValueError("softmax attention has no states to exchange: sequence parallelism needs another one")
        if state is not None:
            self._check_key_values(state, q, cu_seqlens)
        if not torch.compiler.is_compiling() and q.numel() == 0:
            return torch.empty_like(q), state
        if state is None:
            if cu_seqlens is not None:
                return self._packed(q, k, v, cu_seqlens), None
            return (self._by_flash(q, k, v) if self.window and _has_flash(q) else self._causal(q, k, v)), None
        if cu_seqlens is None:
            counts = None if slots is None else (slots.of_sequences >= 0).long()
            return self._from_past(q, k, v, state, counts), state
        return self._packed_from_past(q, k, v, cu_seqlens, state), state

    def _check_key_values(self, state: KeyValues, q: Tensor, cu_seqlens: Tensor | None) -> None:
        if not isinstance(state, KeyValues):
            raise TypeError(f"state of softmax attention must be KeyValues, got {type(state).__name__}")
        num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        expected, kept = (num_sequences, self.num_key_value_heads, self.head_dim), state.keys.shape
        if (found := (len(state.lengths), *kept[2:])) != expected:
            raise ValueError(f"state has keys of shape [N, H, D] = {list(found)}, these inputs need {list(expected)}")
        if self.window is not None and (state.window != self.window or state.sinks):
            raise ValueError(f"state must have the layer's window of {self.window} and no sinks: make_key_values()")

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within batch rows `[B, T, H, D]`."""
        window, length = self.window, q.shape[1]
        if window is not None and torch.compiler.is_exporting():
            return _softmax_attention(q, k, v, _band(length, window, q.device)[None, None])
        if window is None or length <= window:
            return _softmax_attention(q, k, v, is_causal=True)
        # Blocks of as many tokens as the window attend to themselves and to the block before.
        padding = -length % window
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, window)) for x in (q, k, v))
        k, v = (torch.cat([F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x], dim=2).flatten(0, 1) for x in (k, v))
        i = torch.arange(window, device=q.device)[:, None]
        j = torch.arange(-window, window, device=q.device)
        mask = ((j <= i) & (j > i - window)).repeat(q.shape[1], 1, 1)
        mask[0] &= j >= 0
        o = _softmax_attention(q.flatten(0, 1), k, v, mask.repeat(q.shape[0], 1, 1)[:, None])
        return o.unflatten(0, (q.shape[0], -1)).flatten(1, 2)[:, :length]

    def _by_flash(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Attention of packed sequences, or of batch rows, by FlashAttention-2."""
        from torch.nn.attention.varlen import varlen_attn  # imports the compiler

        batch_size, length = q.shape[:2]
        if cu_seqlens is None:
            cu_seqlens = torch.arange(batch_size + 1, device=q.device) * length
        bounds = cu_seqlens.to(torch.int32)
        window = (-1 if self.window is None else self.window - 1, 0)
        q, k, v = (x.flatten(0, 1).contiguous() for x in (q, _repeated(k, q), _repeated(v, q)))
        o: Any = varlen_attn(q, k, v, bounds, bounds, length, length, window_size=window)
        return o.unflatten(0, (batch_size, length))

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Attention within the sequences of one batch row: in groups of similar lengths where there is no kernel."""
        if _has_flash(q):
            return self._by_flash(q, k, v, cu_seqlens)
        if torch.compiler.is_exporting():  # values are not known
            return self._masked(q, k, v, cu_seqlens)
        bounds = sequence_bounds(cu_seqlens, q.shape[1])
        groups: dict[int, list[tuple[int, int]]] = {}
        for start, end in pairwise(bounds):
            if end > start:
                groups.setdefault((end - start - 1).bit_length(), []).append((start, end))
        outputs, indices = [q.new_empty(0, *q.shape[2:])], [torch.empty(0, dtype=torch.int64, device=q.device)]
        for group in groups.values():
            starts, ends = torch.tensor(group, device=q.device).unbind(1)
            index = starts[:, None] + torch.arange(max(end - start for start, end in group), device=q.device)
            is_token = index < ends[:, None]
            rows = index.clamp_max(q.shape[1] - 1)
            outputs.append(self._causal(*(x[0][rows] for x in (q, k, v)))[is_token])
            indices.append(index[is_token])
        return torch.empty_like(q[0]).index_copy(0, torch.cat(indices), torch.cat(outputs))[None]

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Attention within the sequences of one batch row, by a mask of all pairs of tokens."""
        sequence = torch.searchsorted(cu_seqlens, torch.arange(q.shape[1], device=q.device), right=True)
        mask = (sequence[:, None] == sequence) & _band(q.shape[1], self.window, q.device)
        q, k, v = (x[0].transpose(0, 1) for x in (q, _repeated(k, q), _repeated(v, q)))
        scores = (q * self.head_dim**-0.5 @ k.mT).masked_fill(~mask, -torch.inf)
        return (scores.softmax(dim=-1) @ v).transpose(0, 1)[None]

    def _packed_from_past(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, past: KeyValues) -> Tensor:
        """Attention of packed tokens that go on from earlier ones of their sequences."""
        longest = max((end - start for start, end in pairwise(sequence_bounds(cu_seqlens, q.shape[1]))), default=0)
        if longest == 0:
            return q
        index = cu_seqlens[:-1, None] + torch.arange(longest, device=q.device)
        is_token = index < cu_seqlens[1:, None]
        rows = index.clamp_max(q.shape[1] - 1)
        q, k, v = (x[0][rows] for x in (q, k, v))
        return self._from_past(q, k, v, past, cu_seqlens.diff())[is_token][None]

    def _from_past(self, q: Tensor, k: Tensor, v: Tensor, past: KeyValues, counts: Tensor | None) -> Tensor:
        """Attention of tokens `[N, T, H, D]`, of each sequence the first `counts`, and of earlier ones to them."""
        length, before, is_even = q.shape[1], past.lengths, past.is_even and counts is None
        sees_all = past.window is None or past.longest + length <= past.keys.shape[1]
        if length == 1 and not torch.is_grad_enabled():
            past.append(k, v, counts)
            keys, values = past.read(q.dtype)
            if is_even and (sees_all or not past.sinks):
                return _softmax_attention(q, keys, values)
            return self._to_slots(q, keys, values, before[:, None], past.positions(before + 1), past)
        if past.longest == 0 and (past.window == self.window or sees_all):
            o = self._causal(q, k, v)
        else:
            keys, values = (torch.cat(pair, dim=1) for pair in zip(past.read(q.dtype), (k, v), strict=True))
            if is_even and sees_all:
                from torch.nn.attention.bias import causal_lower_right  # imports the compiler

                o = _softmax_attention(q, keys, values, causal_lower_right(length, keys.shape[1]))
            else:
                new = before[:, None] + torch.arange(length, device=q.device)
                old = past.positions(before)[:, : keys.shape[1] - length]
                o = self._to_slots(q, keys, values, new, torch.cat([old, new], dim=1), past)
        past.append(k.detach(), v.detach(), counts)
        return o

    def _to_slots(self, q: Tensor, k: Tensor, v: Tensor, new: Tensor, positions: Tensor, past: KeyValues) -> Tensor:
        """Attention of tokens at `new` `[N, T]` to keys at `positions` `[N, S]`, negative where there is none."""
        positions = positions[:, : k.shape[1]]
        at, new_at = positions[:, None, None], new[:, None, :, None]
        mask = (at >= 0) & (at <= new_at)
        if past.window is None:
            return _softmax_attention(q, k, v, mask)
        is_sink = positions < past.sinks
        mask &= (at > new_at - past.window) | is_sink[:, None, None]
        if not past.sinks or self.rope is None:
            return _softmax_attention(q, k, v, mask)
        # From as far as the tokens that are kept: other queries for sinks, in channels of their own.
        nearer = new.clamp_max(past.sinks + past.window - 1) - new
        q, scale = torch.cat([q, self.rope(q, nearer)], dim=-1), self.head_dim**-0.5
        is_sink = is_sink[:, :, None, None]
        k = torch.cat([k.masked_fill(is_sink, 0), k.masked_fill(~is_sink, 0)], dim=-1)
        return _softmax_attention(q, k, v, mask, scale=scale)


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """`[T, T]`, true where a token attends to another of its sequence."""
    i = torch.arange(length, device=device)
    distance = i[:, None] - i
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _has_flash(q: Tensor) -> bool:
    """True if FlashAttention-2 runs for these queries."""
    head_dim = q.shape[-1]
    is_supported = head_dim <= MAX_FLASH_HEAD_DIM and head_dim % 8 == 0
    return is_supported and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values with as many heads as the queries have."""
    times = q.shape[-2] // x.shape[-2]
    return x if times == 1 else x.repeat_interleave(times, dim=-2)


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """`scaled_dot_product_attention` of `[N, T, H, D]`, with a mask `[N, 1, T, S]` that is true where to attend."""
    q, k, v = (x.transpose(1, 2) for x in (q, _repeated(k, q), _repeated(v, q)))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale).transpose(1, 2)
