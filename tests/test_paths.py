"""Every public path is a `str` or an `os.PathLike`."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_model import make_config

from benchmarks import report
from benchmarks.plot import plot_sweep
from benchmarks.run import Plot, run
from lightning_attention.inference import load
from lightning_attention.models import LightningForCausalLM
from lightning_attention.models.checkpoint import checkpoint_step, checkpoints, last_checkpoint, load_model
from lightning_attention.training import Corpus, TrainingOptions, byte_tokenizer, load_tokenizer
from lightning_attention.training.documents import Sources
from lightning_attention.training.measurements import Measurements
from lightning_attention.training.metrics import MetricsCallback, drop_after, read_metrics
from lightning_attention.training.plots import plot_loss
from lightning_attention.training.run_log import RunLog


class Place(os.PathLike):
    """Path-like object that is not a `pathlib.Path`."""

    def __init__(self, path: Path):
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Folder with data, a corpus, checkpoints, metrics and options."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("home")
    (home / "data.txt").write_text("some text " * 50)
    (home / "model.json").write_text("{}")
    tokenizer = byte_tokenizer()
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    for folder in (home / "run" / "checkpoint-7", home / "run" / "checkpoint-12"):
        LightningForCausalLM(make_config(vocab_size=len(tokenizer), **ids)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    Corpus.prepare(home / "corpus", Sources.find([home / "data.txt"]), tokenizer)
    (home / "metrics.jsonl").write_text('{"step": 1, "tokens": 1, "loss": 1.0}\n')
    options(home / "options").save()
    report.write({"runs": {}, "machine": {"device": "d", "commit": "c"}}, home / "op.json")
    return home


def options(output: Any, **changes: Any) -> TrainingOptions:
    return TrainingOptions(output=output, **changes)


SILENT = RunLog(Console(quiet=True))
NOTHING = {"not_measured": "x", "batch_size": 1, "num_heads": 1, "head_dim": 1, "dtype": "float32"}
DOCUMENT = {"machine": {"device": "d"}, "runs": {"sweep": {"results": [NOTHING]}}}


def benchmark(output: Any) -> list[Path]:
    plot = Plot("none", plot_sweep)
    cpu = torch.device("cpu")
    return run("x", [], plot, cpu, dtype=torch.float32, command="", output=output, echo=lambda line: None)


# Name of the argument, a path in the folder, and a call with a path.
PATHS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "load": ("checkpoint", "run", lambda path: load(path)[0].config.name_or_path),
    "load_model": ("folder", "run/checkpoint-7", lambda path: load_model(path).config.name_or_path),
    "checkpoints": ("folder", "run", checkpoints),
    "checkpoint_step": ("checkpoint", "run/checkpoint-7", checkpoint_step),
    "last_checkpoint": ("folder", "run", last_checkpoint),
    "load_tokenizer": ("tokenizer", "run/checkpoint-7", lambda path: load_tokenizer(path)("ab").input_ids),
    "TrainingOptions, output": ("output", "x", options),
    "TrainingOptions, data": ("data", "data.txt", lambda path: options("x", data=[path])),
    "TrainingOptions, data, one": ("data", "data.txt", lambda path: options("x", data=path)),
    "TrainingOptions, config": ("config", "model.json", lambda path: options("x", config=path)),
    "TrainingOptions, tokenizer": ("tokenizer", "run/checkpoint-7", lambda path: options("x", tokenizer=path)),
    "TrainingOptions.load": ("output", "options", TrainingOptions.load),
    "Sources.find": ("paths", "data.txt", lambda path: Sources.find([path])),
    "Sources.find, one": ("paths", "data.txt", Sources.find),
    "Sources": ("files", "data.txt", lambda path: [[*parts] for parts in Sources((path,)).documents()]),
    "Corpus": ("folder", "corpus", lambda path: Corpus(path, "", 259, 257, 1, 9, 9, 0, 1).train_tokens()[:].tolist()),
    "Corpus.open": ("folder", "corpus", Corpus.open),
    "Corpus.prepare": ("folder", "new", lambda path: Corpus.prepare(path, Sources.find("data.txt"), byte_tokenizer())),
    "MetricsCallback": ("file", "metrics.jsonl", lambda path: MetricsCallback(path, Measurements(1), SILENT).file),
    "read_metrics": ("file", "metrics.jsonl", read_metrics),
    "drop_after": ("file", "metrics.jsonl", lambda path: drop_after(path, 5)),
    "plot_loss, file": ("file", "metrics.jsonl", lambda path: plot_loss(path, "loss.png")),
    "plot_loss, picture": ("picture", "loss.png", lambda path: plot_loss("metrics.jsonl", path)),
    "bench, start": ("path", "op.json", lambda path: report.start(path, {"device": "d", "commit": "c"})),
    "bench, write": ("path", "written.json", lambda path: report.write({}, path)),
    "bench, plot": ("picture", "op.png", lambda path: plot_sweep(DOCUMENT, path)),
}


@pytest.mark.parametrize(("name", "path", "call"), PATHS.values(), ids=PATHS)
def test_a_path_is_a_str_or_path_like(monkeypatch, home, name, path, call):
    monkeypatch.chdir(home)
    expected = call(Path(path))
    assert call(path) == expected
    assert call(Place(Path(path))) == expected


@pytest.mark.parametrize("wrong", [3, None, b"run"], ids=["int", "None", "bytes"])
@pytest.mark.parametrize(
    ("name", "path", "call"),
    [*PATHS.values(), ("output", "", benchmark)],
    ids=[*PATHS, "bench, run"],
)
def test_other_types_are_refused(monkeypatch, home, name, path, call, wrong):
    monkeypatch.chdir(home)
    if name == "config" and wrong is None:  # no file
        return
    with pytest.raises(TypeError, match=f"^{name} must be a str or os.PathLike, got {type(wrong).__name__}$"):
        call(wrong)
