"""Runs that report to trackers; `tests/clients/test_trackers.py` runs real ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training.runs import options, quiet
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from lightning_attention.training import TrainingOptions, train
from lightning_attention.training.metrics import read_metrics
from lightning_attention.training.reporting import report_names

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
# A tracker that needs no package: the tests put their own in its place.
NAME = "kubeflow"


class Tracker(TrainerCallback):
    """Tracker that records its events, and fails at one of them."""

    made: list["Tracker"] = []
    fails_at = ""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.logs: list[dict[str, Any]] = []
        self.made.append(self)
        self._event("made")

    def _event(self, name: str) -> None:
        self.events.append(name)
        if name == self.fails_at:
            raise RuntimeError("the server\nis down")

    def on_train_begin(self, args, state, control, **kwargs):
        self.name, self.config = args.run_name, kwargs["model"].config.to_dict() | args.to_dict()
        self._event("begin")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({"step": state.global_step} | (logs or {}))
        self._event("log")

    def on_train_end(self, args, state, control, **kwargs):
        self._event("end")


@pytest.fixture
def tracker(monkeypatch) -> type[Tracker]:
    monkeypatch.setattr(Tracker, "made", [])
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, NAME, Tracker)
    return Tracker


@pytest.mark.parametrize("changes", [{}, {"segment_length": 17}, {"held_out": 0.0}], ids=str)
def test_a_tracker_gets_what_is_in_the_metrics(files, tracker, changes):
    train(options(files, report_to=NAME, **changes), console=quiet())
    (made,) = tracker.made
    assert made.events[:2] == ["made", "begin"]
    assert made.events[-1] == "end"
    assert made.name.startswith("run-20")
    assert (made.config["hidden_size"], made.config["max_steps"]) == (24, 20)
    logs = [log for log in made.logs if "train_runtime" not in log]
    assert logs == read_metrics(files / "run" / "metrics.jsonl")
    wanted = {"loss", "bits_per_byte", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds"}
    assert all(wanted <= log.keys() for log in logs if "loss" in log)
    assert any("eval_bits_per_byte" in log for log in logs) == ("held_out" not in changes)


def test_a_run_goes_on_without_a_tracker_that_fails(files, tracker, monkeypatch):
    monkeypatch.setattr(tracker, "fails_at", "log")
    train(options(files, report_to=[NAME]), console=quiet())
    (made,) = tracker.made
    assert made.events == ["made", "begin", "log"]
    lines = [line for line in (files / "run" / "train.log").read_text().splitlines() if "no longer reporting" in line]
    assert len(lines) == 1
    assert lines[0].endswith("warning: no longer reporting to kubeflow, which failed: the server is down")
    assert (files / "run" / "checkpoint-20").exists()


@pytest.mark.parametrize("event", ["made", "begin"])
def test_a_tracker_that_cannot_begin_is_an_error_that_leaves_nothing(files, tracker, monkeypatch, event):
    monkeypatch.setattr(tracker, "fails_at", event)
    before = sorted(files.rglob("*"))
    with pytest.raises(ValueError, match="report_to 'kubeflow' cannot be used: the server is down"):
        train(options(files, report_to=NAME), console=quiet())
    assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("paper", "report_to must be among azure_ml, .*, wandb, got 'paper'"),
        ("all", "report_to must be among azure_ml, .*, wandb, got 'all'"),
        ("", "report_to must be among azure_ml, .*, wandb, got ''"),
        ("comet_ml", "'comet_ml' needs a package that is not installed: run pip install comet-ml"),
        ("dvclive", "'dvclive' needs a package that is not installed: run pip install dvclive"),
    ],
)
def test_a_tracker_that_is_unknown_or_not_installed_is_refused_before_any_work(files, name, message):
    with pytest.raises(ValueError, match=message):
        train(options(files, report_to=name), console=quiet())
    assert not (files / "run").exists()


@pytest.mark.parametrize(
    ("given", "names"),
    [("tensorboard", ("tensorboard",)), (["a", "b"], ("a", "b")), ("none", ()), (("none",), ()), ((), ())],
    ids=str,
)
def test_names_of_trackers_are_one_or_several(given, names):
    assert report_names(given) == names


@pytest.mark.parametrize("given", [3, None, [3], {"a": 1}, ["a", "a"], ["none", "a"]], ids=str)
def test_other_values_are_no_names_of_trackers(tmp_path, given):
    with pytest.raises((TypeError, ValueError), match="report_to must"):
        TrainingOptions(tmp_path, report_to=given)


def test_a_resumed_run_may_report_elsewhere(files, tracker):
    train(options(files, steps=10), console=quiet())

    def resume(steps: int, name: str) -> None:
        saved = TrainingOptions.load(files / "run")
        train(replace(saved, steps=steps, report_to=report_names(name)), resume=True, console=quiet())

    resume(20, NAME)
    assert [log["step"] for log in tracker.made[0].logs if "loss" in log] == [15, 20]
    assert TrainingOptions.load(files / "run").report_to == (NAME,)
    resume(30, "none")
    assert len(tracker.made) == 1
    lines = (files / "run" / "train.log").read_text()
    assert "report_to [] is now ['kubeflow']" in lines
    assert "report_to ['kubeflow'] is now []" in lines


def test_what_tensorboard_wrote_is_removed_after_a_failure_before_the_first_step(files, tracker, monkeypatch):
    """Its callback writes to runs/ at the beginning; folders of earlier runs stay."""

    def begin(self, args, state, control, **kwargs):
        folder = Path(args.output_dir, "runs", "now")
        folder.mkdir(parents=True)
        (folder / "events").touch()
        raise RuntimeError("no")

    monkeypatch.setattr(tracker, "on_train_begin", begin)
    with pytest.raises(ValueError, match="cannot be used"):
        train(options(files, report_to=NAME), console=quiet())
    assert not (files / "run").exists()
    train(options(files, steps=10), console=quiet())
    (files / "run" / "runs" / "before").mkdir(parents=True)
    with pytest.raises(ValueError, match="cannot be used"):
        train(options(files, steps=20, report_to=NAME), resume=True, console=quiet())
    assert [path.name for path in (files / "run" / "runs").iterdir()] == ["before"]
