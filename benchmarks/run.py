"""Run of `python -m benchmarks`: measure, print, and write the results after each case."""

from collections.abc import Callable, Sequence
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
class Benchmark:
    """Cases of one kind, and how to measure and print them.

    Args:
        kind: key in the document.
        cases: cases in the order to measure them.
        measure: records of a case, one per implementation, from the case and the bandwidth of a copy in bytes/s.
        title: line above the records of a case, from the same arguments.
        table: columns of the records.
        needed_bytes: least memory of the largest case.
    """

    kind: str
    cases: Sequence[Any]
    measure: Callable[[Any, float], list[Record]]
    title: Callable[[Any, float], str]
    table: Table
    needed_bytes: int = 0


@dataclass(frozen=True)
class Plot:
    """Kind of run to draw, and the function that draws it from a document."""

    kind: str
    draw: Callable[[Document, Path], None]


def run(
    name: str,
    benchmarks: Sequence[Benchmark],
    plot: Plot | None,
    device: torch.device,
    *,
    dtype: torch.dtype,
    command: str,
    output: PathLike,
    echo: Callable[[str], None],
) -> list[Path]:
    """Measure benchmarks into `<name>.json`, written after each case, and draw `<name>.png` if its kind is present.

    Args:
        name: stem of the files.
        benchmarks: what to measure.
        plot: what to draw; None for no plot.
        device: device to measure on.
        dtype: dtype of the inputs, to print.
        command: command that produces these results, to record.
        output: folder. Its document keeps runs of other kinds, if it is from the same device and commit.
        echo: prints a line.

    Returns:
        The files written.

    Raises:
        MemoryError: a case does not fit in memory. Nothing is measured.
        OSError, ValueError: the folder is not writable, or holds another kind of file. Nothing is measured.
    """
    folder = to_path(output, "output")
    results, drawing = folder / f"{name}.json", folder / f"{name}.png"
    for benchmark in benchmarks:
        _check_memory(benchmark, device)
    document = report.start(results, machine(device))
    if drawing.exists() and not drawing.is_file():
        raise ValueError(f"{drawing} is not a file, and the plot cannot be written there")
    with writable_folder(folder):
        bandwidth = copy_bandwidth(device)
        echo(f"{document['machine']['device']}, copy {bandwidth / 1e9:.4g} GB/s, {dtype}")
        for benchmark in benchmarks:
            echo(f"{benchmark.kind}:\n{benchmark.table.heading()}")
            records = []
            document["runs"][benchmark.kind] = {
                "command": command,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "copy_bytes_per_second": round(bandwidth),
                "results": records,
            }
            for case in benchmark.cases:
                measured = benchmark.measure(case, bandwidth)
                records.extend(measured)
                report.write(document, results)
                for line in benchmark.table.lines(benchmark.title(case, bandwidth), measured):
                    echo(line)
        if plot is None or plot.kind not in document["runs"]:
            return [results]
        plot.draw(document, drawing)
        return [results, drawing]


def _check_memory(benchmark: Benchmark, device: torch.device) -> None:
    free = free_bytes(device)
    if free is not None and benchmark.needed_bytes > free:
        gibibytes = f"{benchmark.needed_bytes / 2**30:.4g} GiB, and {free / 2**30:.4g} GiB are free"
        raise MemoryError(f"the {benchmark.kind} benchmark needs at least {gibibytes}")
