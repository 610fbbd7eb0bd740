"""Losses of several runs in one table; `plots` has the plot."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rich.table import Table

from ..models.checkpoint import checkpoints
from ..paths import PathLike, to_path
from .folder import METRICS
from .measurements import in_hours
from .metrics import Records, read_metrics
from .options import TrainingOptions
from .plots import is_number, points

TOKENIZER = "tokenizer.json"
PLACES = "step", "tokens", "seconds"


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


def _read(file: Path) -> Records:
    if not file.is_file():
        raise ValueError(f"{file.parent} holds no run with metrics: there is no file {file.name}")
    try:
        records = [x for x in read_metrics(file) if isinstance(x, dict) and all(map(is_number, map(x.get, PLACES)))]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not any(points(records, name) for name in ("loss", "eval_loss")):
        raise ValueError(f"{file} holds no losses")
    before = last = 0.0
    for record in records:
        if before + record["seconds"] < last:  # of a run that an older version has resumed
            before = last
        last = record["seconds"] = before + record["seconds"]
    return records


def remarks(folders: Sequence[PathLike]) -> list[str]:
    """Lines on runs that are not finished, and on losses that do not compare because tokenizers differ."""
    lines, tokenizers = [], set()
    for folder in (to_path(folder, "folders") for folder in folders):
        last = next(reversed(checkpoints(folder)), None)
        with suppress(ValueError, TypeError, OSError):  # there is no run.json yet, or it is of another version
            steps = TrainingOptions.load(folder).steps
            if (made := read_metrics(folder / METRICS)[-1]["step"]) < steps:
                lines.append(f"{folder} has made {made:,} of {steps:,} steps")
        with suppress(OSError):
            tokenizers.add(hashlib.sha256((last or folder).joinpath(TOKENIZER).read_bytes()).digest())
    if len(tokenizers) > 1:
        lines.append("tokenizers differ: bits per byte compare, losses in nats per token do not")
    return lines


def table_of_runs(runs: Mapping[str, Records]) -> Table:
    """Table of the last losses of runs, and of their lowest held-out losses."""
    table = Table("run", box=None)
    for title in ("tokens", "time", "loss", "bits/byte", "held out", "bits/byte", "lowest", "at step"):
        table.add_column(title, justify="right")
    for name, records in runs.items():
        held_out = [record for record in records if is_number(record.get("eval_loss"))]
        lowest = min(held_out, key=lambda record: record["eval_loss"], default={})
        table.add_row(
            name,
            f"{records[-1]['tokens']:,}",
            in_hours(records[-1]["seconds"]),
            *(_last(records, loss) for loss in ("loss", "bits_per_byte", "eval_loss", "eval_bits_per_byte")),
            _last([lowest], "eval_loss"),
            str(lowest.get("step", "-")),
        )
    return table


def _last(records: Records, name: str) -> str:
    found = points(records, name)
    return f"{found[-1][1]:.4f}" if found else "-"
