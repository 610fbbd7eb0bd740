"""Python blocks about checkpoints in the documentation run as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import save_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder in which `run` holds a checkpoint of the name in the pages."""
    save_checkpoint(tmp_path / "run" / "checkpoint-20000")
    return tmp_path


@pytest.mark.parametrize(
    ("page", "heading"),
    [
        ("docs/inference.md", "Serving many requests"),
        ("docs/model.md", "Conversations"),
    ],
    ids=lambda value: str(value),
)
def test_a_block_runs_as_printed(run, page, heading):
    section = (ROOT / page).read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 1
    settings = {"PYTHONPATH": str(ROOT / "src"), "HF_MODULES_CACHE": str(run / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", blocks[0]],
        cwd=run,
        env=os.environ | settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
