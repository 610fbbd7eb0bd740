"""Checks of options."""

import math
from collections.abc import Collection
from numbers import Integral, Real


def check_integer(name: str, value: object) -> None:
    """Raise unless the value is an integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def check_size(name: str, value: int) -> None:
    """Raise unless the value is an integer >= 1."""
    check_integer(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_eps(eps: object) -> None:
    """Raise unless eps is a finite number >= 0."""
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if not 0 <= float(eps) < math.inf:
        raise ValueError(f"eps must be finite and >= 0, got {eps}")


def check_bool(name: str, value: object) -> None:
    """Raise unless the value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: object, known: Collection[str]) -> None:
    """Raise unless the value is one of the known names."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
