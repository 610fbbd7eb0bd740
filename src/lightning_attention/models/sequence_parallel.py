"""Sequence parallelism of a model: the layout of a slice, and a comparison of the ranks once per forward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.agreement import Agreement
from ..nn import TokenMixer
from .cache import LightningCache
from .layout import BatchDescription, Layout


def slice_layout(x: Tensor, given: BatchDescription, cache: LightningCache | None) -> Layout:
    """Build the layout of this rank's slice `x` `[1, T, W]`.

    Raises:
        ValueError: an argument is missing, or not supported with sequence parallelism.
    """
    is_supported = x.shape[0] == 1 and given.attention_mask is given.seq_idx is cache is None
    if not is_supported or given.position_ids is None or given.cu_seqlens is None:
        raise ValueError(
            "sequence parallelism takes a slice of one batch row (B = 1) with position_ids, and the cu_seqlens of the "
            "complete batch row, and no attention_mask, seq_idx or cache"
        )
    return Layout((1, x.shape[1]), given.position_ids, given.cu_seqlens.cpu(), splits_rows=True)


@torch.compiler.disable(reason="ranks that share a sequence compare values on the host")
def compare_ranks(model: Any, agreement: Agreement, x: Tensor, layout: Layout, states: Sequence[Tensor] | None) -> None:
    """Raise on every rank unless all of them run the same forward pass; the layers then compare nothing more."""
    assert layout.cu_seqlens is not None
    mixers = [module for module in model.modules() if isinstance(module, TokenMixer)]
    decays = [mixer.log_decay for mixer in mixers if mixer.log_decay is not None]
    leaves = (x, *(states or ()), *model.parameters()) if torch.is_grad_enabled() else ()
    device = x.device.type
    terms = {
        "the width of the model": x.shape[-1],
        "the dtype of the model": str(x.dtype),
        "the dtype under autocast": str(torch.get_autocast_dtype(device))
        if torch.is_autocast_enabled(device)
        else None,
        "the device of the model": device,
        "log_decay of the layers": torch.stack(decays).tolist() if decays else None,
        "states": None if states is None else [(*state.shape, str(state.dtype)) for state in states],
        "gradient checkpointing": model.is_checkpointing,
        "a gradient for inputs, states or parameters": [leaf.requires_grad for leaf in leaves],
    }
    model.sequence_parallel.compare(agreement, x.shape[1], layout.cu_seqlens, terms)
