"""Run transformers' own model tests on our models: `make conformance`.

The tests are those of the installed version of transformers, from the first source that is available:

1. `TRANSFORMERS_SOURCE`, the folder of a checkout;
2. GitHub's archive of the release;
3. the source distribution on PyPI. It contains only `tests/test_*.py`: `ModelTesterMixin`, but not
   `GenerationTesterMixin`, `ExportTesterMixin` or the causal-LM tests. The summary says so, and with `--complete` the
   run fails.

Files are written only to the folder named on the command line.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ARCHIVE = "https://github.com/huggingface/transformers/archive/refs/tags/v{version}.tar.gz"
# Files of a checkout that the tests of a model import; tests/models itself is left out.
NEEDED = ("conftest.py", "pyproject.toml", "src", "tests", "utils")
STAND_INS = {
    "tests/__init__.py": "",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin: pass\n",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Run transformers' own model tests on our models.")
    parser.add_argument("folder", type=Path, help="where to put the tests; emptied first")
    parser.add_argument("--complete", action="store_true", help="fail if only some of the tests are available")
    arguments = parser.parse_args()
    release, folder = version("transformers"), arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    origin = fetch(release, folder)
    if (found := source_version(folder)) != release:
        print(f"{origin} is transformers {found}, installed is {release}", file=sys.stderr)
        return 2
    is_complete = (folder / "tests/causal_lm_tester.py").is_file()
    if not is_complete:
        for name, text in STAND_INS.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        shutil.copy(HERE / "stand_ins/causal_lm_tester.py", folder / "tests")
    ours = folder / "tests/models/lightning/test_modeling_lightning.py"
    ours.parent.mkdir(parents=True)
    for package in (ours.parent, ours.parent.parent):
        (package / "__init__.py").touch()
    shutil.copy(HERE / "lightning_tester.py", ours)

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(folder)
    options = ["-q", "-n", "2", "-p", "no:cacheprovider", "--tb=short", "--disable-warnings"]
    options += ["-o", "log_cli=false"]  # transformers' setting prints every test
    code = pytest.main(
        [*options, "-c", "pyproject.toml", "--rootdir", ".", str(ours)],
        plugins=[Summary(f"transformers {release}, tests of {origin}, RUN_SLOW={os.environ.get('RUN_SLOW', '0')}")],
    )
    if not is_complete:
        print("NOT RUN: GenerationTesterMixin, ExportTesterMixin and the causal-LM tests. They are not in the source")
        print("distribution, and GitHub was not reached; name a checkout of this release with TRANSFORMERS_SOURCE=...")
    return int(code) or (1 if arguments.complete and not is_complete else 0)


def fetch(release: str, folder: Path) -> str:
    """Copy the tests of a release to a folder, and return their source."""
    if source := os.environ.get("TRANSFORMERS_SOURCE"):
        for name in NEEDED:
            if (Path(source) / name).is_dir():
                shutil.copytree(Path(source) / name, folder / name, ignore=without_models)
            elif (Path(source) / name).is_file():
                shutil.copy(Path(source) / name, folder / name)
        return source
    archive = folder / "archive.tar.gz"
    try:
        with urllib.request.urlopen(ARCHIVE.format(version=release), timeout=60) as answer, archive.open("wb") as file:
            shutil.copyfileobj(answer, file)
        origin = "GitHub's archive"
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        print(f"GitHub's archive of transformers {release} is not available ({error}); using the source distribution")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, "--dest", str(folder), f"transformers=={release}"], check=True)
        [archive] = folder.glob("*.tar.gz")
        origin = "the source distribution"
    with tarfile.open(archive) as members:
        for member in members:
            name = member.name.partition("/")[2]  # below the folder transformers-<version>
            if name.partition("/")[0] in NEEDED and not name.startswith("tests/models/"):
                member.name = name
                members.extract(member, folder, filter="data")
    archive.unlink()
    return origin


def without_models(folder: str, names: list[str]) -> list[str]:
    return ["models"] if Path(folder).name == "tests" and "models" in names else []


def source_version(folder: Path) -> str | None:
    text = (folder / "src/transformers/__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
    return found and found[1]


class Summary:
    """pytest plugin that prints how many tests passed, failed and were skipped, and why."""

    def __init__(self, title: str) -> None:
        self.title = title

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        stats = terminalreporter.stats
        failed = [report.nodeid for kind in ("failed", "error", "subtests failed") for report in stats.get(kind, [])]
        reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", []))
        terminalreporter.section(self.title)
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"  {count:3} skipped: {reason}")
        terminalreporter.write_line(
            f"{len(stats.get('passed', []))} passed, {len(failed)} failed, {reasons.total()} skipped"
        )


if __name__ == "__main__":
    sys.exit(main())
