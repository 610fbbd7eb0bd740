"""Exit codes and standard streams: closed, full, without a reader, in other locales; and `python -m`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli.forks import Forks, Result, run_command
from tiny_model import save_checkpoint

from lightning_attention.cli import main
from lightning_attention.version import __version__

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and files of /dev")

FAULT = ["generate", "--checkpoint", "checkpoint", "--top-k", "-1"]
COMMANDS = {
    "help": ["--help"],
    "no command": [],
    "version": ["--version"],
    "train help": ["train", "--help"],
    "info": ["info"],
    "generate": ["generate", "--checkpoint", "checkpoint", "--prompt", "a", "--max-new-tokens", "2"],
}
each_command = pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root, forks = tmp_path_factory.mktemp("streams"), Forks()
    save_checkpoint(root / "checkpoint")
    (root / "scratch").mkdir()

    def call(arguments: list[str], **options: object) -> Result:
        return run_command(forks, arguments, root, root / "scratch", **options)

    yield call
    forks.close()


def line_of(result: Result) -> str:
    """Error line of a failed command."""
    assert result.code == 2
    assert result.err.startswith("lightning-attention: ")
    assert result.err.count("\n") == 1
    return result.err


@each_command
def test_a_command_exits_with_0_and_an_empty_standard_error(run, arguments):
    result = run(arguments)
    assert (result.code, result.err) == (0, "")
    assert result.out


def test_no_command_shows_the_help(run):
    result = run([])
    assert (result.code, result.err) == (0, "")
    assert result.out.strip() == run(["--help"]).out.strip()


def test_version_is_printed(run):
    assert run(["--version"]) == Result(0, f"{__version__}\n", "")


@each_command
def test_a_closed_standard_output_is_an_error(run, arguments):
    assert "standard output is closed" in line_of(run(arguments, stdout=None))


@each_command
def test_a_full_standard_output_is_an_error(run, arguments):
    assert "No space left on device: 'standard output'" in line_of(run(arguments, stdout="/dev/full"))


@pytest.mark.parametrize("stderr", [None, "/dev/full"], ids=["closed", "full"])
def test_an_unwritable_standard_error_keeps_the_exit_code(run, stderr):
    result = run(FAULT, stderr=stderr)
    assert (result.code, result.out, result.err) == (2, "", "")


def test_an_output_file_does_not_take_the_descriptor_of_a_closed_stream(run, tmp_path):
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "a", "max_new_tokens": 2}\n')
    command = ["generate", "--checkpoint", "checkpoint", "--prompts", str(prompts), "--output", str(answers)]
    assert run(command, stdin=None, stderr=None).code == 0
    assert [json.loads(line)["index"] for line in answers.read_text().splitlines()] == [0]


@each_command
def test_a_reader_that_left_is_code_1_without_a_message(run, arguments):
    reader, writer = os.pipe()
    try:
        os.close(reader)
        result = run(arguments, stdout=f"/proc/{os.getpid()}/fd/{writer}")
    finally:
        os.close(writer)
    assert (result.code, result.err) == (1, "")


@pytest.mark.parametrize("variable", ["TERM=dumb", "COLUMNS=1", "COLUMNS=0", "COLUMNS=many", "FORCE_COLOR=1"])
def test_a_terminal_does_not_change_an_error(run, variable):
    name, value = variable.split("=")
    environment = {name: value}
    assert line_of(run(FAULT, environment=environment)) == "lightning-attention: top_k must be at least 0, got -1\n"
    assert run(["--help"], environment=environment).code == 0


def test_output_is_utf8_in_every_locale(run):
    command = ["generate", "--checkpoint", "checkpoint", "--prompt", "ü", "--max-new-tokens", "1"]
    result = run(command, environment={"PYTHONIOENCODING": "ascii"})
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("ü")


def test_a_name_that_is_not_utf8_is_escaped(run, tmp_path):
    (tmp_path / "\udcff").touch()
    assert "\\udcff" in line_of(run(["generate", "--checkpoint", str(tmp_path / "\udcff"), "--prompt", "a"]))


@pytest.mark.parametrize("value", ["1", "0", ""])
def test_a_traceback_is_shown_on_request_before_the_error_line(run, value):
    result = run(FAULT, environment={"LIGHTNING_ATTENTION_TRACEBACK": value})
    lines = result.err.splitlines()
    assert result.code == 2
    assert lines[-1] == "lightning-attention: top_k must be at least 0, got -1"
    assert (lines[0] == "Traceback (most recent call last):") == (value == "1")
    assert (len(lines) > 1) == (value == "1")


def in_this_process(monkeypatch, capsys, failure: BaseException) -> tuple[object, str, str]:
    """Run a command that raises; return exit code, standard output and standard error."""

    def fails(*_, **__):
        raise failure

    monkeypatch.setattr("lightning_attention.cli.info.Console", fails)
    monkeypatch.setattr(sys, "argv", ["lightning-attention", "info"])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("wrong\nshape"),
        KeyError("name"),
        RecursionError("too deep"),
        OverflowError("too large"),
        AssertionError(),
        AttributeError("no such attribute"),
        EOFError("cut off"),
        StopIteration(),
        ZeroDivisionError("division by zero"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_bug_is_one_error_line(monkeypatch, capsys, failure):
    code, out, err = in_this_process(monkeypatch, capsys, failure)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"lightning-attention: unexpected {type(failure).__name__}")
    assert "LIGHTNING_ATTENTION_TRACEBACK=1" in err


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError("no memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=["python", "gpu", "cpu", "cublas", "system"],
)
def test_out_of_memory_is_one_error_line_without_a_traceback_hint(monkeypatch, capsys, failure):
    code, out, err = in_this_process(monkeypatch, capsys, failure)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("lightning-attention: out of memory")
    assert "TRACEBACK" not in err


@pytest.mark.parametrize(
    ("failure", "code"),
    [(KeyboardInterrupt(), 130), (SystemExit(130), 130), (SystemExit(143), 143), (SystemExit(1), 1)],
    ids=["Ctrl-C", "exit 130", "exit 143", "exit 1"],
)
def test_exit_codes_are_kept(monkeypatch, capsys, failure, code):
    assert in_this_process(monkeypatch, capsys, failure) == (code, "", "")


@pytest.mark.parametrize("module", ["lightning_attention", "lightning_attention.cli"])
def test_python_m_runs_the_command(module, tmp_path):
    command = [sys.executable, "-m", module]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run(
        [*command, "train", "--size", "ü"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert (run.returncode, run.stdout) == (2, b"")
    assert run.stderr.decode().startswith("lightning-attention: size must be one of")
    assert run.stderr.count(b"\n") == 1


@pytest.mark.slow
def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for arguments in (["train", "--config", "pipe"], ["train", "--data", "pipe"]):
        command = [sys.executable, "-m", "lightning_attention", *arguments]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
        assert run.returncode == 2
        assert run.stderr.startswith(b"lightning-attention: ")
        assert [path.name for path in Path(tmp_path).iterdir()] == ["pipe"]
