"""Inputs of the operators: NamedTuples of tensors, of their metadata, or of operands of a plan."""

from typing import Generic, NamedTuple, TypeVar

import torch

X = TypeVar("X")


class Metadata(NamedTuple):
    """Properties of a tensor other than its values and its address."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def dim(self) -> int:
        return len(self.shape)


class AttentionInputs(NamedTuple, Generic[X]):
    """Inputs of attention: tensors, their metadata, or operands of a plan."""

    q: X
    k: X
    v: X
    log_decay: X | None
    initial_state: X | None
    cu_seqlens: X | None


class GradientInputs(NamedTuple, Generic[X]):
    """Inputs of the gradient: those of attention, and the gradients of its results."""

    q: X
    k: X
    v: X
    log_decay: X | None
    initial_state: X | None
    cu_seqlens: X | None
    do: X
    d_final_state: X | None


class PrefillInputs(NamedTuple, Generic[X]):
    """Inputs of prefill: those of attention, and the numbers of tokens after which states are asked for."""

    q: X
    k: X
    v: X
    log_decay: X | None
    initial_state: X | None
    cu_seqlens: X | None
    state_positions: X


class SlotPrefillInputs(NamedTuple, Generic[X]):
    """Inputs of prefill from and to the slots of a pool of states."""

    q: X
    k: X
    v: X
    log_decay: X | None
    state: X
    cu_seqlens: X | None
    state_indices: X | None
    has_initial_state: X | None
    state_positions: X | None
    saved_indices: X | None

    def from_states(self, initial_state: X) -> "AttentionInputs[X]":
        """Inputs of attention that starts from states outside of the pool."""
        return AttentionInputs(self.q, self.k, self.v, self.log_decay, initial_state, self.cu_seqlens)


class DecodingInputs(NamedTuple, Generic[X]):
    """Inputs of decoding, of one step or of drafts. Drafts are committed without a q."""

    q: X
    k: X
    v: X
    log_decay: X | None
    state: X
    state_indices: X | None
    parents: X | None = None
    last: X | None = None
    saved_indices: X | None = None


class AppendInputs(NamedTuple, Generic[X]):
    """Inputs of attention from decoding states, whose parts are `state`, `keys`, `values` and `count`.

    `lengths` `[B]` are the tokens of each batch row that are read, at most T; the others have output 0.
    """

    q: X
    k: X
    v: X
    log_decay: X | None
    state: X
    keys: X
    values: X
    count: X
    state_indices: X | None
    has_initial_state: X | None = None
    cu_seqlens: X | None = None
    lengths: X | None = None


class FoldInputs(NamedTuple, Generic[X]):
    """Inputs of `fold`, which adds the tokens of decoding states to the states."""

    keys: X
    values: X
    state: X
    count: X
    log_decay: X | None
    state_indices: X | None


class WriteInputs(NamedTuple, Generic[X]):
    """Inputs of `write_state`."""

    k: X
    v: X
    log_decay: X


class ReadInputs(NamedTuple, Generic[X]):
    """Inputs of `read_state_`, and `o`, which it writes."""

    o: X
    q: X
    state: X
    log_decay: X
