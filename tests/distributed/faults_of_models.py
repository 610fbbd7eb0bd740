"""Forward passes of a model with sequence parallelism and a fault on one rank."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from distributed.faults import error_of
from distributed.models import positions
from tiny_model import make_model, tokens
from torch import Tensor

from lightning_attention.distributed.parallel import SequenceParallel
from lightning_attention.models import LightningForCausalLM

T, STARTS = 21, [7, 10]


def all_inputs() -> dict[str, Tensor]:
    return {"input_ids": tokens(1, T), "position_ids": positions(T, STARTS)}


def change_decay(model: LightningForCausalLM) -> dict:
    model.get_buffer("model.layers.1.attention.decay.log_decay").mul_(2)
    return {}


def freeze(model: LightningForCausalLM) -> dict:
    model.model.layers[0].requires_grad_(False)
    return {}


def checkpoint(model: LightningForCausalLM) -> dict:
    with warnings.catch_warnings(action="ignore"):  # deprecated in transformers 5.24
        model.gradient_checkpointing_enable()
    return {}


def ring(model: LightningForCausalLM) -> dict:
    assert model.model.sequence_parallel is not None
    model.model.set_sequence_parallel(SequenceParallel(model.model.sequence_parallel.group, "ring"))
    return {}


def zero_states(model: LightningForCausalLM) -> dict:
    config = model.config
    shapes = [config.layer_state_shape(i) for i in range(config.num_hidden_layers)]
    return {"states": [torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes]}


# Faults of one rank alone: the change of its model or arguments, and its error.
RAISED: dict[str, tuple[Callable[[LightningForCausalLM], dict], str]] = {
    "token-unknown": (lambda _: {"input_ids": torch.full((1, 5), 1000)}, "IndexError: index out of range"),
    "argument-unknown": (
        lambda _: {"mask": None},
        "TypeError: LightningModel.forward() does not know the argument mask",
    ),
    "attention_mask": (
        lambda _: {"attention_mask": torch.ones(1, 5)},
        "ValueError: sequence parallelism takes a slice of one batch row",
    ),
    "cu_seqlens-missing": (lambda _: {"cu_seqlens": None}, "ValueError: sequence parallelism takes a slice of one"),
    "cu_seqlens-falling": (lambda _: {"cu_seqlens": torch.tensor([0, 22, 21])}, "ValueError: cu_seqlens must not de"),
    "cu_seqlens-a-number": (lambda _: {"cu_seqlens": torch.tensor(21)}, "ValueError: cu_seqlens must be [N + 1]"),
    "states-of-one-layer": (
        lambda model: {"states": zero_states(model)["states"][:1]},
        "ValueError: states must be one",
    ),
}
# Differences between ranks, and the error of every rank.
DIFFERENT: dict[str, tuple[Callable[[LightningForCausalLM], dict], str]] = {
    "slice-too-short": (
        lambda _: {"input_ids": tokens(1, 4), "position_ids": torch.arange(4)[None]},
        "the ranks must hold [5, 5, 5, 6] of the 21 tokens in cu_seqlens, got [5, 4, 5, 6]",
    ),
    "cu_seqlens": (lambda _: {"cu_seqlens": torch.tensor([0, 8, 10, T])}, "cu_seqlens must be the same on every rank"),
    "log_decay": (change_decay, "log_decay of the layers must be the same on every rank of the group, got [[["),
    "frozen": (freeze, "a gradient for inputs, states or parameters must be the same on every rank of the group"),
    "gradient-checkpointing": (
        checkpoint,
        "gradient checkpointing must be the same on every rank of the group, got [F",
    ),
    "strategy": (ring, "strategy must be the same on every rank of the group, got ['all-gather', 'ring', 'all-gather"),
    "states": (zero_states, "states must be the same on every rank of the group, got [None, [(1, 3, 16, 8, 'torch.fl"),
    "dtype": (lambda model: model.float() and {}, "the dtype of the model must be the same on every rank of the group"),
}


def outcome(group: Any, name: str) -> tuple[str, float, Tensor]:
    """Error of a forward pass with a fault on rank 1, its seconds, and the logits of the right one after it."""
    return _outcome(group, name, lambda model: model)


def outcome_compiled(group: Any, name: str) -> tuple[str, float, Tensor]:
    with warnings.catch_warnings(action="ignore"):  # from Dynamo
        return _outcome(group, name, partial(torch.compile, backend="aot_eager"))


def _outcome(group: Any, name: str, prepare: Callable) -> tuple[str, float, Tensor]:
    rank, parallel = dist.get_rank(group), SequenceParallel(group)
    local = {key: x[:, parallel.slice(T)] for key, x in all_inputs().items()}
    local |= {"cu_seqlens": torch.tensor([0, *STARTS, T])}
    wrong, right = make_model().train(), make_model().train()
    for model in (wrong, right):
        model.model.set_sequence_parallel(parallel)
    changes = (RAISED | DIFFERENT)[name][0](wrong) if rank == 1 else {}
    text, seconds = error_of(lambda: prepare(wrong)(**local | changes))
    logits = prepare(right)(**local).logits
    logits.square().sum().backward()
    return text, seconds, logits.detach()
