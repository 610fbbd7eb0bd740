"""What a run leaves: lines of a table, and a `.json` document."""

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

_NAME_WIDTH = 28


@dataclass(frozen=True)
class Column:
    """Of a table: `value` of a record, as `form` and `unit` show it, or nothing where it is None."""

    name: str
    width: int
    value: Callable[[Record], float | None]
    form: str
    unit: str = ""

    def cell(self, record: Record) -> str:
        value = self.value(record)
        return f" {'' if value is None else f'{value:{self.form}}{self.unit}':>{self.width - 1}}"


@dataclass(frozen=True)
class Table:
    """Columns in groups, by name; a line for every implementation."""

    groups: Mapping[str, Sequence[Column]]

    def heading(self) -> str:
        columns = [column for group in self.groups.values() for column in group]
        names = " " * _NAME_WIDTH + "".join(f"{column.name:>{column.width}}" for column in columns)
        groups = "".join(f"{name:>{sum(column.width for column in group)}}" for name, group in self.groups.items())
        return f"{'':{_NAME_WIDTH}}{groups}".rstrip() + f"\n{names}" if groups.strip() else names

    def lines(self, title: str, records: Sequence[Record]) -> Iterator[str]:
        """The title of a case, then its records."""
        yield title
        for record in records:
            if "not_measured" in record:
                cells = f"  {record['not_measured']}"
            else:
                cells = "".join(column.cell(record) for group in self.groups.values() for column in group)
            yield f"  {record['implementation']:{_NAME_WIDTH - 2}}{cells}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rounded(x: float) -> float:
    return float(f"{x:.4g}")


def start(path: PathLike, machine: dict[str, Any]) -> Document:
    """The document to add a run to: the one at `path`, if it is of this device and commit, or a new one.

    Raises:
        OSError: it cannot be read.
        ValueError: there is something else at `path`, which would be overwritten.
    """
    path = to_path(path, "path")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file: choose another folder")
    if path.exists():
        found = _read(path)
        if all(found["machine"].get(field) == machine[field] for field in ("device", "commit")):
            return {"machine": machine, "runs": found["runs"]}
    return {"machine": machine, "runs": {}}


def _read(path: Path) -> Document:
    """A document as `write` leaves it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    parts = [found.get("machine"), found.get("runs")] if isinstance(found, dict) else [None]
    if not (found and all(isinstance(part, dict) for part in parts)):
        raise ValueError(f"{path} holds no results of this benchmark, and is not overwritten: choose another folder")
    return found


def write(document: Document, path: PathLike) -> None:
    """All or nothing: a run that is cut off leaves the file as it was."""
    path = to_path(path, "path")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(document, indent=1) + "\n")
