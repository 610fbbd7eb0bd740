"""Plots of a run: time and memory against length, as in Lightning Attention-2 (arXiv 2401.04658)."""

from lightning_attention.files import replacing
from lightning_attention.paths import PathLike, to_path

from .report import Document, Value, field, mebibytes


def plot_sweep(document: Document, picture: PathLike, kind: str = "sweep") -> None:
    """Draw a sweep of the operator: milliseconds of forward and backward, and their memory beyond the inputs."""
    first = document["runs"][kind]["results"][0]
    shape = f"B {first['batch_size']}, H {first['num_heads']}, D {first['head_dim']}, {first['dtype']}"
    panels: dict[str, Value] = {
        "time (ms)": lambda record: record["forward"]["milliseconds"] + record["backward"]["milliseconds"],
        "peak memory, results and workspace (MiB)": mebibytes("peak_bytes"),
    }
    _plot(document, kind, "sequence length (tokens)", panels, f"forward and backward, {shape}", picture)


def plot_model(document: Document, picture: PathLike) -> None:
    """Draw the model run of a `decode.json`: milliseconds per token, and size of the states or KV cache."""
    first = document["runs"]["model"]["results"][0]
    title = f"one token of a {first['size']} model, B {first['batch_size']}, {first['dtype']}"
    panels = {"time per token (ms)": field("milliseconds"), "state or KV cache (MiB)": mebibytes("state_bytes")}
    _plot(document, "model", "context length (tokens)", panels, title, picture)


def plot_training(document: Document, picture: PathLike) -> None:
    """Draw a `train.json`: tokens per second, and memory of a step beyond the model's own."""
    first = document["runs"]["train"]["results"][0]
    title = f"a step of a {first['size']} model on one sequence, segments of {first['segment_length']}"
    panels = {"tokens per second": field("tokens_per_second")}
    panels["peak memory beyond the model (MiB)"] = mebibytes("peak_bytes")
    _plot(document, "train", "sequence length (tokens)", panels, title, picture, from_zero=True)


def _plot(
    document: Document,
    kind: str,
    abscissa: str,
    panels: dict[str, Value],
    title: str,
    picture: PathLike,
    *,
    from_zero: bool = False,
) -> None:
    """Draw two panels with a line per implementation; logarithmic, or from zero if the values hardly vary."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    records = [record for record in document["runs"][kind]["results"] if "not_measured" not in record]
    file = to_path(picture, "picture")
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    all_axes = figure.subplots(1, len(panels))
    lengths = sorted({record["length"] for record in records})
    for axes, (label, value) in zip(all_axes, panels.items(), strict=True):
        for name in dict.fromkeys(record["implementation"] for record in records):
            of_name = sorted((r for r in records if r["implementation"] == name), key=lambda r: r["length"])
            # On a CPU, memory may be unknown, or too small to measure.
            points = [(record["length"], y) for record in of_name if (y := value(record))]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [short(length) for length in lengths])
        if from_zero:
            axes.set_ylim(0)
            axes.yaxis.set_major_formatter("{x:,g}")
        elif axes.lines:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(LogFormatter())
        axes.set(xlabel=abscissa, ylabel=label)
        axes.grid(alpha=0.3)
    if all_axes[0].lines:
        all_axes[0].legend(fontsize=8)
    figure.suptitle(f"{title}, {document['machine']['device']}", fontsize=10)
    with replacing(file, "wb") as content:
        figure.savefig(content, dpi=150, format=file.suffix[1:] or "png")


def short(length: int) -> str:
    """A number of tokens as on an axis, such as 64K."""
    for power, suffix in ((20, "M"), (10, "K")):
        if length % (1 << power) == 0:
            return f"{length >> power}{suffix}"
    return str(length)
