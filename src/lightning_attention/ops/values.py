"""Checks of the values of inputs, on the CPU alone: the host would have to wait for those on an accelerator.

Operators check them when they run: tensors that are traced or transformed have none yet.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .inputs import AppendInputs, AttentionInputs, DecodingInputs, FoldInputs, PrefillInputs, SlotPrefillInputs


def check_attention_values(x: AttentionInputs[Tensor] | PrefillInputs[Tensor]) -> None:
    """Refuse values out of range, of tensors on the CPU."""
    check_log_decay(x.log_decay)
    if x.cu_seqlens is not None and x.cu_seqlens.is_cpu:
        sequence_bounds(x.cu_seqlens, x.q.shape[1])


def check_prefill_values(x: PrefillInputs[Tensor]) -> None:
    """Refuse values out of range, of tensors on the CPU."""
    check_attention_values(x)
    if x.state_positions.is_cpu:
        check_state_positions(x.state_positions.tolist(), x.q.shape[1])


def check_slot_prefill_values(x: SlotPrefillInputs[Tensor]) -> None:
    """Refuse values out of range, of tensors on the CPU, and slots that two states would be written to."""
    check_log_decay(x.log_decay)
    if x.cu_seqlens is not None and x.cu_seqlens.is_cpu:
        sequence_bounds(x.cu_seqlens, x.q.shape[1])
    if x.state_positions is not None and x.state_positions.is_cpu:
        check_state_positions(x.state_positions.tolist(), x.q.shape[1])
    written = []
    for name, indices in (("state_indices", x.state_indices), ("saved_indices", x.saved_indices)):
        if indices is not None:
            _check_range(name, indices, x.state.shape[0])
            written += [slot for slot in indices.flatten().tolist() if slot >= 0] if indices.is_cpu else []
    if x.state_indices is None:
        written += range(x.state.shape[0])
    if len(set(written)) < len(written):
        raise ValueError(
            f"state_indices and saved_indices must differ, since a slot keeps one state, got {sorted(written)}"
        )


def check_append_values(x: AppendInputs[Tensor]) -> None:
    """Refuse values out of range, of tensors on the CPU."""
    check_log_decay(x.log_decay)
    if x.cu_seqlens is not None and x.cu_seqlens.is_cpu:
        sequence_bounds(x.cu_seqlens, x.q.shape[1])
    if x.lengths is not None and x.lengths.is_cpu and x.lengths.numel():
        low, high = (int(bound) for bound in x.lengths.aminmax())
        if low < 0 or high > x.q.shape[1]:
            raise ValueError(f"lengths must be in [0, T = {x.q.shape[1]}], got {low} to {high}")
    _check_rings(x)


def check_fold_values(x: FoldInputs[Tensor]) -> None:
    """Refuse values out of range, of tensors on the CPU."""
    check_log_decay(x.log_decay)
    _check_rings(x)


def _check_rings(x: AppendInputs[Tensor] | FoldInputs[Tensor]) -> None:
    if x.state_indices is not None:
        _check_range("state_indices", x.state_indices, x.state.shape[0])
    if x.count.is_cpu and x.count.numel():
        low, high = (int(bound) for bound in x.count.aminmax())
        if low < 0 or high >= x.keys.shape[2]:
            raise ValueError(f"count must be in [0, {x.keys.shape[2]}), got {low} to {high}")


def check_distinct_slots(state_indices: Tensor | None) -> None:
    """Refuse slots that two sequences would update, where values are on the CPU."""
    if state_indices is not None and state_indices.is_cpu:
        used = [index for index in state_indices.tolist() if index >= 0]
        if len(set(used)) < len(used):
            raise ValueError(f"state_indices must differ, since each state is updated once, got {sorted(used)}")


def check_decoding_values(x: DecodingInputs[Tensor]) -> None:
    """Refuse values out of range, of tensors on the CPU."""
    check_log_decay(x.log_decay)
    if x.state_indices is not None:
        _check_range("state_indices", x.state_indices, x.state.shape[0])
    if x.last is not None:
        _check_range("last", x.last, x.q.shape[1])
    if x.parents is not None:
        _check_parents(x.parents, x.q.shape[1])


def check_update_values(x: DecodingInputs[Tensor]) -> None:
    """Refuse values out of range, of tensors on the CPU, and states that two batch rows would update."""
    check_decoding_values(x)
    if x.saved_indices is not None:
        _check_saved_indices(x.saved_indices, x.state_indices, x.state.shape[0])
    else:
        check_distinct_slots(x.state_indices)


def _check_saved_indices(saved: Tensor, read: Tensor | None, num_slots: int) -> None:
    """Refuse slots `[B]` or `[B, T]` that several states are written to, or that another batch row reads."""
    _check_range("saved_indices", saved, num_slots)
    if not saved.is_cpu or not (read is None or read.is_cpu):
        return
    slots = list(range(len(saved))) if read is None else read.tolist()
    by_row = saved.reshape(len(saved), -1).tolist() if saved.numel() else []
    rows = enumerate(zip(slots, by_row, strict=False))
    written = [(slot, row) for row, (before, after) in rows if before >= 0 for slot in after if slot >= 0]
    writers = dict(written)
    if len(writers) < len(written):
        raise ValueError(f"saved_indices must differ, since a slot keeps one state, got {saved.tolist()}")
    for row, slot in enumerate(slots):
        if (writer := writers.get(slot, row)) != row:
            raise ValueError(
                f"saved_indices of batch row {writer} must not hold slot {slot}, which batch row {row} reads"
            )


def check_log_decay(log_decay: Tensor | None) -> None:
    """Refuse growth and NaN."""
    if log_decay is None or not log_decay.is_cpu:
        return
    values = log_decay.tolist()  # in Python, where comparing a few numbers takes less than a call of PyTorch
    if max(values) <= 0 and sum(values) <= 0:  # a sum with NaN is NaN
        return
    largest = log_decay.max().item()
    hint = "; slopes > 0 have to be negated: pass -slopes" if largest > 0 else ""
    raise ValueError(f"log_decay must be <= 0, got a maximum of {largest}{hint}")


def sequence_bounds(cu_seqlens: Tensor, length: int) -> list[int]:
    """`cu_seqlens` on the host, checked: from 0 to `length`, never falling."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length:
        raise ValueError(f"cu_seqlens must run from 0 to T = {length}, got {bounds[0]} to {bounds[-1]}")
    if any(end < start for start, end in pairwise(bounds)):
        raise ValueError("cu_seqlens must not decrease")
    return bounds


def _check_parents(parents: Tensor, length: int) -> None:
    if not parents.is_cpu:
        return
    if not bool(((parents >= -1) & (parents < torch.arange(length, device=parents.device))).all()):
        raise ValueError(f"parents must be -1 or the index of an earlier draft, got {parents.tolist()}")


def check_state_positions(state_positions: list[int], length: int) -> None:
    """Refuse positions that do not rise, or lie outside of the tokens."""
    if any(later <= earlier for earlier, later in pairwise([0, *state_positions])) or state_positions[-1:] > [length]:
        raise ValueError(f"state_positions must rise from 1 to at most T = {length}, got {state_positions}")


def _check_range(name: str, indices: Tensor, size: int) -> None:
    if indices.is_cpu and indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < -1 or high >= size:
            raise ValueError(f"{name} must be -1 or in [0, {size}), got {low} to {high}")
