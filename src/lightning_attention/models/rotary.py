"""Options of rotary positions, by transformers' names."""

from typing import Any

from .values import check_not_negative

# Names of the parameters of each type.
TYPES = {"default": {"rope_type", "rope_theta"}, "linear": {"rope_type", "rope_theta", "factor"}}


def rope_parameters(given: object, head_dim: int) -> dict[str, Any]:
    """Check `LightningConfig.rope_parameters` for heads of a size, and return them with defaults.

    Raises:
        TypeError: they are not a dictionary, or a value is not a number.
        ValueError: a name or value is not one of a type that is supported, or heads cannot be rotated.
    """
    if given is not None and not isinstance(given, dict):
        raise TypeError(f"rope_parameters must be a dictionary, got {given!r}")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0} | (given or {})
    kind, theta, factor = rope["rope_type"], rope["rope_theta"], rope.get("factor", 1)
    if not isinstance(kind, str) or kind not in TYPES:
        raise ValueError(f'rope_type must be "default" or "linear", got {kind!r}')
    if set(rope) != TYPES[kind]:
        raise ValueError(f"rope_parameters of type {kind!r} are {', '.join(sorted(TYPES[kind]))}, got {rope}")
    check_not_negative("rope_theta", theta)
    check_not_negative("factor", factor)
    if theta <= 1:
        raise ValueError(f"rope_theta must be above 1, got {theta}")
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    if head_dim % 2:
        raise ValueError("rotary positions need heads of an even size: hidden_size / num_attention_heads")
    return rope
