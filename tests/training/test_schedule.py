"""Learning rates of runs, also of runs that are extended."""

import io
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from training.runs import options, quiet
from transformers import get_scheduler

from lightning_attention.training import TrainingOptions, train
from lightning_attention.training.metrics import read_metrics
from lightning_attention.training.schedule import learning_rate

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
RUN: dict[str, Any] = {"steps": 10, "save_every": 5, "log_every": 1, "held_out": 0, "learning_rate": 1e-2}


def rates(options: TrainingOptions) -> list[float]:
    """Rate of every step, from the metrics."""
    return [x["learning_rate"] for x in read_metrics(options.output / "metrics.jsonl") if "learning_rate" in x]


def expected(options: TrainingOptions) -> list[float]:
    return [learning_rate(options, step) for step in range(options.steps)]


def resume(options: TrainingOptions, **changes: Any) -> tuple[TrainingOptions, str]:
    """Resume a run; return its options and the printed text."""
    output = io.StringIO()
    train(
        replace(TrainingOptions.load(options.output), **changes), resume=True, console=Console(file=output, width=200)
    )
    return TrainingOptions.load(options.output), output.getvalue()


def test_the_default_schedule_is_a_cosine_to_a_tenth(files):
    run = options(files, **RUN, warmup=0.2)
    train(run, console=quiet())
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1e-2)
    how = {"num_warmup_steps": 2, "num_training_steps": 10, "scheduler_specific_kwargs": {"min_lr_rate": 0.1}}
    scheduler: Any = get_scheduler("cosine_with_min_lr", optimizer, **how)
    assert rates(run) == expected(run) == [1e-2 * scheduler.lr_lambdas[0](step) for step in range(10)]


@pytest.mark.parametrize(
    ("changes", "some"),
    [
        ({"schedule": "constant", "warmup": 0.2}, {1: 0, 2: 5e-3, 3: 1e-2, 10: 1e-2}),
        ({"schedule": "wsd", "decay_steps": 4}, {2: 1e-2, 7: 1e-2, 8: 5.5e-3}),
        ({"schedule": "wsd", "decay_steps": 0.4, "min_lr": 0}, {7: 1e-2, 8: 5e-3}),
        ({"schedule": "cosine", "min_lr": 2e-3, "warmup": 0}, {1: 1e-2, 6: 6e-3}),
    ],
    ids=["constant", "wsd", "wsd, a fraction, to 0", "cosine to another rate"],
)
def test_schedules_have_their_rates(files, changes, some):
    run = options(files, **RUN | changes)
    train(run, console=quiet())
    found = rates(run)
    assert found == expected(run)
    assert {step: found[step - 1] for step in some} == pytest.approx(some)


@pytest.mark.parametrize(
    "changes", [{"schedule": "constant"}, {"schedule": "wsd", "decay_steps": 2}], ids=["constant", "wsd"]
)
def test_an_extended_run_keeps_its_rate_and_its_losses(files, changes):
    """The extended run resumes before the decay; the warm-up keeps its 2 steps."""
    changes |= RUN | {"warmup": 0.2}
    train(options(files, "long", **changes | {"steps": 20, "warmup": 0.1}), console=quiet())
    short = options(files, "short", **changes)
    train(short, console=quiet())
    shutil.rmtree(short.output / "checkpoint-10")
    extended, text = resume(short, steps=20)
    assert "steps 10 is now 20" in text
    assert "learning rate" not in text
    assert (extended.num_warmup_steps, extended.steps) == (2, 20)
    assert rates(extended) == expected(extended)
    long, found = (read_metrics(files / name / "metrics.jsonl") for name in ("long", "short"))
    assert [x["loss"] for x in found if "loss" in x] == [x["loss"] for x in long if "loss" in x]


def test_a_cosine_follows_the_new_curve_from_the_first_step_after_resuming(files):
    run = options(files, **RUN, warmup=0.2)
    train(run, console=quiet())
    extended, text = resume(run, steps=20)
    assert "the learning rate after step 10 was 0.001, it is now 0.00628" in text
    assert rates(extended)[:10] == expected(run)
    assert rates(extended)[10:] == expected(extended)[10:]
    assert extended.num_warmup_steps == 2
    # Resuming again changes nothing, also from the checkpoint before the extension.
    shutil.rmtree(run.output / "checkpoint-20")
    shutil.rmtree(run.output / "checkpoint-15", ignore_errors=True)
    assert resume(run)[0] == extended
    assert rates(extended)[10:] == expected(extended)[10:]


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": 1e-3}, {"schedule": "constant"}, {"schedule": "wsd", "decay_steps": 2}, {"min_lr": 0}],
    ids=lambda changes: next(iter(changes.items())),
)
def test_a_resumed_run_may_change_its_learning_rates(files, changes):
    run = options(files, **RUN)
    train(run, console=quiet())
    shutil.rmtree(run.output / "checkpoint-10")
    changed, text = resume(run, **changes)
    assert all(f"{name} {getattr(run, name)} is now {value}" in text for name, value in changes.items())
    assert rates(changed)[5:] == expected(changed)[5:]
    state = torch.load(run.output / "checkpoint-10" / "optimizer.pt", weights_only=True)
    [rate] = {group["lr"] for group in state["param_groups"]}
    assert rate == pytest.approx(learning_rate(changed, 10))


def test_resuming_without_changes_gives_the_same_losses(files):
    run = options(files, **RUN)
    train(run, console=quiet())
    before = [(x["loss"], x["learning_rate"]) for x in read_metrics(run.output / "metrics.jsonl") if "loss" in x]
    shutil.rmtree(run.output / "checkpoint-10")
    resume(run)
    records = read_metrics(run.output / "metrics.jsonl")
    assert [(x["loss"], x["learning_rate"]) for x in records if "loss" in x] == before
    seconds = [x["seconds"] for x in records]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "linear"}, "schedule must be one of 'cosine', 'wsd', 'constant', got 'linear'"),
        ({"decay_steps": 0.1}, "decay_steps goes with schedule 'wsd', not with 'cosine'"),
        ({"schedule": "wsd", "decay_steps": 2.5}, "decay_steps must be a number of steps, or a fraction, got 2.5"),
        ({"schedule": "wsd", "decay_steps": 0}, "decay_steps must be a number of steps, or a fraction, got 0"),
        ({"schedule": "wsd", "decay_steps": 20}, "1 steps of warm-up and 20 of decay exceed the 20 steps"),
        ({"schedule": "constant", "min_lr": 0.0}, "min_lr goes with schedule 'cosine' or 'wsd', not with 'constant'"),
        ({"min_lr": 1.0}, "min_lr must be between 0 and the learning_rate 0.002, got 1.0"),
        ({"min_lr": -1.0}, "min_lr must be between 0 and the learning_rate 0.002, got -1.0"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_options_that_do_not_go_together_are_refused(files, changes, message):
    with pytest.raises(ValueError, match=message):
        options(files, **changes)
