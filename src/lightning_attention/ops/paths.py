"""Paths of drafts: the drafts from the state to each of them, in a tree."""

from typing import NamedTuple

import torch
from torch import Tensor


class Paths(NamedTuple):
    """Attributes:
    order: `[B, T, T]`, the drafts on the path of each draft, from the first; 0 after its end.
    depth: `[B, T]`, how many they are, the draft itself included.
    """

    order: Tensor
    depth: Tensor


def draft_paths(parents: Tensor) -> Paths:
    """Paths of a tree `[B, T]`, see `lightning_attention_verify`. Nothing waits for the device."""
    B, T = parents.shape
    draft = torch.arange(T, device=parents.device)
    parents = torch.minimum(parents.long(), draft - 1)  # values on an accelerator are not checked
    is_on_path = (draft[:, None] == draft) | (parents[:, :, None] == draft)
    for _ in range(max(T - 1, 0).bit_length()):  # twice as far each time
        is_on_path |= is_on_path.float() @ is_on_path.float() > 0
    depth = is_on_path.sum(dim=2)
    place = torch.where(is_on_path, depth[:, None] - 1, T)
    order = draft.new_zeros(B, T, T + 1).scatter_(2, place, draft.expand(B, T, T))
    return Paths(order[:, :, :T], depth)


def take(x: Tensor, order: Tensor) -> Tensor:
    """Drafts of `x` `[B, T, ...]` by their indices `[B, ...]`."""
    batch = torch.arange(len(x), device=x.device).view(-1, *[1] * (order.dim() - 1))
    return x[batch, order]
