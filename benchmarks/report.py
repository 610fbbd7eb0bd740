"""Results of a run: lines of a table, and a JSON document."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_attention import files
from lightning_attention.paths import PathLike, to_path

Document = dict[str, Any]
Record = dict[str, Any]
Value = Callable[[Record], float | None]

OURS = "lightning_attention"

_NAME_WIDTH = 30


@dataclass(frozen=True)
class Column:
    """Table column: `value` of a record, formatted with `form` and followed by `unit`; blank if the value is None."""

    name: str
    width: int
    value: Value
    form: str
    unit: str = ""

    def cell(self, record: Record) -> str:
        value = self.value(record)
        return f" {'' if value is None else f'{value:{self.form}}{self.unit}':>{self.width - 1}}"


@dataclass(frozen=True)
class Table:
    """Columns in named groups; one line per implementation."""

    groups: Mapping[str, Sequence[Column]]

    def heading(self) -> str:
        names = " " * _NAME_WIDTH + "".join(f"{column.name:>{column.width}}" for column in self._columns)
        groups = "".join(f"{name:>{sum(column.width for column in group)}}" for name, group in self.groups.items())
        return f"{'':{_NAME_WIDTH}}{groups}".rstrip() + f"\n{names}" if groups.strip() else names

    def lines(self, title: str, records: Sequence[Record]) -> Iterator[str]:
        """Title of a case, then a line per record."""
        yield title
        for record in records:
            reason = record.get("not_measured")
            cells = f"  {reason}" if reason else "".join(column.cell(record) for column in self._columns)
            yield f"  {record['implementation']:{_NAME_WIDTH - 2}}{cells}"

    @property
    def _columns(self) -> list[Column]:
        return [column for group in self.groups.values() for column in group]


def field(*keys: str, scale: float = 1.0) -> Value:
    """Function from a record to `scale` times its entry at `keys`, None where an entry is None."""

    def value(record: Record) -> float | None:
        entry: Any = record
        for key in keys:
            entry = None if entry is None else entry[key]
        return None if entry is None else scale * entry

    return value


def mebibytes(key: str) -> Value:
    """Function from a record to its number of bytes at `key`, in MiB."""
    return field(key, scale=2**-20)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rounded(x: float) -> float:
    """Round to four significant digits."""
    return float(f"{x:.4g}")


def times_ours(times: dict[str, float], name: str) -> float | None:
    """Time of an implementation over ours, rounded; None if ours failed."""
    return rounded(times[name] / times[OURS]) if OURS in times else None


def start(path: PathLike, machine: dict[str, Any]) -> Document:
    """Read the document at `path` if it is from this device and commit, else create one.

    Raises:
        OSError: the document cannot be read.
        ValueError: another kind of file is at `path`.
    """
    path = to_path(path, "path")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file: choose another folder")
    if path.exists():
        found = _read(path)
        if all(found["machine"].get(name) == machine[name] for name in ("device", "commit")):
            return {"machine": machine, "runs": found["runs"]}
    return {"machine": machine, "runs": {}}


def _read(path: Path) -> Document:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not (isinstance(found, dict) and all(isinstance(found.get(name), dict) for name in ("machine", "runs"))):
        raise ValueError(f"{path} holds no results of this benchmark, and is not overwritten: choose another folder")
    return found


def write(document: Document, path: PathLike) -> None:
    """Write a document atomically, and create its folder."""
    path = to_path(path, "path")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(document, indent=1) + "\n")
