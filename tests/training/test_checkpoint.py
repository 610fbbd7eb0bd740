"""Checkpoints are written while training goes on, and hold what a run had at their step."""

import sys
import time
from threading import Event

import pytest
from training.runs import losses, options, quiet

from lightning_attention.models.checkpoint import checkpoints
from lightning_attention.training import checkpoint, train
from lightning_attention.training.folder import write_checksums
from lightning_attention.training.metrics import MetricsCallback

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
LATE = 30.0  # seconds


@pytest.fixture
def after_step(monkeypatch):
    """Function that has a run call another one with the number of every step it has made."""

    def set_call(call):
        class Calling(MetricsCallback):
            def on_step_end(self, args, state, control, **kwargs):
                super().on_step_end(args, state, control, **kwargs)
                call(state.global_step)

        monkeypatch.setattr(sys.modules[train.__module__], "MetricsCallback", Calling)

    return set_call


def test_later_steps_do_not_wait_and_do_not_change_what_is_saved(files, monkeypatch, after_step):
    """The first checkpoint is written after five more steps, with the bytes of one written at once."""
    train(options(files, "at once", steps=10, save_every=5), console=quiet())
    five_later = Event()
    after_step(lambda step: five_later.set() if step == 10 else None)
    write = checkpoint.CheckpointingTrainer._write

    def write_late(self, *args):
        assert five_later.wait(LATE)
        write(self, *args)

    monkeypatch.setattr(checkpoint.CheckpointingTrainer, "_write", write_late)
    train(options(files, steps=10, save_every=5), console=quiet())
    saved = checkpoints(files / "run")
    assert [folder.name for folder in saved] == ["checkpoint-5", "checkpoint-10"]
    for folder in saved:
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            expected = (files / "at once" / folder.name / name).read_bytes()
            assert (folder / name).read_bytes() == expected, name


def test_an_error_while_writing_ends_the_run_before_the_next_save(files, monkeypatch, after_step):
    failed = Event()

    def fail(folder):
        if folder.name == "checkpoint-20":
            failed.set()
            raise OSError(28, "No space left on device")
        write_checksums(folder)

    def slow(step):
        if step > 20:
            assert failed.wait(LATE)
            time.sleep(0.1)

    monkeypatch.setattr(checkpoint, "write_checksums", fail)
    after_step(slow)
    with pytest.raises(OSError, match=r"could not save .*checkpoint-20: .*No space left on device"):
        train(options(files, steps=100, save_every=10, log_every=1), console=quiet())
    assert [path.name for path in checkpoints(files / "run")] == ["checkpoint-10"]
    assert 21 <= max(losses(files / "run")) < 30
    assert not (files / "run" / "unfinished").exists()


def test_an_error_of_the_last_write_is_that_of_the_run(files, monkeypatch):
    def fail(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_checksums", fail)
    with pytest.raises(OSError, match=r"could not save .*checkpoint-2: .*No space left on device"):
        train(options(files, steps=2, save_every=5), console=quiet())
    assert not checkpoints(files / "run")
