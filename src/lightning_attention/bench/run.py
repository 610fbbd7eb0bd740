"""A run of `lightning-attention bench op`: measure, show, and keep what was measured so far."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from . import report
from .cases import OpCase
from .harness import copy_bandwidth
from .machine import machine
from .op import measure
from .peers import PEERS
from .plot import plot


@dataclass(frozen=True)
class Plan:
    """Cases of one kind, "table" or "sweep", and the longest sequence to run quadratic implementations on."""

    kind: str
    cases: list[OpCase]
    softmax_up_to: int


def run(
    plans: list[Plan], device: torch.device, *, seconds: float, command: str, output: Path, echo: Callable[[str], None]
) -> list[Path]:
    """Measure every plan into `op.json`, written after each case, and draw `op.png` if there is a sweep.

    Args:
        plans: what to measure.
        device: where.
        seconds: to spend on each timing, about.
        command: that makes these results, to be kept with them.
        output: folder. Of an `op.json` in it from the same device and commit, runs of other kinds are kept.
        echo: takes the lines to show.

    Returns:
        The files written.
    """
    results, picture = output / "op.json", output / "op.png"
    document = report.start(results, machine(device))
    bandwidth = copy_bandwidth(device)
    echo(f"{document['machine']['device']}, copy {bandwidth / 1e9:.4g} GB/s, {plans[0].cases[0].dtype}")
    echo(report.heading())
    peers = [peer for peer in PEERS if peer.device == device.type]
    for plan in plans:
        records = []
        document["runs"][plan.kind] = {
            "command": command,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "copy_bytes_per_second": round(bandwidth),
            "results": records,
        }
        measured = measure(
            plan.cases, peers, device, bandwidth=bandwidth, softmax_up_to=plan.softmax_up_to, seconds=seconds
        )
        for case, of_case in zip(plan.cases, measured, strict=True):
            records.extend(of_case)
            report.write(document, results)
            for line in report.lines(case, of_case, bandwidth):
                echo(line)
    if "sweep" not in document["runs"]:
        return [results]
    plot(document, picture)
    return [results, picture]
