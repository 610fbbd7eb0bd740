"""What a run says: on the console, and with the time in `train.log`."""

import io
import logging
import os
import re
import select
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from training.runs import COMMAND, ON_CPU, arguments, command, linux_only, options, quiet, torchrun, wait_for

from lightning_attention.training import train
from lightning_attention.training.run_log import RunLog

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TIMED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d  (.*)")


def said(run: Path) -> list[str]:
    """Lines of a log without their times."""
    found = [TIMED.fullmatch(line) for line in (run / "train.log").read_text(encoding="utf-8").splitlines()]
    assert all(found)
    return [line[1] for line in found if line]


def printed(console: Console) -> list[str]:
    return console.export_text().splitlines()


def recorder() -> Console:
    return Console(record=True, width=20, file=io.StringIO())


def test_the_log_has_the_lines_of_the_console_over_resumes(files):
    consoles = recorder(), recorder()
    train(options(files, "läuft [red]", steps=10), console=consoles[0])
    train(options(files, "läuft [red]", steps=20), resume=True, console=consoles[1])
    lines = said(files / "läuft [red]")
    assert lines == [*printed(consoles[0]), *printed(consoles[1])]
    assert sum(line.startswith("resuming from") for line in lines) == 1
    assert sum(line.startswith("step ") and "tokens/s" in line for line in lines) == 4


def test_the_start_says_what_is_trained_and_how_long(files):
    console = recorder()
    train(options(files, steps=20), console=console)
    text = "\n".join(printed(console))
    assert "20 steps: 2,560 tokens, " in text
    assert re.search(r"^model: 17\.8K parameters, 6\.22K of them embeddings of 259 tokens$", text, re.M)
    assert re.search(r"^estimate: 0:00:0\d in all, 0:00:0\d left, at [\d.e-]+ s a step and [\d,]+ tokens/s", text, re.M)
    assert len(re.findall(r"^step +\d+/20  loss .* tokens/s  ETA 0:00:0\d$", text, re.M)) >= 1


def test_warnings_are_in_the_log_and_are_shown(tmp_path):
    log = RunLog(quiet())
    with warnings.catch_warnings(record=True) as shown, log.kept_in(tmp_path / "train.log"):
        warnings.simplefilter("always")
        warnings.warn("of\nPython", UserWarning, stacklevel=1)
        logging.getLogger("transformers.trainer").warning("of transformers")
        logging.getLogger("somebody").error("of %s", "somebody")
        logging.getLogger("somebody").info("not a warning")
    logging.getLogger("somebody").warning("after the run")
    assert said(tmp_path) == ["warning: UserWarning: of Python", "warning: of transformers", "warning: of somebody"]
    assert [str(warning.message) for warning in shown] == ["of\nPython"]


def test_warnings_of_loggers_without_a_handler_stay_on_standard_error(tmp_path):
    program = (
        "import logging, pathlib, rich.console, lightning_attention.training.run_log as run_log\n"
        "with run_log.RunLog(rich.console.Console()).kept_in(pathlib.Path('train.log')):\n"
        "    logging.getLogger('somebody').warning('seen')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=ON_CPU, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "seen\n")
    assert said(tmp_path) == ["warning: seen"]


def test_the_error_that_ends_a_run_is_in_its_log(files):
    with pytest.raises(FloatingPointError):
        train(options(files, steps=200, save_every=1, log_every=1, learning_rate=1e10), console=quiet())
    assert re.fullmatch(r"error: step \d+ was not made: its loss is .*", said(files / "run")[-1])


def test_a_failure_before_the_first_step_leaves_no_log_and_no_lines(files):
    with pytest.raises(ValueError, match="fewer than one sequence"):
        train(options(files, sequence_length=100_000), console=quiet())
    assert not (files / "run").exists()
    train(options(files, steps=10), console=quiet())
    before = (files / "run" / "train.log").read_bytes()
    with pytest.raises(ValueError, match="later step"):
        train(options(files, steps=5), resume=True, console=quiet())
    assert (files / "run" / "train.log").read_bytes() == before


@pytest.mark.parametrize("kind", ["folder", "full disk"])
def test_a_log_that_cannot_be_written_is_an_error_before_any_work(files, kind):
    (files / "run").mkdir()
    if kind == "folder":
        (files / "run" / "train.log").mkdir()
    elif not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    else:
        (files / "run" / "train.log").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"Is a directory|No space left"):
        train(options(files), console=quiet())
    assert [path.name for path in (files / "run").iterdir()] == ["train.log"]


def test_a_signal_is_in_the_log_with_the_way_to_resume(files):
    process = subprocess.Popen([*COMMAND, *arguments(files, steps=100_000)], env=ON_CPU, stdout=subprocess.DEVNULL)
    wait_for(files / "run" / "checkpoint-10", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert re.fullmatch(r"stopped by SIGTERM after step \d+, .* --resume --output .*", said(files / "run")[-1])


def test_standard_output_sent_to_the_log_has_every_line_once(files):
    (files / "run").mkdir()
    with (files / "run" / "train.log").open("w") as log:
        subprocess.run([*COMMAND, *arguments(files, steps=10)], env=ON_CPU, stdout=log, check=True)
    text = (files / "run" / "train.log").read_text()
    assert text.count("step     10/10  loss") == 1
    assert not TIMED.search(text)


@pytest.mark.slow
def test_one_of_several_processes_writes_the_log(files):
    process = torchrun(2, *arguments(files, batch_size=1, steps=10))
    output, _ = process.communicate()
    assert process.returncode == 0, output
    lines = said(files / "run")
    assert len([line for line in lines if line.startswith("step     10/10  loss")]) == 1
    assert all(line in output for line in lines)


@linux_only
def test_a_run_that_ignores_the_closing_of_its_terminal_goes_on(files):
    """As under nohup, whose output is a terminal that is gone."""
    master, slave = os.openpty()
    words = [*COMMAND, *arguments(files, steps=60, save_every=20)]
    ignoring = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    ignoring += "os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", ignoring, *words], env=ON_CPU | {"TERM": "xterm"}, stdout=slave, start_new_session=True
    )
    os.close(slave)
    shown = b""
    while not (files / "run" / "checkpoint-20").exists():
        if select.select([master], [], [], 0.01)[0]:
            shown += os.read(master, 1 << 16)
    os.close(master)
    assert process.wait(timeout=120) == 0
    assert b"ETA" in shown
    assert any(line.startswith("step     60/60  held-out loss") for line in said(files / "run"))


def test_the_command_names_a_tracker_that_is_unknown(files):
    result = command(*arguments(files), "--report-to", "paper")
    assert (result.returncode, result.stdout) == (2, "")
    assert "report_to must be among" in result.stderr
    assert not (files / "run").exists()
