"""Runs that report to TensorBoard, read back by its own reader."""

from pathlib import Path

import pytest

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
    EventAccumulator,
)
from training.runs import options, quiet, write_inputs

from lightning_attention.training import TrainingOptions, train
from lightning_attention.training.metrics import read_metrics

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
# Values in TensorBoard, by their names in metrics.jsonl.
VALUES = {
    name: f"train/{name}" for name in ("loss", "bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second")
}
VALUES |= {"tokens": "train/tokens", "seconds": "train/seconds"}
VALUES |= {"eval_loss": "eval/loss", "eval_bits_per_byte": "eval/bits_per_byte"}


def scalars(run: Path) -> list[dict[str, list[tuple[int, float]]]]:
    """Values of every start of a run, by name."""
    found = []
    for folder in sorted((run / "runs").iterdir()):
        events = EventAccumulator(str(folder))
        events.Reload()
        found.append({tag: [(x.step, x.value) for x in events.Scalars(tag)] for tag in events.Tags()["scalars"]})
    return found


def test_tensorboard_has_the_metrics_of_a_run(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    train(options(tmp_path, report_to="tensorboard"), console=quiet())
    (found,) = scalars(tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for name, tag in VALUES.items():
        logged = [(record["step"], record[name]) for record in records if name in record]
        assert logged, name
        assert [step for step, _ in found[tag]] == [step for step, _ in logged], name
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in logged], rel=1e-6), name


def test_a_resumed_run_reports_on(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    train(options(tmp_path, steps=10, report_to="tensorboard", schedule="constant", warmup=0.0), console=quiet())
    saved = tmp_path / "run" / "run.json"
    saved.write_text(saved.read_text().replace('"steps": 10', '"steps": 20'))
    (earlier,) = (tmp_path / "run" / "runs").iterdir()
    earlier.rename(earlier.with_name("0"))  # the name is a time in seconds
    train(TrainingOptions.load(tmp_path / "run"), resume=True, console=quiet())
    first, second = scalars(tmp_path / "run")
    assert [step for step, _ in first["train/loss"]] == [5, 10]
    assert [step for step, _ in second["train/loss"]] == [15, 20]
    assert second["train/seconds"][0][1] > first["train/seconds"][-1][1]


def test_several_segments_and_adapters_do_not_matter_to_tensorboard(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    train(options(tmp_path, "base", steps=5), console=quiet())
    changes = {"init_from": tmp_path / "base", "lora_rank": 2, "segment_length": 17, "steps": 5}
    train(options(tmp_path, config=None, report_to="tensorboard", **changes), console=quiet())
    (found,) = scalars(tmp_path / "run")
    assert [step for step, _ in found["train/loss"]] == [5]
