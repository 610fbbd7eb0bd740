"""Measurements of a run beside its losses: tokens, seconds, tokens per second, bits per byte, and the time left."""

import time
from collections import deque
from datetime import timedelta
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

RECENT = 100  # steps whose mean duration estimates the time left
# The total time is estimated after so many steps, or so many seconds of them.
STEPS, SECONDS = 4, 10.0


class Measurements(TrainerCallback, ExportableState):
    """Measure a run, and estimate the time that is left.

    The estimate is the mean duration of recent steps times the steps left, plus the duration of the last evaluation
    times the evaluations left. The first step of a process, which compiles, does not count.

    Args:
        tokens_per_step: tokens per step of all processes together.
        bits_per_nat: factor from `loss` to `bits_per_byte`, see `text_bytes`; None leaves those out.
        eval_every: steps between evaluations; None for no evaluation.
        seconds_before: seconds of a run that resumes from a checkpoint that does not hold them, of an older version.
    """

    def __init__(
        self,
        tokens_per_step: int,
        bits_per_nat: float | None = None,
        eval_every: int | None = None,
        seconds_before: float = 0.0,
    ):
        self.tokens_per_step, self.bits_per_nat = tokens_per_step, bits_per_nat
        self.eval_every, self.seconds_before = eval_every, seconds_before
        self.started = self.marked_time = self.step_ended = time.monotonic()
        self.marked_step = self.step = self.steps_made = 0
        self.step_seconds: deque[float] = deque(maxlen=RECENT)
        self.evaluation_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training since the start of the run, without interruptions."""
        return time.monotonic() - self.started

    def state(self) -> dict[str, Any]:
        """The seconds, in the state that checkpoints keep."""
        return {"args": {}, "attributes": {"seconds": round(self.seconds, 3)}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.started = self.marked_time = self.step_ended = time.monotonic()
        self.marked_step = self.step = state.global_step
        if state.global_step:
            kept: Any = state.stateful_callbacks
            name = type(self).__name__
            self.started -= kept[name]["attributes"]["seconds"] if name in kept else self.seconds_before
            kept.setdefault(name, self.state())  # transformers only replaces what a checkpoint has

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        now = time.monotonic()
        if self.steps_made:
            self.step_seconds.append(now - self.step_ended)
        self.step, self.step_ended, self.steps_made = state.global_step, now, self.steps_made + 1

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.marked_time = self.step_ended = time.monotonic()
        self.marked_step = state.global_step
        self.evaluation_seconds = kwargs["metrics"].get("eval_runtime")

    def added_to(self, logs: dict[str, float], state: TrainerState) -> dict[str, float]:
        """Return logged values with those that are measured.

        Args:
            logs: values of a step or an evaluation; the Trainer's summary at the end is returned as it is.
            state: state of the trainer.

        Returns:
            The values, with `tokens` read by all processes and `seconds`; beside a `loss` also `tokens_per_second`
            since the log before, evaluations left out, and `bits_per_byte`.
        """
        if "train_runtime" in logs:
            return logs
        now = time.monotonic()
        logs = {"tokens": state.num_input_tokens_seen, "seconds": round(now - self.started, 3)} | logs
        if "loss" in logs:
            if self.bits_per_nat is not None:
                logs["bits_per_byte"] = logs["loss"] * self.bits_per_nat
            tokens = (state.global_step - self.marked_step) * self.tokens_per_step
            logs["tokens_per_second"] = round(tokens / max(now - self.marked_time, 1e-9), 1)
            self.marked_time, self.marked_step = now, state.global_step
        return logs

    @property
    def is_estimated(self) -> bool:
        """True if enough steps are measured to estimate the time of the run."""
        return len(self.step_seconds) >= STEPS or sum(self.step_seconds) >= SECONDS

    def seconds_left(self, state: TrainerState) -> float | None:
        """Estimate the seconds until the end of the run; None before the second step of the process."""
        if not self.step_seconds:
            return None
        steps = state.max_steps - self.step
        left = steps * sum(self.step_seconds) / len(self.step_seconds)
        if self.evaluation_seconds is not None and self.eval_every is not None:
            evaluations = -(-state.max_steps // self.eval_every) - self.step // self.eval_every
            left += self.evaluation_seconds * evaluations
        return left if steps else 0.0

    def describe_estimate(self, state: TrainerState) -> str:
        """Describe the time that the run will take, after enough steps."""
        mean, left = sum(self.step_seconds) / len(self.step_seconds), self.seconds_left(state) or 0.0
        omitted = self.eval_every is not None and self.evaluation_seconds is None
        return (
            f"estimate: {in_hours(self.seconds + left)} in all, {in_hours(left)} left, at {mean:.3g} s a step and "
            f"{self.tokens_per_step / mean:,.0f} tokens/s{', evaluations not counted' if omitted else ''}"
        )


def in_hours(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds.

    Example:
        >>> from lightning_attention.training.measurements import in_hours
        >>> in_hours(4000.2)
        '1:06:40'
    """
    return str(timedelta(seconds=round(seconds)))
