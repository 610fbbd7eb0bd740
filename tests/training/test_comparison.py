"""Losses of several runs side by side."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_attention.cli import main
from lightning_attention.training import TrainingOptions
from lightning_attention.training.comparison import read_runs, remarks, table_of_runs
from lightning_attention.training.plots import plot_loss, plot_runs


def write(folder: Path, *records: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def record(step: int, seconds: float = 0.0, **losses: float | None) -> dict[str, Any]:
    return {"step": step, "tokens": 100 * step, "seconds": seconds or step * 2.0, **losses}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    first = record(1, loss=3.0, bits_per_byte=4.0), record(2, eval_loss=2.5, eval_bits_per_byte=3.5)
    second = record(1, loss=2.0), record(2, eval_loss=1.5), record(3, loss=None), record(4, eval_loss=1.75)
    return [write(tmp_path / "a", *first), write(tmp_path / "b", *second)]


def lines(table: Any) -> list[list[str]]:
    output = io.StringIO()
    Console(file=output, width=200).print(table)
    return [line.split() for line in output.getvalue().splitlines()]


def test_the_table_has_the_last_and_the_lowest_losses(runs):
    assert lines(table_of_runs(read_runs(runs)))[1:] == [
        ["a", "200", "0:00:04", "3.0000", "4.0000", "2.5000", "3.5000", "2.5000", "2"],
        ["b", "400", "0:00:08", "2.0000", "-", "1.7500", "-", "1.5000", "2"],
    ]


def test_runs_that_are_odd_have_a_remark(tmp_path, runs):
    for folder, steps, tokenizer in zip(runs, (2, 1000), ("bytes", "bpe"), strict=True):
        TrainingOptions(folder, steps=steps).save()
        (folder / "checkpoint-1").mkdir()
        (folder / "checkpoint-1" / "tokenizer.json").write_text(tokenizer)
    assert remarks([*runs, tmp_path]) == [
        f"{runs[1]} has made 4 of 1,000 steps",
        "tokenizers differ: bits per byte compare, losses in nats per token do not",
    ]
    (runs[1] / "checkpoint-1" / "tokenizer.json").write_text("bytes")
    assert remarks([runs[1], runs[0]]) == [f"{runs[1]} has made 4 of 1,000 steps"]


@pytest.mark.parametrize(
    "records",
    [
        [record(1, loss=2.0)],
        [record(1, eval_loss=2.0)],
        [record(1, bits_per_byte=2.0, loss=1.0), {"step": 2, "tokens": None, "seconds": 3.0, "loss": 1.0}],
        [record(1, loss=1.0), {"step": 2, "tokens": 3, "seconds": "x", "loss": 1.0}, {"loss": 3.0}],
        [{**record(1, loss=1.0), "eval_loss": "x"}],
        [record(step, loss=1.0) for step in range(1, 3000)],
    ],
    ids=["one point", "held out alone", "no tokens", "no time", "a text as loss", "many"],
)
@pytest.mark.filterwarnings("error")
def test_odd_records_and_names_are_drawn(tmp_path, runs, records):
    odd = write(tmp_path / "_läuft $x_1$ 日本 [red]", *records)
    found = read_runs([odd, *runs])
    plot_runs(found, tmp_path / "odd.png")
    plot_loss(odd / "metrics.jsonl", tmp_path / "one.png", {"a line": 9.0}, f"{odd.name}: 1M parameters")
    assert len(lines(table_of_runs(found))) == 4
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("odd.png", "one.png"))


def test_the_plot_is_a_picture_also_of_runs_without_bytes(tmp_path, runs):
    for name, folders in (("both", runs), ("none", [runs[1], write(tmp_path / "c", record(1, loss=1.0))])):
        plot_runs(read_runs(folders), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_seconds_of_older_versions_go_on_over_resumes(tmp_path, runs):
    old = write(tmp_path / "old", record(1, 5.0, loss=1.0), record(2, 9.0, loss=1.0), record(3, 4.0, loss=1.0))
    assert [x["seconds"] for x in read_runs([old, runs[0]])["old"]] == [5.0, 9.0, 13.0]


def test_runs_of_one_name_have_their_paths(tmp_path, runs):
    same = write(tmp_path / "other" / "a", record(1, loss=1.0))
    assert list(read_runs([runs[0], same])) == [str(runs[0]), str(same)]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["a"], "give two runs or more to compare"),
        (["a", "b/../a"], "a run is given twice"),
        (["a", "nowhere"], "nowhere holds no run with metrics: there is no file metrics.jsonl"),
        (["a", "empty"], "empty/metrics.jsonl holds no losses"),
        (["a", "b", "--output", "nowhere/x.png"], "No such file or directory"),
    ],
    ids=["one run", "twice", "no folder", "no losses", "no folder for the plot"],
)
def test_what_cannot_be_compared_is_refused(tmp_path, runs, monkeypatch, capsys, folders, message):
    write(tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-attention", "compare", *folders])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not list(tmp_path.glob("*.png"))


def test_the_command_prints_the_table_and_writes_the_plot(tmp_path, runs, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-attention", "compare", "a", "b"])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, _ = capsys.readouterr()
    assert not stopped.value.code
    assert "1.5000" in out
    assert out.endswith("plot  compare.png\n")
    assert (tmp_path / "compare.png").exists()
