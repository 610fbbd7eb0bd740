"""The picture of a sweep: time and memory against length, as in Lightning Attention-2 (arXiv 2401.04658)."""

from pathlib import Path
from typing import Any


def plot(document: dict[str, Any], picture: Path) -> None:
    """Two panels, from the sweep of a loaded `op.json`: forward and backward in ms, and their memory beyond inputs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    records = [record for record in document["runs"]["sweep"]["results"] if "not_measured" not in record]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for name in dict.fromkeys(record["implementation"] for record in records):
        of_name = sorted((r for r in records if r["implementation"] == name), key=lambda r: r["length"])
        milliseconds = [(r["length"], r["forward"]["milliseconds"] + r["backward"]["milliseconds"]) for r in of_name]
        # On a CPU memory may be unknown, or too little to be seen.
        mebibytes = [(r["length"], r["peak_bytes"] / 2**20) for r in of_name if r["peak_bytes"]]
        for axes, points in ((time, milliseconds), (memory, mebibytes)):
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    lengths = sorted({record["length"] for record in records})
    for axes, label in ((time, "time (ms)"), (memory, "peak memory, results and workspace (MiB)")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [_short(length) for length in lengths])
        if axes.lines:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(LogFormatter())
        axes.set(xlabel="sequence length (tokens)", ylabel=label)
        axes.grid(alpha=0.3)
    time.legend(fontsize=8)
    first = document["runs"]["sweep"]["results"][0]
    shape = f"B {first['batch_size']}, H {first['num_heads']}, D {first['head_dim']}, {first['dtype']}"
    figure.suptitle(f"forward and backward, {shape}, {document['machine']['device']}", fontsize=10)
    figure.savefig(picture, dpi=150)


def _short(length: int) -> str:
    for power, suffix in ((20, "M"), (10, "K")):
        if length % (1 << power) == 0:
            return f"{length >> power}{suffix}"
    return str(length)
