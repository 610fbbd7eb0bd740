"""Base class of token mixers with a recurrent state: projections, and attention from a state, slots or ranks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops.api import lightning_attention, lightning_attention_prefill_
from ..ops.autograd import need_gradients
from ..ops.decoding_api import attend_with_gradients, lightning_attention_step
from ..ops.decoding_state import DecodingState
from ..ops.problem import check_tensors
from .gates import gated_norm_linear
from .invariant import invariant_functions
from .norms import make_norm
from .sizes import check_bool, check_size
from .values import has_values

if TYPE_CHECKING:
    from ..distributed.parallel import SequenceParallel  # imports torch._dynamo, as `ops.compiler` does


@dataclass(frozen=True)
class Slots:
    """Slots of a call's sequences in state pools `[num_slots, H, K, V]`; the same in every layer.

    Pools are updated in place, without gradients. Values on an accelerator are not read by the host, so these are not
    checked.

    Attributes:
        of_sequences: `[N]` int32 or int64, slot of each sequence. When single tokens are decoded without `saved`, -1 is
            padding.
        saved: `[M]` int32 or int64, slots that receive intermediate states of one batch row (B = 1).
        saved_after: `[M]` int32 or int64, numbers of tokens of the batch row before each of these states, rising.

    Raises:
        TypeError: an attribute is not a tensor of int32 or int64.
        ValueError: a shape does not fit, or only one of `saved` and `saved_after` is given.
    """

    of_sequences: Tensor
    saved: Tensor | None = None
    saved_after: Tensor | None = None

    def __post_init__(self):
        saved = {"saved": self.saved, "saved_after": self.saved_after}
        check_tensors({"of_sequences": self.of_sequences}, saved)
        if (self.saved is None) != (self.saved_after is None):
            raise ValueError("saved and saved_after go together: give both or neither")
        for name, indices in {"of_sequences": self.of_sequences, **saved}.items():
            if indices is not None and indices.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name} must be int32 or int64, got {indices.dtype}")
            if indices is not None and indices.dim() != 1:
                raise ValueError(f"{name} must have one dimension, got shape {tuple(indices.shape)}")
        if self.saved is not None and self.saved_after is not None and self.saved.shape != self.saved_after.shape:
            shapes = f"shapes {tuple(self.saved.shape)} and {tuple(self.saved_after.shape)}"
            raise ValueError(f"saved and saved_after must both be [M], got {shapes}")


class TokenMixer(nn.Module):
    """Base of token mixers: projections to q, k, v and a gate u, the norm and the projection of the gated output.

    Args:
        hidden_size: width W of input and output, a multiple of `num_heads`.
        num_heads: number of heads H, of D = W / H channels each.
        eps: added to the mean square in the norm.
        norm: name of the norm of the output, over all heads together, see `make_norm`; None is no norm.
        gate: whether the normalised output is multiplied by u.
        num_key_value_heads: heads of k and v, which divide `num_heads`; by default `num_heads`.

    Attributes:
        invariant: whether results of a token have the same bits whatever else is in the batch, see
            docs/determinism.md; False at first. A mixer that cannot promise it refuses True.

    Raises:
        ValueError: `hidden_size` is not a multiple of `num_heads`; a size is less than 1; eps is negative; or the norm
            is unknown.
        TypeError: a size is not an integer, or gate is not a bool.

    Example:
        >>> import torch
        >>> from lightning_attention import nn
        >>> class Plain(nn.TokenMixer):
        ...     state_shape = (4, 16, 16)
        ...
        ...     def project(self, x, positions):
        ...         q, k, v, u = self.split_parts(self.qkvu_proj(x))
        ...         return *self.split_heads(q, k, v), u
        >>> y, _ = Plain(64, 4, eps=1e-6)(torch.randn(2, 10, 64), torch.arange(10)[None])
        >>> y.shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        eps: float,
        *,
        norm: str | None = "simple_rms",
        gate: bool = True,
        num_key_value_heads: int | None = None,
    ):
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_size("num_heads", num_heads)
        check_bool("gate", gate)
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads = {num_heads}, got {hidden_size}")
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.gate = gate
        self.num_key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        check_size("num_key_value_heads", self.num_key_value_heads)
        if num_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads must divide num_heads = {num_heads}, got {self.num_key_value_heads}")
        width = self.num_key_value_heads * self.head_dim
        self.widths = [hidden_size, width, width, *([hidden_size] if gate else [])]
        self.qkvu_proj = nn.Linear(hidden_size, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm = nn.Identity() if norm is None else make_norm(norm, hidden_size, eps)
        self.sequence_parallel: SequenceParallel | None = None
        self._invariant = False

    @property
    def invariant(self) -> bool:
        return self._invariant

    @invariant.setter
    def invariant(self, value: bool) -> None:
        check_bool("invariant", value)
        if value and not self.can_be_invariant:
            raise ValueError(f"invariant must be False for {type(self).__name__}: its bits depend on the batch")
        self._invariant = value

    @property
    def can_be_invariant(self) -> bool:
        """True if attention is by the operator, from projections whose bits for a token are its own."""
        return False

    @property
    def log_decay(self) -> Tensor | None:
        """`[H]` float32, natural logarithm of the decay per token; None is no decay."""
        return None

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape `(H, K, V)` of the state of one sequence."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        state: Tensor | DecodingState | None = None,
        slots: Slots | None = None,
    ) -> tuple[Tensor, Tensor | DecodingState | None]:
        """Mix tokens.

        Args:
            x: `[B, T, W]`.
            positions: `[B, T]` or `[1, T]` integers.
            cu_seqlens: `[N + 1]` bounds of sequences packed into one batch row, see `lightning_attention`. With
                `sequence_parallel`, bounds in the tokens of all ranks, while x is this rank's slice.
            state: `[N, H, K, V]` float32, before the tokens. A single token without gradients updates it in place. Or
                a `DecodingState`, which is always updated in place; no gradients flow to it.
            slots: if `state` is a pool, the slots of the sequences, updated in place.

        Returns:
            Output `[B, T, W]`, and the state after the tokens, with gradients; None without `state`.

        Raises:
            ValueError: slots are given without `state`, under sequence parallelism, or where gradients are needed; do
                not fit the sequences; or are out of range on a CPU. An invariant mixer cannot compute on these inputs.
        """
        with invariant_functions(x, self.invariant):
            return self._mix(x, positions, cu_seqlens, state, slots)

    def _mix(
        self,
        x: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | None,
        state: Tensor | DecodingState | None,
        slots: Slots | None,
    ) -> tuple[Tensor, Tensor | DecodingState | None]:
        q, k, v, u = self.project(x, positions)
        if slots is not None:
            self._check_slots(slots, q, k, v, cu_seqlens, state)
        o, state = self.attend(q, k, v, cu_seqlens, state, slots)
        o = o.flatten(-2).to(x.dtype if u is None else u.dtype)
        y = self.out_proj(self.norm(o)) if u is None else gated_norm_linear(o, u, self.norm, self.out_proj)
        return y, state

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return q and k `[B, T, H, K]`, v `[B, T, H, D]` and u `[B, T, W]`, which is None without a gate."""
        raise NotImplementedError

    def split_parts(self, qkvu: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v and u `[..., W]` of what `qkvu_proj` returns."""
        q, k, v, *u = qkvu.split(self.widths, dim=-1)
        return q, k, v, u[0] if u else None

    def split_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.unflatten(-1, (-1, self.head_dim)) for x in tensors)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        state: Tensor | DecodingState | None,
        slots: Slots | None,
    ) -> tuple[Tensor, Tensor | DecodingState | None]:
        """Attention of all heads by the operator, and the state after the tokens."""
        log_decay = self.log_decay
        if isinstance(state, DecodingState):
            return self._decode(q, k, v, cu_seqlens, state, slots), state
        if self.sequence_parallel is not None:
            if self.invariant:
                raise ValueError("an invariant layer cannot share sequences: sums of states depend on the ranks")
            assert cu_seqlens is not None
            return self.sequence_parallel.attend(q, k, v, log_decay, cu_seqlens, state)
        if state is None:
            return lightning_attention(q, k, v, log_decay, cu_seqlens=cu_seqlens, invariant=self.invariant)
        is_single = cu_seqlens is None and q.shape[1] == 1
        if slots is not None:
            if is_single and slots.saved is None:
                o = lightning_attention_step(q, k, v, log_decay, state=state, state_indices=slots.of_sequences)
                return o, state
            return self._prefill(q, k, v, cu_seqlens, state, slots), state
        if is_single and not torch.is_grad_enabled():
            return lightning_attention_step(q, k, v, log_decay, state=state), state
        return lightning_attention(
            q,
            k,
            v,
            log_decay,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            invariant=self.invariant,
        )

    def _decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        state: DecodingState,
        slots: Slots | None,
    ) -> Tensor:
        """Attend from decoding states, and update them."""
        if self.sequence_parallel is not None:
            raise ValueError("a DecodingState goes with no sequence parallelism")
        if need_gradients(q, k, v):
            o = attend_with_gradients(q, k, v, self.log_decay, state=state, cu_seqlens=cu_seqlens)
            with torch.no_grad():
                self._decode(q, k, v, cu_seqlens, state, slots)
            return o
        if cu_seqlens is None and q.shape[1] == 1 and (slots is None or slots.saved is None):
            indices = None if slots is None else slots.of_sequences
            return lightning_attention_step(q, k, v, self.log_decay, state=state, state_indices=indices)
        if slots is not None:
            return self._prefill(q, k, v, cu_seqlens, state, slots)
        return lightning_attention_prefill_(
            q, k, v, self.log_decay, state=state, cu_seqlens=cu_seqlens, invariant=self.invariant
        )

    def _check_slots(
        self,
        slots: Slots,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        state: Tensor | DecodingState | None,
    ) -> None:
        if state is None:
            raise ValueError("slots are indices into a pool of states: give the pool as state")
        if self.sequence_parallel is not None:
            raise ValueError("slots go with no sequence parallelism")
        if need_gradients(q, k, v, state if isinstance(state, Tensor) else None):
            raise ValueError("slots update state in place and keep no gradient: call the layer under torch.no_grad()")
        num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if slots.of_sequences.shape[0] != num_sequences:
            found = tuple(slots.of_sequences.shape)
            raise ValueError(f"slots.of_sequences must be [N] = [{num_sequences}], got shape {found}")
        if slots.saved is not None and q.shape[0] != 1:
            raise ValueError(f"slots.saved needs B = 1, got {q.shape[0]}: pack the sequences, with cu_seqlens")

    def _prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        pool: Tensor | DecodingState,
        slots: Slots,
    ) -> Tensor:
        """Attend from the pool's states, and store the final states and those in between in the pool."""
        num_slots = len(pool if isinstance(pool, Tensor) else pool.state)
        _check_range("slots.of_sequences", slots.of_sequences, num_slots)
        if slots.saved is not None:
            _check_range("slots.saved", slots.saved, num_slots)
        _check_distinct(slots)
        return lightning_attention_prefill_(
            q,
            k,
            v,
            self.log_decay,
            state=pool,
            state_indices=slots.of_sequences,
            state_positions=slots.saved_after,
            saved_indices=None if slots.saved is None else slots.saved[None],
            cu_seqlens=cu_seqlens,
            invariant=self.invariant and isinstance(pool, DecodingState),
        )


def _check_range(name: str, slots: Tensor, num_slots: int) -> None:
    """Refuse slots outside of the pool, where values are at hand; -1 would be the last slot."""
    if has_values(slots) and (wrong := slots[(slots < 0) | (slots >= num_slots)]).numel():
        raise ValueError(f"{name} must be in [0, num_slots = {num_slots}), got {wrong[0].item()}")


def _check_distinct(slots: Slots) -> None:
    """Refuse a slot that two states would be written to, where values are at hand."""
    written = slots.of_sequences if slots.saved is None else torch.cat([slots.of_sequences, slots.saved])
    if has_values(written) and len(written.unique()) < len(written):
        raise ValueError(f"a slot is given for several states, in slots.of_sequences and saved: {written.tolist()}")
