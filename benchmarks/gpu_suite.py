"""Run the GPU tests and write a summary: tests passed, failed and skipped, machine and commit.

python benchmarks/gpu_suite.py results.json [--commit COMMIT] [--again] [pytest arguments]

Runs four parts: most tests in parallel with pytest-xdist; tests over NCCL, which use two GPUs; tests of more than 2^31
elements, which need the memory of a GPU; and tests under compute-sanitizer. Exits with 1 if a test failed, a part was
interrupted or nothing passed. With --again runs what failed in the results that are there, and adds the outcome.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from signal import SIGINT, default_int_handler, signal
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
GPUS = torch.cuda.device_count()
# Compilation takes most of the time, but many processes contend for a GPU.
PROCESSES = min(14 * max(GPUS, 1), os.cpu_count() or 1)
# An expression of markers, the number of processes, and the GPUs of each, which tests/conftest.py assigns.
PARTS = {
    "parallel": ("not (nccl or large or sanitizer)", PROCESSES, 1),
    "nccl": ("nccl", 3 * max(GPUS // 2, 1), 2),  # most of the time they wait for processes to start or to time out
    "large": ("large", 1, GPUS),
    "sanitizer": ("sanitizer", PROCESSES, 1),
}
NOTHING_COLLECTED = 5
LOG = "GPU_SUITE_LOG"


def described(commit: str | None) -> dict[str, Any]:
    """Describe GPUs, versions and commit. `is_dirty` is None if the caller gives the commit, or without .git."""
    status = subprocess.run(["git", "-C", ROOT, "status", "--porcelain"], capture_output=True, text=True)
    from benchmarks.machine import machine

    found = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return found | {
        "transformers": version("transformers"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "commit": commit or (found["commit"] or "unknown").removesuffix("-dirty"),
        "is_dirty": bool(status.stdout) if status.returncode == 0 and not commit else None,
    }


@dataclass
class Summary:
    """Results of tests: names, and for skipped tests the number of cases by reason and test.

    A test that started and did not end is an error.
    """

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    skipped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, log: Path) -> dict[str, float]:
        """Add the outcomes that the plug-in has recorded; return the seconds of each test."""
        seconds: dict[str, float] = {}
        outcomes: dict[str, tuple[str, str]] = {}
        for line in log.read_text().splitlines():
            name, outcome, reason, duration = json.loads(line)
            seconds[name] = seconds.get(name, 0.0) + duration
            if outcomes.get(name, ("started",))[0] in ("started", "passed"):
                outcomes[name] = outcome, reason
        for name, (outcome, reason) in outcomes.items():
            if outcome == "passed":
                self.passed += 1
            elif outcome == "skipped":
                self.skipped[reason][name.split("[")[0]] += 1
            elif outcome == "failed":
                self.failed.append(name)
            else:
                self.errors.append(f"{name}: {outcome}")
        return seconds


# This module is also a pytest plug-in that records outcomes at once, so that a killed run has results too.


def pytest_runtest_logstart(nodeid: str) -> None:
    record(nodeid, "started", "", 0.0)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        outcome = "error" if report.outcome == "failed" and report.when != "call" else report.outcome
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.outcome == "skipped" else ""
        record(report.nodeid, outcome, reason, report.duration)
        if report.outcome == "failed":
            print(f"\n{report.nodeid} ({report.when})\n{report.longreprtext[-3000:]}", flush=True)


def record(*values: str | float) -> None:
    if LOG in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(os.environ[LOG], "a") as file:
            file.write(json.dumps(values) + "\n")


def run(command: list[str], seconds: float, **changed: str) -> int:
    """Run pytest with one thread per process, and interrupt it after `seconds`."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    changed |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment | changed)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(SIGINT)
    try:
        return process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def run_parts(marker: str, arguments: list[str], seconds: float, save: Callable[[Summary], None]) -> Summary:
    """Run all parts, and save the summary after each.

    Args:
        marker: expression of markers of the tests to run.
        arguments: of pytest.
        seconds: time limit of all parts.
    """
    summary, start = Summary(), time.monotonic()
    for name, (markers, processes, gpus) in PARTS.items():
        began = time.monotonic()
        print(f"== {name}, after {began - start:.0f} s", flush=True)
        parallel = ["-n", str(processes), "--dist", "worksteal"] if processes > 1 and find_spec("xdist") else []
        selected = ["-m", f"({marker}) and ({markers})", "-p", "benchmarks.gpu_suite", *parallel]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", *selected, *arguments]
        with tempfile.NamedTemporaryFile() as log:
            left = max(seconds - (began - start), 1)
            code = run(command, left, **{LOG: log.name, "GPUS_PER_PROCESS": str(gpus)})
            durations = summary.add(Path(log.name))
        slowest = dict(sorted(durations.items(), key=lambda item: -item[1])[:15])
        summary.parts[name] = {
            "seconds": round(time.monotonic() - began, 1),
            "exit_code": code,
            "slowest": {test: round(seconds, 1) for test, seconds in slowest.items()},
        }
        if code not in (0, 1, NOTHING_COLLECTED):
            summary.errors.append(f"part {name}: pytest exited with {code}")
        save(summary)
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--commit", help="commit of the tested tree, if there is no .git")
    parser.add_argument("--seconds", type=float, default=540, help="time limit of all tests; tests left are errors")
    parser.add_argument("--again", action="store_true", help="run what failed, and add the outcome to the results")
    parser.add_argument("-m", dest="marker", default="gpu", help="as pytest's (default: gpu)")
    options, arguments = parser.parse_known_args()
    signal(SIGINT, default_int_handler)  # a shell that starts this in the background ignores it
    # Without the folder of the results, which is a machine's own.
    words = [options.results.name if word == str(options.results) else word for word in sys.argv]
    head = {"command": shlex.join(["python", *words]), "machine": described(options.commit)}
    before = json.loads(options.results.read_text()) if options.again else {}
    start = time.monotonic()

    def save(summary: Summary) -> None:
        results = head | {"seconds": round(time.monotonic() - start, 1)} | vars(summary)
        results = before | {"again": [*before.get("again", []), results]} if options.again else results
        options.results.write_text(json.dumps(results, indent=1) + "\n")

    if options.again:
        *_, last = [before, *before.get("again", [])]
        names = last["failed"] + [error.rsplit(": ", 1)[0] for error in last["errors"] if "::" in error]
        if not names:
            parser.error(f"no test failed in {options.results}")
        arguments += names
    summary = run_parts(options.marker, arguments, options.seconds, save)
    print(f"{summary.passed} passed, {len(summary.failed)} failed, {len(summary.errors)} errors: {options.results}")
    return 1 if summary.failed or summary.errors or not summary.passed else 0


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder, whose modules would hide others of the same name
    sys.exit(main())
