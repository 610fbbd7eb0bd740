"""Checks of numbers in a configuration."""

import math
from typing import Any

import torch


def check_int(name: str, value: object, at_least: int | None = None) -> None:
    """Raise unless the value is an integer of 64 bits in its range."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    if value >= 2**63:
        raise ValueError(f"{name} must be below 2**63")


def check_not_negative(name: str, value: object) -> None:
    """Raise unless the value is a finite number >= 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def check_token_id(name: str, given: Any, vocab_size: int) -> None:
    """Raise unless a special token, or each of a list of them, is None or in the vocabulary."""
    for token in given if isinstance(given, (list, tuple)) else [given]:
        if token is None:
            continue
        check_int(name, token)
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{name} must be None or in [0, vocab_size = {vocab_size}), got {token}; a token is added to the "
                "vocabulary by resize_token_embeddings()"
            )


def lists_of_numbers(name: str, given: Any) -> list[list[float]]:
    """Return numbers of all layers and heads, given as lists or tensors, as lists, which can be saved."""
    try:
        layers = [torch.as_tensor(layer, dtype=torch.float64, device="cpu") for layer in given]
    except (TypeError, ValueError):
        layers = []
    if not layers or any(layer.dim() != 1 for layer in layers):
        raise TypeError(f"{name} must be lists of numbers, one list for each layer")
    return [layer.tolist() for layer in layers]
