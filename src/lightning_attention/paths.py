"""Conversion of paths given by users, `str` or `os.PathLike`, to `Path`."""

import os
from collections.abc import Iterable
from pathlib import Path

PathLike = str | os.PathLike[str]


def to_path(path: PathLike, name: str) -> Path:
    """Convert a path to a `Path`.

    Args:
        path: the user's argument.
        name: name of the argument, for the error.

    Raises:
        TypeError: `path` is neither a `str` nor an `os.PathLike` of one.
    """
    if isinstance(path, (str, os.PathLike)) and isinstance(text := os.fspath(path), str):
        return Path(text)
    raise TypeError(f"{name} must be a str or os.PathLike, got {type(path).__name__}")


def to_paths(paths: PathLike | Iterable[PathLike], name: str) -> tuple[Path, ...]:
    """Convert one path or several to `Path`s.

    Raises:
        TypeError: as `to_path`.
    """
    if isinstance(paths, Iterable) and not isinstance(paths, (str, bytes, os.PathLike)):
        return tuple(to_path(path, name) for path in paths)
    return (to_path(paths, name),)
