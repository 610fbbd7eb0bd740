"""A part whose packages are missing says what to install."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "blocked", "extra"),
    [
        ("models", "transformers", "models"),
        ("training", "accelerate", "train"),
        ("inference", "transformers", "models"),
    ],
)
def test_the_extra_is_named(module, blocked, extra):
    program = f"import sys; sys.modules[{blocked!r}] = None; import lightning_attention.{module}"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 1
    assert f"{blocked} not installed: run pip install 'lightning-attention[{extra}]'" in process.stderr
