"""Metrics of a run: `metrics.jsonl`, a loss plot, and progress on the terminal."""

import json
import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import files
from ..paths import PathLike, to_path


class MetricsCallback(TrainerCallback):
    """Append every log to `metrics.jsonl` and show it, with the throughput since the log before.

    Args:
        file: JSON lines with `step`, `tokens` read by all processes, `seconds` of training since the start of
            the run, without interruptions, and the values that the Trainer logged; non-finite numbers are null.
        tokens_per_step: tokens per step of all processes together.
        console: where to show progress.
        bits_per_nat: factor from `loss` to `bits_per_byte`, see `text_bytes`; None leaves those out.
    """

    def __init__(self, file: PathLike, tokens_per_step: int, console: Console, bits_per_nat: float | None = None):
        self.bits_per_nat = bits_per_nat
        self.file, self.tokens_per_step, self.console = to_path(file, "file"), tokens_per_step, console
        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.started = self.marked_time = 0.0
        self.marked_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.started = self.marked_time = time.monotonic()
        self.marked_step = state.global_step
        if state.is_world_process_zero:
            drop_after(self.file, state.global_step)
            before = read_metrics(self.file)
            self.started -= before[-1].get("seconds", 0.0) if before else 0.0
            self.bar = self.progress.add_task("training", total=state.max_steps, completed=state.global_step)
            self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.is_world_process_zero:
            self.progress.update(self.bar, completed=state.global_step)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.marked_time, self.marked_step = time.monotonic(), state.global_step

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.progress.stop()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        now = time.monotonic()
        record = {"step": state.global_step, "tokens": state.num_input_tokens_seen}
        record |= {"seconds": round(now - self.started, 3), **logs}
        if "loss" in logs and self.bits_per_nat is not None:
            record["bits_per_byte"] = logs["loss"] * self.bits_per_nat
        if "loss" in logs:
            steps = state.global_step - self.marked_step
            record["tokens_per_second"] = round(steps * self.tokens_per_step / max(now - self.marked_time, 1e-9), 1)
            self.marked_time, self.marked_step = now, state.global_step
        record = {name: value if _is_finite(value) else None for name, value in record.items()}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        self.progress.console.print(_line(record, state.max_steps), highlight=False)


def read_metrics(file: PathLike) -> list[dict[str, Any]]:
    """Read the records of a `metrics.jsonl`, without a last line that was cut off."""
    records, file = [], to_path(file, "file")
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def drop_after(file: PathLike, step: int) -> None:
    """Remove the records after `step`, the checkpoint that a run resumes from."""
    file = to_path(file, "file")
    if file.exists():
        kept = [record for record in read_metrics(file) if record["step"] <= step]
        files.write(file, "".join(json.dumps(record) + "\n" for record in kept))


def describe_losses(file: PathLike) -> str:
    """Describe the last losses of a run, a line each; empty if there are none."""
    lines, records = [], read_metrics(file)
    for title, prefix in (("training", ""), ("held out", "eval_")):
        found = [record for record in records if record.get(f"{prefix}loss") is not None]
        if found:
            bits = found[-1].get(f"{prefix}bits_per_byte")
            in_bits = "" if bits is None else f", {bits:.4f} bits per byte"
            lines.append(f"{title:<12}{found[-1][f'{prefix}loss']:.4f} nats per token{in_bits}")
    return "\n".join(lines)


def plot_loss(
    file: PathLike, picture: PathLike, baselines: dict[str, float] | None = None, title: str | None = None
) -> None:
    """Plot losses against tokens as a PNG, with baselines as horizontal lines.

    Args:
        file: metrics of a run.
        picture: the file to write.
        baselines: losses by name.
        title: text above the plot.
    """
    from matplotlib.figure import Figure

    records, picture = read_metrics(file), to_path(picture, "picture")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(record["tokens"], record[name]) for record in records if record.get(name) is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=label, marker="o" if name == "eval_loss" else None, markersize=3
            )
    for name, value in (baselines or {}).items():
        axes.axhline(value, linestyle=":", color="gray")
        axes.annotate(name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="gray")
    axes.set(xlabel="tokens seen", ylabel="loss (nats per token)", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with files.replacing(picture, "wb") as image:
        figure.savefig(image, dpi=150, format="png")


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _line(record: dict[str, Any], max_steps: int) -> str:
    parts = [f"step {record['step']:>6}/{max_steps}"]
    if "loss" in record:
        parts.append(f"loss {float(record['loss']):.4f}{_bits(record, 'bits_per_byte')}")
        parts.append(f"{record['tokens_per_second']:>9,.0f} tokens/s")
    if "eval_loss" in record:
        loss = record["eval_loss"]
        parts.append("held-out loss not finite" if loss is None else f"held-out loss {loss:.4f}")
        parts[-1] += _bits(record, "eval_bits_per_byte")
    return "  ".join(parts)


def _bits(record: dict[str, Any], name: str) -> str:
    return "" if record.get(name) is None else f" ({record[name]:.4f} bits/byte)"
