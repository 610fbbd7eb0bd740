"""The summary of the GPU tests, of a few tests that need none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_suite.py"
TESTS = """
import pytest

@pytest.mark.parametrize("x", [1, 2])
def test_good(x): pass

@pytest.mark.parametrize("x", [1, 2])
def test_skipped(x): pytest.skip("no such GPU")

def test_over_nccl(): pass

def test_more_than_two_to_the_31_elements(): pass

def test_bad(): assert False

@pytest.fixture
def broken(): raise OSError

def test_error(broken): pass
"""


@pytest.fixture
def suite(tmp_path):
    """Run the script on the tests of a file; return its exit code and the summary."""
    tests, results = tmp_path / "test_few.py", tmp_path / "results.json"
    tests.write_text(TESTS)

    def run(keyword: str) -> tuple[int, dict]:
        arguments = ["--commit", "abc", "-m", "not gpu", "-k", keyword, "-n", "0", tests]
        code = subprocess.run([sys.executable, SCRIPT, results, *arguments], capture_output=True).returncode
        return code, json.loads(results.read_text())

    return run


def test_every_outcome_is_counted(suite):
    code, found = suite("test")
    assert code == 1
    assert found["passed"] == 4
    assert [name.split(".")[-1] for name in found["failed"]] == ["test_few::test_bad"]
    assert [name.split(".")[-1] for name in found["errors"]] == ["test_few::test_error"]
    assert list(found["skipped"]) == ["no such GPU"]
    assert list(found["skipped"]["no such GPU"].values()) == [2]
    assert {name: part["exit_code"] for name, part in found["parts"].items()} == {"parallel": 1, "nccl": 0, "large": 0}
    assert found["machine"]["commit"] == "abc"


@pytest.mark.parametrize(("keyword", "exit_code"), [("good", 0), ("skipped", 1)])
def test_a_suite_is_green_if_something_passed_and_nothing_failed(suite, keyword, exit_code):
    assert suite(keyword)[0] == exit_code
