"""Faults during a run: checkpoints are kept, and the error says what to do."""

import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import needs_two_gpus
from rich.console import Console
from safetensors.torch import load_file, save_file
from training.runs import (
    COMMAND,
    MODEL,
    ON_CPU,
    TEXT,
    arguments,
    command,
    error_lines,
    linux_only,
    losses,
    options,
    quiet,
    start,
    torchrun,
    wait_for,
    wait_for_end,
    workers_after,
    write_inputs,
)

from lightning_attention.inference import load
from lightning_attention.models import LightningForCausalLM
from lightning_attention.models.checkpoint import checkpoints
from lightning_attention.training import Interrupted, TrainingOptions, processes, train
from lightning_attention.training.metrics import MetricsCallback, read_metrics
from lightning_attention.training.signals import stop_requests

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Losses and gradients that are not finite


def test_a_nonfinite_loss_stops_the_run_before_the_step(files):
    result = command(*arguments(files, steps=200, save_every=1, log_every=1, learning_rate=1e10))
    assert result.returncode == 2
    (line,) = error_lines(result.stderr)
    found = re.search(r"step (\d+) was not made: its loss is", line)
    assert found
    step = int(found[1])
    kept = checkpoints(files / "run")
    assert f"the last good checkpoint is {kept[-1]}" in line
    assert [path.name for path in kept] == [f"checkpoint-{step - 2}", f"checkpoint-{step - 1}"]
    assert all(x.isfinite().all() for x in load_file(kept[-1] / "model.safetensors").values())
    for text in (files / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert losses(files / "run").keys() == set(range(1, step))


def test_a_nonfinite_first_step_leaves_nothing_behind(files):
    (files / "model.json").write_text(json.dumps(MODEL | {"initializer_range": 1e38}))
    before = contents(files)
    with pytest.raises(FloatingPointError, match=r"step 1 was not made.*no checkpoint was saved"):
        train(options(files, steps=3), console=quiet())
    assert contents(files) == before


def test_nonfinite_weights_are_not_saved(files, monkeypatch):
    class Spoiling(MetricsCallback):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 4:
                kwargs["model"].lm_head.weight.data[0, 0] = math.inf

    monkeypatch.setattr(sys.modules[train.__module__], "MetricsCallback", Spoiling)
    with pytest.raises(FloatingPointError, match=r"weights after step 4 are not finite.*checkpoint is .*checkpoint-2;"):
        train(options(files, steps=4, save_every=2), console=quiet())
    assert [path.name for path in checkpoints(files / "run")] == ["checkpoint-2"]


def test_gradients_are_clipped_to_norm_one(files):
    """After the first step Adam's mean of gradients is a tenth of the clipped gradient."""
    train(options(files, steps=1, save_every=1, log_every=1), console=quiet())
    (record,) = [record for record in read_metrics(files / "run" / "metrics.jsonl") if "loss" in record]
    assert record["grad_norm"] > 1.2
    state = torch.load(files / "run" / "checkpoint-1" / "optimizer.pt", weights_only=True)["state"]
    applied = torch.cat([entry["exp_avg"].flatten() for entry in state.values()]).norm() / (1 - 0.9)
    assert applied.item() == pytest.approx(1, rel=1e-3)


# Options and folders


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": math.inf}, "learning_rate must be finite"),
        ({"learning_rate": math.nan}, "learning_rate must be finite"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"weight_decay": math.nan}, "weight_decay must be finite"),
        ({"warmup": math.nan}, "warmup must be finite"),
        ({"held_out": -0.1}, "held_out must be at least 0 and below 1"),
        ({"seed": -1}, "seed must be at least 0 and below 2"),
        ({"seed": 1 << 32}, "seed must be at least 0 and below 2"),
        ({"steps": 10**30}, "steps must be finite and within"),
        ({"learning_rate": 10**400}, "learning_rate must be finite and within"),
        ({"timeout": 0.0}, "timeout must be above 0"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"batch_size": "8"}, "batch_size must be a whole number, got '8'"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"compile": 1}, "compile must be true or false, got 1"),
        ({"dtype": "half"}, "dtype must be one of 'auto', 'float32', 'bfloat16', got 'half'"),
        ({"size": None}, "size must be a string, got None"),
        ({"segment_length": 0}, "segment_length must be at least 1"),
        ({"sequence_length": 0}, "sequence_length must be at least 2, got 0"),
        ({"sequence_parallel_strategy": "star"}, "sequence_parallel_strategy must be one of 'all-gather', 'ring'"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"warmup": 2.0}, "warmup must be between 0 and 1"),
        ({"held_out": 1.5}, "held_out must be at least 0 and below 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_out_of_range_are_refused(files, changes, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        options(files, **changes)


LATE_FAULTS = {
    "too little data": ({"sequence_length": 100_000}, "fewer than one sequence"),
    "out of memory": ({}, "can't allocate memory"),
    "a folder as tokenizer": ({"tokenizer": "."}, "there is no file"),
    "no such configuration": ({"config": Path("nowhere.json")}, "is not a model configuration"),
}


@pytest.mark.parametrize("where", ["new folder", "new folders", "folder with a file"])
@pytest.mark.parametrize(("changes", "message"), LATE_FAULTS.values(), ids=LATE_FAULTS)
def test_a_run_that_fails_before_its_first_step_leaves_nothing_behind(files, monkeypatch, changes, message, where):
    name = "far/away/run" if where == "new folders" else "run"
    if where == "folder with a file":
        (files / "run").mkdir()
        (files / "run" / "mine.txt").write_text("mine")
    if "memory" in message:

        def fail(*args, **kwargs):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(LightningForCausalLM, "forward", fail)
    before = contents(files), sorted(files.rglob("*"))
    with pytest.raises((ValueError, RuntimeError), match=message):
        train(options(files, name, **changes), console=quiet())
    assert (contents(files), sorted(files.rglob("*"))) == before
    monkeypatch.undo()
    train(options(files, name, steps=1), console=quiet())


@pytest.mark.parametrize("name", ["checkpoint-7/config.json", "config.json", "metrics.jsonl", "run.json"])
def test_a_new_run_refuses_a_folder_with_a_run_or_model(files, name):
    file = files / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    before = contents(files)
    with pytest.raises(ValueError, match=r"holds (a run already|config\.json|metrics\.jsonl)"):
        train(options(files), console=quiet())
    assert contents(files) == before


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(files):
    process = start(*arguments(files, steps=100_000, save_every=5, eval_every=100_000))
    wait_for(files / "run" / "checkpoint-5", process)
    for second in (["train", "--resume", f"--output={files / 'run'}"], arguments(files)):
        result = command(*second)
        assert result.returncode == 2
        (line,) = error_lines(result.stderr)
        assert f"another process trains in {files / 'run'}" in line
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert not list((files / "run").glob("*.damaged"))
    load(files / "run")


# Damage


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def poison(path: Path) -> None:
    """Write a NaN weight into a checkpoint without checksums, as older versions saved it."""
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] = math.nan
    save_file(weights, path, metadata={"format": "pt"})
    (path.parent / "checksums.sha256").unlink()


