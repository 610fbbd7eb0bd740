"""Checks of what callers give to the engine."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch

from ..models import LightningForCausalLM
from ..models.mixers import ATTENTIONS
from ..nn.sizes import check_bool, check_integer
from ..ops.decoding_state import chunk_size
from ..ops.problem import state_dtype
from .packing import reason_against

LIMIT = 1 << 63  # sizes and token ids have 64 bits


def check_model(model: object) -> None:
    """Check that the engine can run a model.

    Raises:
        TypeError: it is not a `LightningForCausalLM`, also not within `torch.compile`.
        ValueError: it shares sequences with other processes, or has softmax attention.
    """
    model = getattr(model, "_orig_mod", model)  # unwrap torch.compile
    if not isinstance(model, LightningForCausalLM):
        has_adapters = hasattr(model, "merge_and_unload")  # of PEFT
        hint = ": pass what its merge_and_unload() returns" if has_adapters else ""
        raise TypeError(f"model must be a LightningForCausalLM, got {type(model).__name__}{hint}")
    if model.model.sequence_parallel is not None:
        raise ValueError("model must not share sequences: call its model.set_sequence_parallel(None) first")
    if model.config.has_softmax:
        raise ValueError(
            "the engine keeps a state of constant size for each request, and softmax attention has none: use "
            "model.generate(), or --prompt on the command line"
        )


def check_callback(name: str, callback: object) -> None:
    """Raise unless a callback is callable or None."""
    if callback is not None and not callable(callback):
        raise TypeError(f"{name} must be callable or None, got {callback!r}")


def pool_dtype_for(model_dtype: torch.dtype, given: object = None) -> torch.dtype:
    """Dtype of the states of a model: the one given, or by default the one of the operators' arithmetic.

    Raises:
        TypeError: the operators do not take states of the dtype given for a model of `model_dtype`.
    """
    default = state_dtype(model_dtype)
    known = (default,) if default == torch.float64 else (default, torch.bfloat16)
    dtype = default if given is None else given
    if not isinstance(dtype, torch.dtype) or dtype not in known:
        raise TypeError(f"pool_dtype must be {' or '.join(map(str, known))} for a {model_dtype} model, got {given!r}")
    return dtype


def check_ring(model: LightningForCausalLM, ring: object) -> bool:
    """Return whether an engine decodes from decoding states: `ring`, or by default what suits the model.

    Raises:
        TypeError: it is not a bool or None.
        ValueError: it is False for an invariant model.
    """
    config = model.config
    if ring is None:
        return config.invariant or (model.device.type == "cuda" and _has_kernels(model))
    check_bool("ring", ring)
    if not ring and config.invariant:
        raise ValueError("ring must be True for a model with invariant=True: its promise holds for decoding states")
    return bool(ring)


def _has_kernels(model: LightningForCausalLM) -> bool:
    """True if decoding states of every layer have kernels on the device of the model."""
    if not ATTENTIONS[model.config.linear_attention].has_decay:
        return False
    try:
        for shape in model.model.state_shapes:
            chunk_size(*shape, model.dtype, model.device)
    except NotImplementedError:
        return False
    return True


def check_packing(model: LightningForCausalLM, pack_weights: object) -> bool:
    """Return `pack_weights`.

    Raises:
        TypeError: it is not a bool.
        ValueError: it is True, and the weights cannot be packed.
    """
    check_bool("pack_weights", pack_weights)
    if pack_weights and (reason := reason_against(model)):
        raise ValueError(f"pack_weights must be False for this model: {reason}")
    return bool(pack_weights)


def whole_number(name: str, value: Any, *, at_least: int) -> int:
    """Return an integer in its range as an `int`.

    Raises:
        TypeError: the value is not an integer.
        ValueError: the value is below `at_least`, or has more than 64 bits.
    """
    check_integer(name, value)
    number = int(value)
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {number}")
    if number >= LIMIT:
        raise ValueError(f"{name} must be below 2^63, got {number}")
    return number


def token_ids(name: str, values: object, vocab_size: int) -> list[int]:
    """Return token ids as a list of `int`.

    Raises:
        TypeError: the values are not integers.
        ValueError: a token is not in the vocabulary.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be token ids, got {type(values).__name__}")
    tokens: list[int] = []
    for token in values:
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise TypeError(f"{name} must be token ids, which are whole numbers, got {type(token).__name__}")
        tokens.append(int(token))
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise ValueError(f"{name} must be token ids in [0, {vocab_size}), got {min(tokens)} to {max(tokens)}")
    return tokens
