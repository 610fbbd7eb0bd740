"""Losses of several runs, in one plot and one table."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.table import Table

from ..paths import PathLike, to_path
from .folder import METRICS
from .metrics import read_metrics

Records = list[dict[str, Any]]
UNITS = {"nats per token": "loss", "bits per byte": "bits_per_byte"}


def read_runs(folders: Sequence[PathLike]) -> dict[str, Records]:
    """Read the metrics of runs, by the names of their folders, or by their paths if two have one name.

    `seconds` do not start again where a run was resumed.

    Raises:
        ValueError: there are fewer than two runs, a run is given twice, or a folder holds no losses.

    Example:
        >>> from lightning_attention.training.comparison import read_runs
        >>> runs = read_runs(["bytes", "bpe"])  # doctest: +SKIP
    """
    paths = [to_path(folder, "folders") for folder in folders]
    if len(paths) < 2:
        raise ValueError("give two runs or more to compare")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a run is given twice")
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return {name: _read(path / METRICS) for name, path in zip(names, paths, strict=True)}


def _read(file: PathLike) -> Records:
    file = to_path(file, "file")
    if not file.is_file():
        raise ValueError(f"{file.parent} holds no run with metrics: there is no file {file.name}")
    try:
        records = [x for x in read_metrics(file) if isinstance(x, dict) and {"step", "tokens", "seconds"} <= set(x)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not any(_points(records, name, "tokens") for name in ("loss", "eval_loss")):
        raise ValueError(f"{file} holds no losses")
    before = last = 0.0
    for record in records:
        if before + record["seconds"] < last:  # of a run that an older version has resumed
            before = last
        last = record["seconds"] = before + record["seconds"]
    return records


def table_of_runs(runs: Mapping[str, Records]) -> Table:
    """Table of the last losses of runs, and of their lowest held-out losses."""
    table = Table("run", box=None)
    for title in ("tokens", "time", "loss", "bits/byte", "held out", "bits/byte", "lowest", "at step"):
        table.add_column(title, justify="right")
    for name, records in runs.items():
        held_out = [record for record in records if record.get("eval_loss") is not None]
        lowest = min(held_out, key=lambda record: record["eval_loss"], default={})
        table.add_row(
            name,
            f"{records[-1]['tokens']:,}",
            str(timedelta(seconds=round(records[-1]["seconds"]))),
            *(_last(records, loss) for loss in ("loss", "bits_per_byte", "eval_loss", "eval_bits_per_byte")),
            _last([lowest], "eval_loss"),
            str(lowest.get("step", "-")),
        )
    return table


def _points(records: Records, name: str, against: str) -> list[tuple[float, float]]:
    return [(record[against], record[name]) for record in records if record.get(name) is not None]


def _has_bits(records: Records) -> bool:
    return any(_points(records, prefix + "bits_per_byte", "tokens") for prefix in ("", "eval_"))


def _last(records: Records, name: str) -> str:
    found = _points(records, name, name)
    return f"{found[-1][1]:.4f}" if found else "-"