def without_checksums(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(path: Path) -> None:
        damage(path)
        (path.parent / "checksums.sha256").unlink()

    return both


DAMAGE = {
    "a flipped byte of the weights": (flip_a_byte, "model.safetensors"),
    "a flipped byte of the optimizer": (flip_a_byte, "optimizer.pt"),
    "weights cut off": (truncate, "model.safetensors"),
    "weights cut off, no checksums": (without_checksums(truncate), "model.safetensors"),
    "optimizer cut off, no checksums": (without_checksums(truncate), "optimizer.pt"),
    "no optimizer": (Path.unlink, "optimizer.pt"),
    "no weights": (Path.unlink, "model.safetensors"),
    "no configuration": (Path.unlink, "config.json"),
    "state cut off, no checksums": (without_checksums(truncate), "trainer_state.json"),
    "weights that are not finite": (poison, "model.safetensors"),
    "no random numbers": (Path.unlink, "rng_state.pth"),
}


@pytest.fixture(scope="module")
def a_run(tmp_path_factory) -> Path:
    """Run with checkpoints 4 and 8."""
    folder = tmp_path_factory.mktemp("damage")
    write_inputs(folder)
    train(options(folder, steps=8, save_every=4, log_every=1), console=quiet())
    return folder


@pytest.fixture
def copied(a_run, tmp_path) -> Path:
    """Copy of the folder of the run, for a test to damage."""
    shutil.copytree(a_run, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "run" / "run.json", *tmp_path.glob("run/checkpoint-*/run.json")):
        file.write_text(file.read_text().replace(str(a_run), str(tmp_path)))
    for folder in tmp_path.glob("run/checkpoint-*"):
        lines = (folder / "checksums.sha256").read_text().splitlines()
        kept = [line for line in lines if not line.endswith("run.json")]
        (folder / "checksums.sha256").write_text("\n".join(kept) + "\n")
    return tmp_path


@pytest.mark.parametrize(("damage", "name"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_reported_and_its_predecessor_taken(a_run, copied, damage, name):
    run = copied / "run"
    damage(run / "checkpoint-8" / name)
    damaged = contents(run / "checkpoint-8")
    with Console(record=True, width=1000, file=io.StringIO()) as console:
        train(TrainingOptions.load(run), resume=True, console=console)
    text = console.export_text()
    assert re.search(r"checkpoint-8 is damaged .*: it is now checkpoint-8.damaged, and checkpoint-4 is taken", text)
    assert contents(run / "checkpoint-8.damaged") == damaged
    weights, expected = (load_file(folder / "run/checkpoint-8/model.safetensors") for folder in (copied, a_run))
    for key, weight in expected.items():
        torch.testing.assert_close(weights[key], weight, rtol=1e-3, atol=1e-4)
    assert losses(run) == pytest.approx(losses(a_run / "run"), rel=1e-4)


def test_a_run_without_an_intact_checkpoint_is_not_restarted(copied):
    for step in (4, 8):
        flip_a_byte(copied / "run" / f"checkpoint-{step}" / "model.safetensors")
    before = contents(copied)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact: checkpoint-8: model.safetensors is not what"):
        train(TrainingOptions.load(copied / "run"), resume=True, console=quiet())
    assert contents(copied) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sequence_length", 32, "sequence_length was 64 in this run and cannot become 32"),
        ("warmup", 0.1, "warmup was 0.05 in this run and cannot become 0.1"),
        ("steps", 7, "checkpoint-8 is of a later step than steps: give at least 8, got 7"),
        ("seed", 1, "seed was 0 in this run and cannot become 1"),
        ("weight_decay", 0.0, "weight_decay was 0.1 in this run"),
        ("data", ["elsewhere.txt"], "data was"),
        ("steps", -1, "steps must be at least 1, got -1"),
        ("steps", "9", "steps must be a whole number, got '9'"),
        ("learning_rate", math.nan, "learning_rate must be finite"),
        ("colour", "red", "options this version does not know: colour"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_changed_option_that_cannot_change_is_refused(copied, name, value, message):
    file = copied / "run" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    before = contents(copied)
    with pytest.raises(ValueError, match=re.escape(message)):
        train(TrainingOptions.load(copied / "run"), resume=True, console=quiet())
    assert contents(copied) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\udc80"], ids=repr)
def test_a_damaged_run_json_is_named(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        TrainingOptions.load(tmp_path)


@pytest.mark.parametrize(
    ("edits", "lines"),
    [
        ({"steps": 12, "save_every": 3}, ["steps 8 is now 12", "save_every 4 is now 3"]),
        ({"steps": 12, "batch_size": 1}, ["batch_size 2 is now 1", "accumulate 1 is now 2"]),
    ],
    ids=["more steps", "smaller batches"],
)
def test_a_changed_option_is_reported(copied, edits, lines):
    run = copied / "run"
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | edits))
    with Console(record=True, width=1000, file=io.StringIO()) as console:
        train(TrainingOptions.load(run), resume=True, console=console)
    text = console.export_text()
    assert all(line in text for line in lines)
    assert checkpoints(run)[-1].name == "checkpoint-12"
    if "save_every" in edits:
        assert [path.name for path in checkpoints(run)] == ["checkpoint-9", "checkpoint-12"]
    tokens = [record["tokens"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
    assert tokens == [128 * (i + 1) for i in range(12)]


@pytest.mark.slow
def test_a_full_disk_at_resume_leaves_the_run_unchanged(copied):
    """Files are limited to 64 bytes."""
    run = copied / "run"
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"steps": 12}))
    before = contents(run)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # noqa: E731
    result = command("train", "--resume", f"--output={run}", preexec_fn=limit)
    assert result.returncode == 2
    assert len(error_lines(result.stderr)) == 1
    assert contents(run) == before
    assert command("train", "--resume", f"--output={run}").returncode == 0
    assert checkpoints(run)[-1].name == "checkpoint-12"


# Signals


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="SIGINT"),
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, id="SIGHUP", marks=pytest.mark.slow),
    ],
)
def test_a_signalled_run_saves_a_checkpoint_and_resumes_as_if_undisturbed(files, number):
    changes: dict[str, Any] = {"steps": 60, "save_every": 20, "log_every": 10}
    train(options(files, "undisturbed", **changes), console=quiet())
    process = start(*arguments(files, **changes))
    wait_for(files / "run" / "checkpoint-20", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    step = int(checkpoints(files / "run")[-1].name.removeprefix("checkpoint-"))
    resume = f"lightning-attention train --resume --output {files / 'run'}"
    message = f"lightning-attention: stopped by {number.name} after step {step}, which is saved; to resume: {resume}"
    assert error_lines(errors) == [message]
    assert 20 <= step < 60
    train(TrainingOptions.load(files / "run"), resume=True, console=quiet())
    undisturbed, stopped = losses(files / "undisturbed"), losses(files / "run")
    if step % 10:  # one log interval became two
        end = -(-step // 10) * 10
        first, second = stopped.pop(step), stopped.pop(end)
        stopped[end] = (first * (step % 10) + second * (end - step)) / 10
    assert stopped == pytest.approx(undisturbed, rel=1e-4)
    weights, expected = (load(files / name)[0].state_dict() for name in ("run", "undisturbed"))
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)


def test_a_run_goes_on_when_the_reader_of_its_output_leaves(files):
    process = start(*arguments(files, log_every=1, steps=30))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0, process.stderr.read()
    assert losses(files / "run").keys() == set(range(1, 31))
    process.stderr.close()


def test_a_signal_during_tokenization_leaves_nothing_behind(files):
    (files / "data.txt").write_text(TEXT * 2000)
    before = sorted(files.rglob("*"))
    process = start(*arguments(files))
    wait_for(files / "run" / "corpus", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert error_lines(errors) == ["lightning-attention: stopped by SIGTERM outside of the training loop"]
    assert sorted(files.rglob("*")) == before


@pytest.mark.slow
def test_a_second_signal_ends_the_process_within_a_step(files):
    process = start(*arguments(files, steps=9, sequence_length=1024, batch_size=16, segment_length=1))
    assert process.stdout is not None
    assert "parameters on" in process.stdout.readline()
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == 130
    assert error_lines(errors) == ["lightning-attention: ended by a second SIGINT, without a checkpoint of this step"]


def test_a_signal_that_another_process_has_answered_is_not_a_second_one():
    """torchrun signals its processes in turn: a process may learn of a signal from another before it gets its own."""
    with stop_requests() as request, request.deferred():
        request.answered = signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not request.signal:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert request.signal == signal.SIGTERM


def test_a_run_in_another_thread_does_not_handle_signals(files):
    results = []
    handler = signal.getsignal(signal.SIGTERM)
    thread = Thread(target=lambda: results.append(train(options(files, steps=1), console=quiet())))
    thread.start()
    thread.join()
    assert [path.name for path in results] == ["checkpoint-1"]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_interrupted_is_a_keyboard_interrupt():
    assert issubclass(Interrupted, KeyboardInterrupt)


# Several processes


def ranks(*commands: list[str], port: int) -> list[subprocess.Popen[str]]:
    """Start the processes of one group, each with its own command."""
    world = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [*COMMAND, *command],
            env=ON_CPU | world | {"RANK": str(i), "LOCAL_RANK": str(i), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, command in enumerate(commands)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 32}, "sequence_length must be the same on every process, got 64, 32"),
        ({"steps": 21}, "steps must be the same on every process, got 20, 21"),
        ({"config": Path("nowhere.json")}, "config must be the same on every process"),
    ],
    ids=["sequence length", "steps", "config"],
)
def test_processes_with_different_options_write_nothing_and_one_error_line(files, change, message):
    before = contents(files)
    processes = ranks(arguments(files), arguments(files, **change), port=29_555)
    ended = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    (line,) = error_lines(ended[0]) + error_lines(ended[1])
    assert message in line
    assert contents(files) == before


