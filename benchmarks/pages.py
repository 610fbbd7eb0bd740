"""Pages of documentation with tables of the results in benchmarks/results."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from .report import OURS, Document, Record

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Every page, and the module with its `HEADER` and `SECTIONS`.
PAGES = {"docs/benchmarks.md": "benchmarks.tables", "docs/paper.md": "benchmarks.paper.page"}

# When the code that a run measures last changed what it executes. An older run is left out of the page.
CHANGED = {"scan": "2026-11-28T10:08", "step": "2026-11-24T11:53", "chunked": "2026-11-29T19:30"}

# Runs with a plot next to their file, and its description.
PLOTS = {
    "mixers-training": "Every attention: training steps against the length, and loss",
    "mixers-decoding": "Every attention: time of a decoded token against the context",
    "sweep": "Time and memory against the sequence length",
    "model": "Time per token and size of state or KV cache against the context length",
    "train": "Tokens per second and memory of a step against the sequence length",
}

OUTDATED = """\
## Left out

These runs are older than the last change of the code that they measure, and are left out until measured again.

| file | run | date |
|---|---|---|"""

Rows = list[list[str]]


@dataclass(frozen=True)
class Section:
    """Tables of all runs of a kind.

    Attributes:
        title: heading of the section.
        run: kind of the runs.
        change: code that they measure, in `CHANGED`.
        write: function from results to a table.
    """

    title: str
    run: str
    change: str
    write: Callable[[Any], str]


def text_of(page: str) -> str:
    """Text of one of `PAGES`."""
    module = import_module(PAGES[page])
    return render(module.HEADER, module.SECTIONS)


def render(header: str, sections: Sequence[Section]) -> str:
    """Text of a page: a header, and the sections that have results."""
    parts, outdated, pictures = [header], [], set()
    for section in sections:
        tables = []
        for file in sorted(RESULTS.glob("*/*.json")):
            document = json.loads(file.read_text(encoding="utf-8"))
            for name, found in named_runs(document, file.stem):
                if name != section.run:
                    continue
                if is_outdated(document, found, section.change):
                    outdated.append(f"| {link(file)} | {name} | {found.get('time', 'not kept')[:10]} |")
                else:
                    text = f"{source(document, found, file)}\n\n{section.write(found['results'])}"
                    if (image := file.with_suffix(".png")) not in pictures and name in PLOTS and image.exists():
                        pictures.add(image)
                        text += f"\n\n![{PLOTS[name]}](../{image.relative_to(ROOT).as_posix()})"
                    tables.append(text)
        if tables:
            parts.append("\n\n".join([f"## {section.title}", *tables]) + "\n")
    if outdated:
        parts.append("\n".join([OUTDATED, *sorted(outdated)]) + "\n")
    return "\n".join(parts)


def named_runs(document: Document, stem: str) -> Iterable[tuple[str, Record]]:
    """Runs of a file by name. A file without runs is one run, named after the file."""
    return document["runs"].items() if "runs" in document else [(stem, document)]


def is_outdated(document: Document, run: Record, change: str) -> bool:
    """True if the code that the run measured has changed since, or the run does not say when it was."""
    if "cuda" not in document["machine"]:
        change = "chunked"
    return run.get("time", "") < CHANGED[change]


def link(file: Path) -> str:
    return f"[{file.parent.name}/{file.name}](../{file.relative_to(ROOT).as_posix()})"


def source(document: Document, run: Record, file: Path) -> str:
    machine = document["machine"]
    date = f", {run['time'][:10]}" if "time" in run else ""
    torch = machine["torch"].partition("+")[0]
    commit = run.get("commit", machine["commit"])  # runs of several commits may have been merged into a file
    return f"{machine['device']}{date}, commit `{commit[:8]}`, torch {torch}, {link(file)}:"


def by_shape(results: list[Record]) -> dict[str, dict[str, Record]]:
    return group(results, shape_of)


def group(results: list[Record], key: Callable[[Record], Any]) -> dict[Any, dict[str, Record]]:
    """Results by key, then by implementation."""
    found: dict[Any, dict[str, Record]] = {}
    for x in results:
        found.setdefault(key(x), {})[x["implementation"]] = x
    return found


def measured_implementations(results: list[Record]) -> list[str]:
    """Implementations other than ours that some shape has a time for, in the order of the file."""
    names = (x["implementation"] for x in results if x["implementation"] != OURS and "not_measured" not in x)
    return list(dict.fromkeys(names))


def shape_of(x: Record) -> str:
    sizes = [str(x[name]) for name in ("batch_size", "length", "num_heads", "head_dim") if name in x]
    packed = [f"{x['documents']} packed"] if x.get("documents") else []
    return ", ".join(sizes + packed)


def both(x: Record, name: str, factor: float = 1) -> str:
    """A number of forward and one of backward, or nothing where they were not measured."""
    passes = [x.get(direction) or {} for direction in ("forward", "backward")]
    if any(passed.get(name) is None for passed in passes):
        return ""
    return " / ".join(number(passed[name] * factor) for passed in passes)


def number(x: float | None) -> str:
    """Three significant digits, or all digits before the point."""
    if x is None or x == 0 or isinstance(x, int):
        return "" if x is None else f"{x:,}"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:#.3g}".rstrip(".")


def tokens(length: int) -> str:
    return f"{length >> 20}M" if length >= 1 << 20 else f"{length >> 10}K" if length >= 1 << 10 else str(length)


def table(header: list[str], rows: Rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
