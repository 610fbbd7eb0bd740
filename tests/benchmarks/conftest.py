"""`python -m benchmarks` in this process, without measuring the bandwidth of a copy."""

import sys
from collections.abc import Callable

import pytest

from lightning_attention.cli import main

Run = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def fixed_bandwidth(monkeypatch):
    monkeypatch.setattr("benchmarks.run.copy_bandwidth", lambda device: 1e9)


@pytest.fixture
def bench(monkeypatch) -> Run:
    """Function that runs `python -m benchmarks` with arguments and returns the command. Failures raise SystemExit."""

    def run(*arguments: object) -> list[str]:
        command = ["python", "-m", "benchmarks", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command[2:])
        try:
            main("python -m benchmarks", "benchmarks.commands")
        except SystemExit as stopped:
            if stopped.code:
                raise
        return command

    return run