@pytest.mark.slow
def test_a_file_that_one_process_lacks_is_one_error_line(files):
    """Two processes run one command, in folders with different files."""
    for folder in ("first", "second"):
        (files / folder).mkdir()
        write_inputs(files / folder)
    (files / "second" / "model.json").unlink()
    given = [text.replace(f"{files}/", "") for text in arguments(files)]
    world = ON_CPU | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29556", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*COMMAND, *given],
            cwd=files / folder,
            env=world | {"RANK": str(i), "LOCAL_RANK": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, folder in enumerate(("first", "second"))
    ]
    ended = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    (line,) = error_lines(ended[0]) + error_lines(ended[1])
    assert "process 1: model.json is not a model configuration" in line
    assert not (files / "first" / "run").exists()


def assert_a_frozen_process_ends_the_other(process: subprocess.Popen, files: Path, *, within: float) -> None:
    waiting, stopped = workers_after(files / "run" / "checkpoint-20", process)
    os.kill(stopped, signal.SIGSTOP)
    wait_for_end(waiting, within)
    os.kill(stopped, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert re.search("^lightning-attention: no answer within --timeout", output, re.MULTILINE), output
    assert "Traceback" not in output.split("torch/distributed/elastic")[0]


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("sharing", [{}, {"sequence_parallel": 2}], ids=["sequences", "tokens"])
def test_a_frozen_process_ends_the_others_after_the_timeout(files, sharing):
    process = torchrun(2, *arguments(files, steps=10_000, save_every=20, timeout=5.0, **sharing))
    assert_a_frozen_process_ends_the_other(process, files, within=30)


def test_a_collective_of_nccl_that_times_out_ends_the_process(monkeypatch, capsys):
    """The host does not wait for collectives of NCCL, so none raises."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    answers = iter(["SUCCESS", "SUCCESS", "TIMEOUT"])
    backend = SimpleNamespace(get_error=lambda: SimpleNamespace(name=next(answers)))
    processes._end_after_timeout(backend, seconds=0)
    assert ended == [2]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning-attention: no answer within --timeout: another process of the run was lost")


@linux_only
@pytest.mark.gpu
@pytest.mark.nccl
@needs_two_gpus
@pytest.mark.parametrize("sharing", [{}, {"sequence_parallel": 2}], ids=["sequences", "tokens"])
def test_a_frozen_process_on_a_gpu_ends_the_others_after_the_timeout(files, sharing):
    changes: dict[str, Any] = {"steps": 100_000, "save_every": 20, "timeout": 20.0}
    process = torchrun(2, *arguments(files, **changes, **sharing), where=os.environ)
    assert_a_frozen_process_ends_the_other(process, files, within=60)


@pytest.mark.gpu
def test_a_batch_too_large_for_the_gpu_says_what_to_lower(files):
    sizes = ["--size=45M", "--sequence-length=1024", "--batch-size=4096", "--steps=3"]
    given = ["train", "--data", str(files / "data.txt"), "--output", str(files / "run"), *sizes]
    (files / "data.txt").write_text(TEXT * 20)
    result = subprocess.run([*COMMAND, *given], capture_output=True, text=True, timeout=300)
    assert result.returncode == 2, result.stderr
    (line,) = error_lines(result.stderr)
    assert line.startswith("lightning-attention: out of memory: lower --batch-size, ")
    assert not (files / "run").exists()


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_to_torchrun_saves_a_checkpoint(files, number):
    process = torchrun(2, *arguments(files, steps=10_000, save_every=20))
    workers = workers_after(files / "run" / "checkpoint-20", process)
    process.send_signal(number)
    if number == signal.SIGINT:  # a terminal sends it to all of them
        for worker in workers:
            os.kill(worker, number)
    output, _ = process.communicate(timeout=60)
    step = int(checkpoints(files / "run")[-1].name.removeprefix("checkpoint-"))
    assert len(re.findall(rf"stopped by {number.name} after step {step}, which is saved; to resume:", output)) == 1
    assert "was lost" not in output
    load(files / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)], ids=["two, then one", "one, then two"])
def test_a_step_keeps_its_sequences_on_another_number_of_processes(files, before, after):
    changes: dict[str, Any] = {"steps": 20, "save_every": 10, "log_every": 1, "batch_size": 4 // before}
    train(options(files, "undisturbed", **changes | {"batch_size": 4}), console=quiet())
    process = torchrun(before, *arguments(files, **changes))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    shutil.rmtree(files / "run" / "checkpoint-20")
    process = torchrun(after, "train", "--resume", f"--output={files / 'run'}")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert ("accumulate 1 is now 2" if after < before else "batch_size 4 is now 2") in output
    assert losses(files / "run") == pytest.approx(losses(files / "undisturbed"), rel=1e-3)
    tokens = [record["tokens"] for record in read_metrics(files / "run" / "metrics.jsonl") if "loss" in record]
    assert tokens == [256 * (i + 1) for i in range(20)]


def start_or_resume(files: Path, **changes: Any) -> list[str]:
    has_run = (files / "run" / "run.json").exists()
    return ["train", "--resume", f"--output={files / 'run'}"] if has_run else arguments(files, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_at_random_moments_ends_as_if_undisturbed(files, seed):
    changes: dict[str, Any] = {"steps": 40, "save_every": 4, "log_every": 4, "eval_every": 20}
    assert command(*arguments(files, "undisturbed", **changes)).returncode == 0
    moments = torch.rand(6, generator=torch.Generator().manual_seed(seed)) * 12
    for moment in moments.tolist():
        process = start(*start_or_resume(files, **changes))
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
    result = command(*start_or_resume(files, **changes))
    assert result.returncode == 0, result.stderr
    assert losses(files / "run") == losses(files / "undisturbed")
    weights, expected = (
        load_file(checkpoints(files / name)[-1] / "model.safetensors") for name in ("run", "undisturbed")
    )
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
