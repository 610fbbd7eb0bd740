"""Seconds of a run over resumes, and the estimate of the time left."""

import json
import time
from pathlib import Path

import pytest
from training.runs import options, quiet
from transformers import TrainerControl, TrainerState, TrainingArguments

from lightning_attention.training import train
from lightning_attention.training.measurements import Measurements, in_hours
from lightning_attention.training.metrics import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Clock:
    """Clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 5000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


class Run:
    """Events of a run with 100 steps, an evaluation of 5 s after every 20, and 1000 tokens a step."""

    def __init__(self, tmp_path: Path, clock: Clock, eval_every: int | None = 20, **options: float):
        self.clock, self.state, self.arguments = clock, TrainerState(max_steps=100), TrainingArguments(str(tmp_path))
        self.measurements = Measurements(1000, None, eval_every, **options)

    def begin(self, step: int = 0) -> None:
        self.state.global_step = step
        self.measurements.on_train_begin(self.arguments, self.state, TrainerControl())

    def step(self, seconds: float) -> None:
        self.clock.now += seconds
        self.state.global_step += 1
        self.measurements.on_step_end(self.arguments, self.state, TrainerControl())

    def evaluate(self) -> None:
        self.clock.now += 5
        metrics = {"metrics": {"eval_loss": 1.0, "eval_runtime": 5.0}}
        self.measurements.on_evaluate(self.arguments, self.state, TrainerControl(), **metrics)

    @property
    def left(self) -> float | None:
        return self.measurements.seconds_left(self.state)


def test_the_time_left_counts_steps_and_evaluations_but_not_compilation(tmp_path, clock):
    run = Run(tmp_path, clock)
    run.begin()
    run.step(500)
    assert run.left is None
    run.step(2)
    assert run.left == pytest.approx(98 * 2)
    assert not run.measurements.is_estimated
    for _ in range(3):
        run.step(2)
    assert run.measurements.is_estimated
    assert run.measurements.describe_estimate(run.state) == (
        "estimate: 0:11:38 in all, 0:03:10 left, at 2 s a step and 500 tokens/s, evaluations not counted"
    )
    for _ in range(15):
        run.step(2)
    run.evaluate()
    assert run.left == pytest.approx(80 * 2 + 4 * 5)
    run.step(2)
    assert run.left == pytest.approx(79 * 2 + 4 * 5)
    for _ in range(79):
        run.step(2)
    assert run.left == 0


def test_a_few_long_steps_are_enough_for_an_estimate(tmp_path, clock):
    run = Run(tmp_path, clock, eval_every=None)
    run.begin(50)
    run.step(900)
    run.step(300)
    assert run.measurements.is_estimated
    assert run.measurements.describe_estimate(run.state) == (
        "estimate: 4:20:00 in all, 4:00:00 left, at 300 s a step and 3 tokens/s"
    )


def test_the_estimate_follows_a_machine_that_became_slower(tmp_path, clock):
    run = Run(tmp_path, clock, eval_every=None)
    run.state.max_steps = 1000
    run.begin()
    for seconds in [1] * 300 + [3] * 101:
        run.step(seconds)
    assert run.left == pytest.approx(3 * 599)


def test_evaluations_are_no_part_of_tokens_per_second(tmp_path, clock):
    run = Run(tmp_path, clock)
    run.begin()
    for _ in range(2):
        run.step(2)
    run.evaluate()
    run.step(4)
    assert run.measurements.added_to({"loss": 1.0}, run.state)["tokens_per_second"] == 250
    run.step(2)
    logged = run.measurements.added_to({"loss": 1.0}, run.state)
    assert (logged["tokens_per_second"], logged["seconds"]) == (500, 15)


@pytest.mark.parametrize("seconds", [59.6, 3600 * 25, 0.2], ids=["1 min", "1 day", "0"])
def test_durations_are_in_hours(seconds):
    assert in_hours(seconds) == {59.6: "0:01:00", 90_000: "1 day, 1:00:00", 0.2: "0:00:00"}[seconds]


def seconds(run: Path) -> list[float]:
    return [record["seconds"] for record in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("version", ["this", "older"])
def test_seconds_go_on_from_the_checkpoint(files, version):
    """A killed run leaves records after its last checkpoint, and none right before it."""
    train(options(files, steps=20, save_every=8, log_every=5), console=quiet())
    run = files / "run"
    state = run / "checkpoint-16" / "trainer_state.json"
    content = json.loads(state.read_text())
    saved = content["stateful_callbacks"]["Measurements"]["attributes"]["seconds"]
    times = {record["step"]: record["seconds"] for record in read_metrics(run / "metrics.jsonl")}
    assert times[15] < saved < times[20]
    if version == "this":
        content["stateful_callbacks"]["Measurements"]["attributes"]["seconds"] = 1000.0
    else:
        del content["stateful_callbacks"]["Measurements"]
        lines = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(lines.replace(f'"seconds": {times[15]}', '"seconds": 1000.0'))
    state.write_text(json.dumps(content))
    (run / "checkpoint-16" / "checksums.sha256").unlink()
    for file in (run / "checkpoint-20").iterdir():
        file.unlink()
    (run / "checkpoint-20").rmdir()
    train(options(files, steps=30, save_every=8, log_every=5), resume=True, console=quiet())
    later = [record["seconds"] for record in read_metrics(run / "metrics.jsonl") if record["step"] > 16]
    assert later == sorted(later)
    assert 1000 < later[0] < later[-1] < 1100
