"""Summary of the GPU suite, from a few tests that need no GPU."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TESTS = """
import pytest

@pytest.mark.parametrize("x", [1, 2])
def test_good(x): pass

@pytest.mark.parametrize("x", [1, 2])
def test_skipped(x): pytest.skip("no such GPU")

@pytest.mark.nccl
def test_over_nccl(): pass

@pytest.mark.large
def test_more_than_two_to_the_31_elements(): pass

def test_bad(): assert False

@pytest.fixture
def broken(): raise OSError

def test_error(broken): pass
"""


@pytest.fixture
def suite(tmp_path):
    """Function that runs the script on a file of tests; returns its exit code and the summary."""
    shutil.copytree(BENCHMARKS, tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results"))
    tests, results = tmp_path / "test_few.py", tmp_path / "results.json"
    tests.write_text(TESTS)
    script = tmp_path / "benchmarks/gpu_suite.py"

    def run(keyword: str, *options: str) -> tuple[int, dict]:
        selected = [] if "--again" in options else ["-k", keyword, tests]
        arguments = [*options, "--commit", "abc", "-m", "not gpu", "-n", "0", *selected]
        code = subprocess.run([sys.executable, script, results, *arguments], capture_output=True).returncode
        return code, json.loads(results.read_text())

    return run


@pytest.mark.slow
def test_every_outcome_is_counted(suite):
    code, found = suite("test")
    assert code == 1
    assert found["passed"] == 4
    assert [name.split("/")[-1] for name in found["failed"]] == ["test_few.py::test_bad"]
    assert [name.split("/")[-1] for name in found["errors"]] == ["test_few.py::test_error: error"]
    assert list(found["skipped"]) == ["no such GPU"]
    assert list(found["skipped"]["no such GPU"].values()) == [2]
    assert {name: part["exit_code"] for name, part in found["parts"].items()} == {
        "parallel": 1,
        "nccl": 0,
        "large": 0,
        "sanitizer": 5,
    }
    assert found["machine"]["commit"] == "abc"
    assert found["command"].startswith("python ")
    assert " results.json --commit abc" in found["command"]


@pytest.mark.slow
def test_failures_run_again(suite, tmp_path):
    first = suite("test")[1]
    file = tmp_path / "test_few.py"
    file.write_text(TESTS.replace("assert False", "pass"))
    code, found = suite("test", "--again")
    assert code == 1  # one fixture is still broken
    assert {name: value for name, value in found.items() if name != "again"} == first
    (again,) = found["again"]
    assert (again["passed"], again["failed"]) == (1, [])
    file.write_text(TESTS.replace("raise OSError", "pass"))
    code, found = suite("test", "--again")
    assert code == 0
    assert found["again"][0] == again
    assert (found["again"][1]["passed"], found["again"][1]["errors"]) == (1, [])
    assert suite("test", "--again") == (2, found)  # nothing is left to run


@pytest.mark.slow
@pytest.mark.parametrize(("keyword", "exit_code"), [("good", 0), ("skipped", 1)])
def test_the_exit_code_is_0_if_a_test_passed_and_none_failed(suite, keyword, exit_code):
    assert suite(keyword)[0] == exit_code


@pytest.mark.slow
def test_a_test_that_does_not_end_is_named(suite, tmp_path):
    """Even if a shell has started the script in the background, where the interrupt signal is ignored."""
    (tmp_path / "test_few.py").write_text("import time\ndef test_first(): pass\ndef test_long(): time.sleep(600)\n")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code, found = suite("test", "--seconds", "40")
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 1
    assert found["passed"] == 1
    assert found["errors"][0].split("/")[-1] == "test_few.py::test_long: started"
    assert "test_few.py::test_first" in str(found["parts"]["parallel"]["slowest"])
