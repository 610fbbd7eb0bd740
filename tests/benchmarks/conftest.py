"""The command, run as a user does, on a machine whose copy takes no time to measure."""

import sys

import pytest

from lightning_attention.cli import main


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    monkeypatch.setattr("benchmarks.run.copy_bandwidth", lambda device: 1e9)


@pytest.fixture
def bench(monkeypatch):
    """Runs `python -m benchmarks` with arguments; returns the command. An exit code above 0 raises SystemExit."""

    def run(*arguments):
        command = ["python", "-m", "benchmarks", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command[2:])
        try:
            main("python -m benchmarks", "benchmarks.commands")
        except SystemExit as stopped:
            if stopped.code:
                raise
        return command

    return run
