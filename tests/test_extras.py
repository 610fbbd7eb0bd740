"""Imports: without packages of an extra, and without the compilers, which take as long as PyTorch."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "blocked", "extra"),
    [
        ("models", "transformers", "models"),
        ("training", "accelerate", "train"),
        ("inference", "transformers", "models"),
        ("serving", "fastapi", "serve"),
    ],
)
def test_a_missing_package_names_the_extra(module, blocked, extra):
    program = f"import sys; sys.modules[{blocked!r}] = None; import lightning_attention.{module}"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 1
    assert f"{blocked} not installed: run pip install 'lightning-attention[{extra}]'" in process.stderr


def test_adapters_name_the_extra_of_peft(tmp_path):
    """Models and runs without adapters do not need it."""
    (tmp_path / "adapter_config.json").write_text("{}")
    program = "import sys; sys.modules['peft'] = None; import lightning_attention.training as training, "
    program += f"lightning_attention.inference as inference; inference.load({str(tmp_path)!r})"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 1
    assert "peft not installed: run pip install 'lightning-attention[finetune]'" in process.stderr


OPERATORS = """
import torch
import lightning_attention.nn
from lightning_attention import lightning_attention, lightning_attention_step
q = torch.randn(1, 3, 2, 4, requires_grad=True)
o, state = lightning_attention(q, q, q, output_final_state=True)
o.sum().backward()
with torch.no_grad():
    lightning_attention_step(q[:, 0], q[:, 0], q[:, 0], state=state)
"""


@pytest.mark.parametrize("program", ["import lightning_attention", OPERATORS], ids=["import", "operators"])
def test_operators_on_a_cpu_do_not_import_compilers(program):
    program += "\nimport sys; assert not {'torch._dynamo', 'triton'} & set(sys.modules)"
    not_interpreted = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], env=not_interpreted, check=True)
