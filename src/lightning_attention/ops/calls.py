"""Calls: what depends on the metadata of inputs alone is done once, and kept in one bounded cache."""

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, TypeAlias

from torch import Tensor

from .inputs import Metadata

MAX_CALLS = 1024

# A NamedTuple of `problem.py`, of tensors or of their metadata; None for an input that is not given.
Inputs: TypeAlias = Any
# Computes results from inputs; those that are not asked for are left out.
Prepared: TypeAlias = Callable[[Inputs], list[Tensor]]


def call(prepare: Callable[..., Prepared], x: Inputs, *options: Hashable) -> list[Tensor]:
    """`prepare(metadata, *options)(x)`, prepared once for inputs of some metadata.

    Args:
        prepare: a pure function; its first argument is `x` with `Metadata` in place of tensors.
        options: all else that is prepared for.
    """
    metadata = tuple([None if y is None else (y.shape, y.stride(), y.dtype, y.device) for y in x])
    return _prepared(prepare, type(x), metadata, options)(x)


@lru_cache(MAX_CALLS)
def _prepared(prepare: Callable[..., Prepared], structure: type, metadata: tuple, options: tuple) -> Prepared:
    return prepare(structure(*[None if y is None else Metadata(*y) for y in metadata]), *options)


clear = _prepared.cache_clear
