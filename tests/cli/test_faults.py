"""Errors of users are one line on standard error and code 2, and leave every file unchanged."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISDIR

import pytest
from cli import faults
from cli.forks import Forks, Result, run_command

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and files of /dev and /proc")

# Values that are tried with every option or folder are marked slow; `make test` runs the others.
COMMON = {"inf", "-inf", "1.5", "-" + faults.BEYOND_64_BITS, faults.BEYOND_64_BITS, *faults.NO_NUMBERS}
COMMON |= {f"{file}-{name}" for file in ("tokenizer", "tokenizer_config", "weights") for name in faults.BAD_JSON}
COMMON |= {*faults.UNWRITABLE[2:], "-x", "gpt2"}


class Workspace:
    """Folder with the files that the commands name, and a process whose forks run commands in it."""

    def __init__(self, root: Path):
        self.forks, self.scratch, self.folder = Forks(), root / "scratch", root / "folder"
        self.scratch.mkdir()
        self.renew()

    def renew(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        faults.files(self.folder)
        self.before = self.state()

    def run(self, *arguments: str, **options: object) -> Result:
        return run_command(self.forks, list(arguments), self.folder, self.scratch, **options)

    def state(self) -> dict[str, object]:
        """Mode, size and modification time of every path."""
        stats = {str(path.relative_to(self.folder)): path.lstat() for path in self.folder.rglob("*")}
        return {
            path: (stat.st_mode, None if S_ISDIR(stat.st_mode) else (stat.st_size, stat.st_mtime_ns))
            for path, stat in stats.items()
        }

    def changed(self) -> list[str]:
        """Return the paths that a command has created, changed or removed, and restore the folder."""
        after = self.state()
        changed = sorted(path for path in self.before.keys() | after.keys() if self.before.get(path) != after.get(path))
        if changed:
            self.renew()
        return changed


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Iterator[Workspace]:
    made = Workspace(tmp_path_factory.mktemp("faults"))
    yield made
    made.forks.close()


def readable(arguments: tuple[str, ...]) -> str:
    """Command with its last arguments, which are at fault."""
    command = [word for word in arguments[:2] if not word.startswith("-")]
    return " ".join([*command, *(word[:40] for word in arguments[len(command) :][-2:])])


def is_error_line(result: Result) -> bool:
    return result.err.startswith("lightning-attention: ") and result.err.count("\n") == 1


def marked(arguments: tuple[str, ...]):
    marks = [pytest.mark.slow] if arguments[-1] in COMMON else []
    return pytest.param(arguments, id=readable(arguments), marks=marks)


@pytest.mark.parametrize("arguments", [marked(arguments) for arguments in faults.faults()])
def test_a_fault_is_one_error_line_and_changes_no_file(workspace, arguments):
    result = workspace.run(*arguments)
    assert workspace.changed() == []
    assert (result.code, result.out) == (2, "")
    assert is_error_line(result), result.err
    assert "TRACEBACK" not in result.err, result.err


def test_out_of_memory_names_the_options_to_lower(workspace):
    result = workspace.run(*faults.LINES, "--prefix-slots", faults.HUGE)
    assert (result.code, result.out) == (2, "")
    assert is_error_line(result)
    assert result.err.startswith("lightning-attention: out of memory: lower ")
    assert "--prefix-slots" in result.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--steps", "3", "--steps", "4"], "--steps is given 2 times"),
        (["train", "--steps", faults.BEYOND_64_BITS], "--steps must be an integer of 64 bits"),
        (["train", "--warmup", "1e400"], "--warmup must be a finite number, got inf"),
        (["train", "--data", ""], "--data must not be empty"),
        (["train", "--config", "deep.json"], "deep.json"),
        (["train", "--config", "pipe"], "pipe"),
        (["train", "--config", "unknown-dtype.json"], "'foo'"),
        (["train", "--config", "attention-weights.json"], "output_attentions must be false"),
        (["generate", "--checkpoint", "config-deep"], "config-deep"),
        (["generate", "--checkpoint", "generation_config-binary"], "generation_config-binary"),
        (["generate", "--checkpoint", "model-another-model"], "llama"),
        (["bench", "op", "--length", "8"], "python -m benchmarks"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_fault_names_the_option_or_file(workspace, arguments, named):
    result = workspace.run(*arguments)
    assert result.code == 2
    assert is_error_line(result)
    assert named in result.err


def test_names_are_not_read_as_markup(workspace):
    name = "a[b]:dog:[red]"
    result = workspace.run(*faults.TRAIN[: faults.TRAIN.index("new")], name)
    assert {path.split("/")[0] for path in workspace.changed()} == {name}
    assert (result.code, result.err) == (0, "")
    assert f" {name}/" in result.out
