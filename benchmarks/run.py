"""A run of `lightning-attention bench`: measure, show, and keep what was measured so far."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lightning_attention.files import writable_folder
from lightning_attention.paths import PathLike, to_path

from . import report
from .harness import copy_bandwidth, free_bytes
from .machine import machine
from .report import Document, Record, Table


@dataclass(frozen=True)
class Plan:
    """Cases of one kind, and how to measure and show them.

    Args:
        kind: as the document calls it.
        cases: in their order.
        measure: from the bandwidth of a copy, in bytes per second, the records of one case after the other.
        title: of a case, from it and the bandwidth.
        table: of the records.
        needed_bytes: memory that the largest case takes at least.
    """

    kind: str
    cases: Sequence[Any]
    measure: Callable[[float], Iterable[list[Record]]]
    title: Callable[[Any, float], str]
    table: Table
    needed_bytes: int = 0


@dataclass(frozen=True)
class Picture:
    """The kind of run that is drawn, and what draws it from a document."""

    kind: str
    draw: Callable[[Document, Path], None]


def run(
    name: str,
    plans: Sequence[Plan],
    picture: Picture,
    device: torch.device,
    *,
    dtype: torch.dtype,
    command: str,
    output: PathLike,
    echo: Callable[[str], None],
) -> list[Path]:
    """Measure every plan into `<name>.json`, written after each case, and draw `<name>.png` if its kind is there.

    Args:
        name: of the files.
        plans: what to measure.
        picture: what to draw.
        device: where.
        dtype: of the inputs, to be shown.
        command: that makes these results, to be kept with them.
        output: folder. Of a document in it from the same device and commit, runs of other kinds are kept.
        echo: takes the lines to show.

    Returns:
        The files written.

    Raises:
        MemoryError: a case does not fit in memory. Nothing is measured.
        OSError, ValueError: the folder cannot be written, or a file in it is none of a benchmark. Nothing is measured.
    """
    folder = to_path(output, "output")
    results, drawing = folder / f"{name}.json", folder / f"{name}.png"
    for plan in plans:
        _check_memory(plan, device)
    document = report.start(results, machine(device))
    if drawing.exists() and not drawing.is_file():
        raise ValueError(f"{drawing} is not a file, and the plot cannot be written there")
    with writable_folder(folder):
        bandwidth = copy_bandwidth(device)
        echo(f"{document['machine']['device']}, copy {bandwidth / 1e9:.4g} GB/s, {dtype}")
        for plan in plans:
            echo(f"{plan.kind}:")
            echo(plan.table.heading())
            records = []
            document["runs"][plan.kind] = {
                "command": command,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "copy_bytes_per_second": round(bandwidth),
                "results": records,
            }
            for case, of_case in zip(plan.cases, plan.measure(bandwidth), strict=True):
                records.extend(of_case)
                report.write(document, results)
                for line in plan.table.lines(plan.title(case, bandwidth), of_case):
                    echo(line)
        if picture.kind not in document["runs"]:
            return [results]
        picture.draw(document, drawing)
        return [results, drawing]


def _check_memory(plan: Plan, device: torch.device) -> None:
    free = free_bytes(device)
    if free is not None and plan.needed_bytes > free:
        gibibytes = f"{plan.needed_bytes / 2**30:.4g} GiB, and {free / 2**30:.4g} GiB are free"
        raise MemoryError(f"the {plan.kind} benchmark needs at least {gibibytes}")
