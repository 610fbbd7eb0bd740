"""A wrong invocation is one line on standard error and exit code 2, and changes no file."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISDIR

import pytest
from cli.forks import Forks, Result, run_command

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and files of /dev and /proc")

HUGE, BEYOND_64_BITS = str(10**15), "1" + 30 * "0"
OP = ["op", "--length", "32", "--heads", "1", "--head-dim", "4", "--seconds", "0.001"]
KERNEL = ["decode", "--only", "kernel", "--seconds", "0.001"]
TRAIN = ["train", "--length", "32", "--segment-length", "16"]
SPEED = ["speed", "--length", "32", "--tokens", "64", "--steps", "1"]
SCALING = ["scaling"]
INTEGERS = (
    *((OP, name, ("0", "-1", HUGE)) for name in ("--length", "--batch-size", "--heads", "--head-dim")),
    (OP, "--softmax-up-to", ("-1",)),
    *((["decode"], name, ("0", "-1", HUGE)) for name in ("--batch-size", "--max-requests")),
    (["decode"], "--length", ("0", "-1")),
    (TRAIN, "--length", ("0", "-1", HUGE)),
    (TRAIN, "--segment-length", ("0", "-1")),
    *((SPEED, name, ("0", "-1", HUGE)) for name in ("--length", "--tokens")),
    (SPEED, "--steps", ("0", "-1")),
    *((SCALING, name, ("0", "-1")) for name in ("--tokens", "--batch-size", "--blocks", "--node-size")),
    (SCALING, "--gpus", ("0", "-1", HUGE)),
)
FLOATS = (
    *((command, "--seconds", ("-1",)) for command in (OP, KERNEL)),
    *((SCALING, name, ("0", "-1", "1e-320", "1e308")) for name in ("--network-gigabits", "--speed")),
)
# Tried with every option, by the slow job only: typer and the class of all commands refuse them.
NOT_FINITE = ("nan", "inf", "-inf", "1e400")
NOT_A_NUMBER = ("", "many", "--steps", "²")
NOT_AN_INTEGER = ("1.5", BEYOND_64_BITS, "-" + BEYOND_64_BITS)
BAD_RESULTS = {
    "empty": b"",
    "binary": bytes(range(256)) * 4,
    "list": b"[1]",
    "null": b"null",
    "cut": b'{"machine": 1',
    "deep": 60_000 * b"[" + 60_000 * b"]",
    "no-runs": b'{"machine": {}}',
}
UNWRITABLE = ("", "text.txt", "text.txt/new", "/proc/new", "/dev/full/new", "/dev/null", 300 * "a", "loop/new", "pipe")


def with_option(command: list[str], option: str, value: str) -> list[str]:
    """The command with another value of an option."""
    if option in command:
        at = command.index(option)
        command = command[:at] + command[at + 2 :]
    return [*command, option, value]


def faults() -> Iterator[tuple[list[str], bool]]:
    """Arguments, and whether only the slow job tries them."""
    for command, option, values in (*INTEGERS, *FLOATS):
        yield from ((with_option(command, option, value), False) for value in values)
        others = NOT_FINITE + NOT_A_NUMBER + (() if (command, option, values) in FLOATS else NOT_AN_INTEGER)
        yield from ((with_option(command, option, value), True) for value in others)
    for command in (OP, KERNEL, TRAIN):
        folders = (*UNWRITABLE, *BAD_RESULTS)
        yield from ((with_option(command, "--output", folder), command is not OP) for folder in folders)
        yield from ((with_option(command, "--dtype", name), False) for name in ("", "int8", "float64", "Float32"))
        yield from ((with_option(command, "--device", name), False) for name in ("", "tpu", "cuda:9", "meta", "CPU"))
        yield [*command, *command[-2:]], False  # an option given twice
    for command in (OP, KERNEL):
        yield from ((with_option(command, "--only", name), False) for name in ("", "nothing"))
    for command in (["decode"], TRAIN, SCALING):
        yield from ((with_option(command, "--size", name), False) for name in ("", "huge", "DEMO", "1b"))
    for command in (OP, KERNEL, TRAIN, SCALING):
        yield from (([*command, word], False) for word in ("--wings", "extra", "-x", "--no-such=3"))
    yield from (([word], False) for word in ("fly", "--wings", "", "-"))
    yield [*OP, "--only", "table"], False
    yield [*KERNEL, "--length", "64"], False
    yield [*KERNEL, "--size", "demo"], False
    yield ["decode", "--only", "model", "--max-requests", "3"], False
    yield ["decode", "--only", "engine", "--batch-size", "3"], False
    for option in ("--tokens", "--gpus", "--size", "--speed", "--blocks"):
        yield ["scaling", "--check", option, "1B" if option == "--size" else "8"], False


class Folder:
    """A folder with files that invocations name, and a process whose forks run commands in it."""

    def __init__(self, root: Path):
        self.path, self.scratch, self.forks = root / "folder", root / "scratch", Forks("python -m benchmarks")
        self.path.mkdir()
        self.scratch.mkdir()
        (self.path / "text.txt").write_text("text")
        (self.path / "loop").symlink_to("loop")
        os.mkfifo(self.path / "pipe")
        for name, content in BAD_RESULTS.items():
            (self.path / name).mkdir()
            for benchmark in ("op", "decode", "train"):
                (self.path / name / f"{benchmark}.json").write_bytes(content)
        self.before = self.state()

    def run(self, arguments: list[str], **options: object) -> Result:
        return run_command(self.forks, arguments, self.path, self.scratch, **options)

    def state(self) -> dict[str, tuple[int, ...]]:
        """Every path, with its kind, size and time of change."""
        stats = {str(path.relative_to(self.path)): path.lstat() for path in self.path.rglob("*")}
        return {
            path: (stat.st_mode,) if S_ISDIR(stat.st_mode) else (stat.st_mode, stat.st_size, stat.st_mtime_ns)
            for path, stat in stats.items()
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Folder]:
    folder = Folder(tmp_path_factory.mktemp("faults"))
    yield folder
    folder.forks.close()


def message(result: Result) -> str:
    """The one line of an error."""
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("python -m benchmarks: ")
    assert result.err.count("\n") == 1
    assert "TRACEBACK" not in result.err
    return result.err


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(arguments, id=" ".join([arguments[0], *arguments[-2:]])[:60], marks=[pytest.mark.slow] * is_slow)
        for arguments, is_slow in faults()
    ],
)
def test_a_fault_is_one_line_and_changes_no_file(folder, arguments):
    message(folder.run(arguments))
    assert folder.state() == folder.before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["op", "--length", HUGE], "out of memory: lower --batch-size, --length, --heads, --head-dim"),
        (["decode", "--only", "engine", "--max-requests", HUGE], "out of memory: lower --batch-size, --max-requests"),
        (["train", "--length", HUGE], "out of memory: lower --segment-length, --length, --size"),
        (["op", "--seconds", "nan"], "--seconds must be a finite number, got nan"),
        (["op", "--output", "text.txt"], "text.txt"),
        (["op", "--output", "deep"], "deep/op.json"),
        (["op", "--heads", "0"], "--heads must be at least 1, got 0"),
        (["op", "--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["op", "--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["op", "--only", "nothing"], "--only must be table, sweep or invariant, got 'nothing'"),
        (["op", "--only", "table", "--length", "64"], "--only table has sizes of its own"),
        (["op", "--seconds", "soon"], "Invalid value for '--seconds'"),
        (["decode", "--only", "nothing"], "--only must be kernel, model or engine, got 'nothing'"),
        (
            ["decode", "--only", "engine", "--length", "64"],
            "--only engine does not go with --length, which is for model",
        ),
        (["decode", "--only", "kernel", "--size", "1B"], "with --size, which is for model and engine"),
        (["decode", "--size", "2B"], "--size must be one of demo, 45M"),
        (["train", "--length", "1"], "--length must be at least 2, got 1"),
        (["train", "--segment-length", "0"], "--segment-length must be at least 1, got 0"),
        (["scaling", "--gpus", HUGE], "--gpus must be at most 100000"),
        (["scaling", "--speed", "0"], "--speed must be between"),
        (["scaling", "--check", "--size", "1B"], "leave out --size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_fault_names_the_option_or_file(folder, arguments, words):
    assert words in message(folder.run(arguments))


@pytest.mark.parametrize("command", ["step", "segments", "counters"])
def test_a_benchmark_for_hopper_needs_such_a_gpu(folder, command):
    result = folder.run([command], environment={"CUDA_VISIBLE_DEVICES": ""})
    assert "needs a GPU of compute capability 9.0" in message(result)


@pytest.mark.parametrize("name", ["op.json", "op.png"])
def test_a_full_disk_names_the_file_and_keeps_what_was_there(folder, name):
    limit = 100 if name == "op.json" else 10_000  # enough for the results, and too little for the plot
    result = folder.run([*OP, "--output", "new"], max_file_bytes=limit, stdout="/dev/null")
    left = sorted(folder.state().keys() - folder.before.keys())
    shutil.rmtree(folder.path / "new", ignore_errors=True)
    assert f"new/{name}" in message(result)
    assert left == ([] if name == "op.json" else ["new", "new/op.json"])


def test_a_name_that_looks_like_markup_is_shown_as_it_is(folder, tmp_path):
    result = folder.run([*OP, "--output", str(tmp_path / "a[b]:dog:[red]")])
    assert (result.code, result.err) == (0, "")
    assert "a[b]:dog:[red]/op.json" in result.out


def test_no_command_is_help(folder):
    result = folder.run([])
    assert (result.code, result.err) == (0, "")
    assert result.out.strip() == folder.run(["--help"]).out.strip()
