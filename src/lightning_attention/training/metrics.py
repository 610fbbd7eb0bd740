"""Metrics of a run: `metrics.jsonl`, and progress on the terminal."""

import json
import math
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import files
from ..paths import PathLike, to_path
from .measurements import Measurements, in_hours
from .run_log import RunLog

Records = list[dict[str, Any]]


class MetricsCallback(TrainerCallback):
    """Append every log to `metrics.jsonl` and show it; on a terminal also show the progress of the run.

    Args:
        file: JSON lines with `step` and the values that the Trainer logged, see `Measurements.added_to`; numbers that
            are not finite are null.
        measurements: measurements of the run, for the time left.
        log: where to show what was logged.
    """

    def __init__(self, file: PathLike, measurements: Measurements, log: RunLog):
        self.file, self.measurements, self.log = to_path(file, "file"), measurements, log
        logged, left = TextColumn("{task.fields[logged]}"), TextColumn("{task.fields[left]}")
        columns = TextColumn("step"), BarColumn(12), MofNCompleteColumn(), logged, TimeElapsedColumn(), left
        self.progress = Progress(*columns, console=log.console, transient=True, disable=not log.console.is_terminal)
        self.is_estimated = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.is_world_process_zero:
            drop_after(self.file, state.global_step)
            fields: dict[str, Any] = {"completed": state.global_step, "logged": "", "left": ""}
            self.bar = self.progress.add_task("training", total=state.max_steps, **fields)
            self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.is_world_process_zero:
            self.progress.update(self.bar, completed=state.global_step, left=self._time_left(state))
            if not self.is_estimated and self.measurements.is_estimated:
                self.is_estimated = True
                self.log.print(self.measurements.describe_estimate(state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.stop()

    def stop(self) -> None:
        """Remove the progress from the terminal."""
        self.progress.stop()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        record = {"step": state.global_step} | {k: v if _is_finite(v) else None for k, v in logs.items()}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        if record.get("loss") is not None:
            logged = f"loss {record['loss']:.4f} {record['tokens_per_second']:,.0f} tokens/s"
            self.progress.update(self.bar, logged=logged)
        self.log.print("  ".join(filter(None, (_line(record, state.max_steps), self._time_left(state)))))

    def _time_left(self, state: TrainerState) -> str:
        left = self.measurements.seconds_left(state)
        return f"ETA {in_hours(left)}" if left else ""


def read_metrics(file: PathLike) -> Records:
    """Read the records of a `metrics.jsonl`, without a last line that was cut off."""
    records, file = [], to_path(file, "file")
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def seconds_logged(file: PathLike, step: int) -> float:
    """Seconds of training in the last record up to a step; 0 if there is none."""
    return max((record.get("seconds") or 0.0 for record in read_metrics(file) if record["step"] <= step), default=0.0)


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
