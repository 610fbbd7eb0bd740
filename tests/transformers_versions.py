"""Print the versions of transformers for `make test-newest`: the newest and the oldest allowed.

The installed version is left out, since `make test` tests it.
"""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def main() -> None:
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    [allowed] = [r for r in map(Requirement, extras["models"]) if r.name == "transformers"]
    [oldest] = [bound.version for bound in allowed.specifier if bound.operator == ">="]
    versions = [found_by_pip(str(allowed)), found_by_pip(f"transformers=={oldest}")]
    print(*dict.fromkeys(v for v in versions if v != version("transformers")))


def found_by_pip(requirement: str) -> str:
    """Version that pip would install from the index."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    report = subprocess.run([*command, "--report", "-", requirement], check=True, stdout=subprocess.PIPE).stdout
    [package] = json.loads(report)["install"]
    return package["metadata"]["version"]


if __name__ == "__main__":
    main()
