"""What a run leaves: lines of a table, `op.json`, and the picture drawn from it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .cases import BACKWARD, FORWARD, OpCase

Document = dict[str, Any]

_COLUMNS = (("ms", 11), ("floor", 9), ("ours", 8), ("extra", 8))


def heading() -> str:
    """Of the lines: for each pass, time, time over the floor, time over ours, workspace over inputs; then host time."""
    columns = "".join(f"{name:>{width}}" for name, width in _COLUMNS)
    span = sum(width for _, width in _COLUMNS)
    above = f"{'':28}{'forward':>{span}}{'backward':>{span}}"
    return f"{above}\n{'':28}{columns}{columns}{'host µs':>9}"


def lines(case: OpCase, records: list[dict[str, Any]], bandwidth: float) -> Iterator[str]:
    """The case and its floors, then a line for every implementation."""
    B, T, H, D = case.shape
    floors = [case.minimal_bytes(direction) / bandwidth * 1e3 for direction in (FORWARD, BACKWARD)]
    yield f"B {B}, T {T}, H {H}, D {D}: floor {floors[0]:.3g} ms forward, {floors[1]:.3g} ms backward"
    for record in records:
        name = f"  {record['implementation']:26}"
        if "not_measured" in record:
            yield f"{name}  {record['not_measured']}"
            continue
        passes = "".join(_pass_columns(record[direction.name]) for direction in (FORWARD, BACKWARD))
        yield f"{name}{passes}{_cell(record['host_microseconds'], '.0f', '', 9)}"


def start(path: Path, machine: dict[str, Any]) -> Document:
    """The document to add a run to: the one at `path`, if it is of this device and commit, or a new one."""
    if path.exists():
        found = json.loads(path.read_text())
        if all(found["machine"][field] == machine[field] for field in ("device", "commit")):
            return {"machine": machine, "runs": found["runs"]}
    return {"machine": machine, "runs": {}}


def write(document: Document, path: Path) -> None:
    """All or nothing: a run that is cut off leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(unfinished, path)


def _pass_columns(record: dict[str, Any]) -> str:
    (_, ms), (_, floor), (_, ours), (_, extra) = _COLUMNS
    workspace = record["workspace_over_inputs"]
    return (
        _cell(record["milliseconds"], ".4g", "", ms)
        + _cell(record["times_floor"], ".3g", "x", floor)
        + _cell(record["times_ours"], ".3g", "x", ours)
        + _cell(None if workspace is None else 100 * workspace, ".0f", "%", extra)
    )


def _cell(value: float | None, form: str, unit: str, width: int) -> str:
    return f"{'' if value is None else f'{value:{form}}{unit}':>{width}}"
