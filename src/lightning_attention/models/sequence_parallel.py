"""Errors and differences of the ranks that share the tokens of a model, found once a forward pass."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..distributed.agreement import Agreement
from ..nn import GatedLightningAttention
from .layout import Layout


def fails_on_every_rank(forward: Callable) -> Callable:
    """Decorate the forward pass of a model: an error on one rank before `settle` raises on every rank."""

    @wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.sequence_parallel is None:
            return forward(self, *args, **kwargs)
        with self.sequence_parallel.agreement(self.embed_tokens.weight) as self.agreement:
            try:
                return forward(self, *args, **kwargs)
            finally:
                self.agreement = None

    return call


@torch.compiler.disable(reason="ranks that share a sequence compare values on the host")
def settle(
    model: Any,
    agreement: Agreement,
    x: Tensor,
    layout: Layout,
    states: Sequence[Tensor] | None,
    checkpointing: bool,
) -> None:
    """Raise on every rank unless all of them make the same forward pass; the layers then compare nothing more."""
    assert layout.cu_seqlens is not None
    log_decay = [
        module.decay.log_decay.to(x.device) for module in model.modules() if isinstance(module, GatedLightningAttention)
    ]
    has_gradients = torch.is_grad_enabled()
    leaves = (x, *(states or ()), *model.parameters()) if has_gradients else ()
    device = x.device.type
    terms = {
        "the width of the model": x.shape[-1],
        "the dtype of the model": str(x.dtype),
        "the dtype under autocast": str(torch.get_autocast_dtype(device))
        if torch.is_autocast_enabled(device)
        else None,
        "the device of the model": device,
        "log_decay of the layers": torch.stack(log_decay).tolist(),
        "states": None if states is None else [(*state.shape, str(state.dtype)) for state in states],
        "gradient checkpointing": checkpointing,
        "a gradient for inputs, states or parameters": [leaf.requires_grad for leaf in leaves],
    }
    model.sequence_parallel.settle(agreement, x.shape[1], layout.cu_seqlens, terms)
