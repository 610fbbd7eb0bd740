"""Import of a part of the library without its packages."""

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
def test_a_missing_package_names_the_extra(module, blocked, extra):
    program = f"import sys; sys.modules[{blocked!r}] = None; import lightning_attention.{module}"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 1
    assert f"{blocked} not installed: run pip install 'lightning-attention[{extra}]'" in process.stderr
