"""Checks of numbers in a configuration."""

import math


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
