"""Run the GPU tests and write a summary: what passed, failed and was skipped, on what machine.

python benchmarks/gpu_suite.py results.json [--commit COMMIT] [pytest arguments]

Three parts: most tests in parallel with pytest-xdist, tests over NCCL, which use several GPUs, and tests of more than
2^31 elements, which need a GPU's memory. Exits with 1 if a test failed, a part broke off or nothing passed.
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
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from signal import SIGINT
from typing import Any
from xml.etree import ElementTree

import torch

from lightning_attention.bench.machine import machine

ROOT = Path(__file__).parents[1]
# Compilation takes most of the time, but many processes wait for each other on a GPU. tests/conftest.py deals the GPUs.
PROCESSES = min(14 * max(torch.cuda.device_count(), 1), os.cpu_count() or 1)
XDIST = ["-n", str(PROCESSES), "--dist", "worksteal"] if find_spec("xdist") else []
# pytest's -k expression and more of its arguments.
PARTS = {
    "parallel": ("not (nccl or a_gpu_each or 31_elements)", XDIST),
    "nccl": ("nccl or a_gpu_each", []),
    "large": ("31_elements", []),
}
NOTHING_COLLECTED = 5


def described(commit: str | None) -> dict[str, Any]:
    """Describe GPUs, versions and commit. Where there is no .git, `is_dirty` is None."""
    status = subprocess.run(["git", "-C", ROOT, "status", "--porcelain"], capture_output=True, text=True)
    found = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return found | {
        "transformers": version("transformers"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "commit": commit or (found["commit"] or "unknown").removesuffix("-dirty"),
        "is_dirty": bool(status.stdout) if status.returncode == 0 else None,
    }


@dataclass
class Summary:
    """Names of tests; of the skipped ones, how many cases of each, by reason."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    skipped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    parts: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, report: Path) -> None:
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            outcomes = {element.tag: element for element in case}
            if "failure" in outcomes:
                self.failed.append(name)
            elif "error" in outcomes:
                self.errors.append(name)
            elif (skipped := outcomes.get("skipped")) is not None:
                self.skipped[skipped.get("message", "")][name.split("[")[0]] += 1
            else:
                self.passed += 1


def run(command: list[str], seconds: float) -> int:
    """Run pytest, interrupted after so many seconds: it then still reports the tests that ended."""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(SIGINT)
    try:
        return process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--commit", help="of the tested tree, where there is no .git")
    parser.add_argument("--seconds", type=float, default=540, help="for all tests; those left are errors")
    parser.add_argument("-m", dest="marker", default="gpu", help="as pytest's (default: gpu)")
    parser.add_argument("-k", dest="keyword", help="as pytest's")
    options, arguments = parser.parse_known_args()
    head = {"command": shlex.join(["python", *sys.argv]), "machine": described(options.commit)}
    summary, start = Summary(), time.monotonic()
    for name, (keyword, extra) in PARTS.items():
        print(f"== {name}, after {time.monotonic() - start:.0f} s", flush=True)
        keyword = f"({options.keyword}) and ({keyword})" if options.keyword else keyword
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            selected = ["-m", options.marker, "-k", keyword, "-p", "no:benchmark", *extra, f"--junitxml={report}"]
            selected += ["--durations=15"]
            command = [sys.executable, "-m", "pytest", "-q", *selected, *arguments]
            code = run(command, max(options.seconds - (began - start), 1))
            if report.exists():
                summary.add(report)
        summary.parts[name] = {"seconds": round(time.monotonic() - began, 1), "exit_code": code}
        if code not in (0, 1, NOTHING_COLLECTED):
            summary.errors.append(f"part {name}: pytest exited with {code}")
        results = head | {"seconds": round(time.monotonic() - start, 1)} | vars(summary)
        options.results.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{summary.passed} passed, {len(summary.failed)} failed, {len(summary.errors)} errors: {options.results}")
    return 1 if summary.failed or summary.errors or not summary.passed else 0


if __name__ == "__main__":
    sys.exit(main())
