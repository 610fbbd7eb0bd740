"""The README's Python blocks about checkpoints run as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import make_config

from lightning_attention.models import LightningForCausalLM
from lightning_attention.training import byte_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder in which `run` holds a checkpoint of the name in the README."""
    torch.manual_seed(0)
    folder, tokenizer = tmp_path / "run" / "checkpoint-20000", byte_tokenizer()
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    LightningForCausalLM(make_config(vocab_size=len(tokenizer), **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tmp_path


@pytest.mark.parametrize(
    ("page", "heading"),
    [
        ("README.md", "The model"),
        ("README.md", "Serving"),
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
