"""Lightning Attention-1 computes the operator. Runs in a process of its own, with Triton's interpreter."""

import os
import subprocess
import sys

PROGRAM = """
import torch
from lightning_attention import lightning_attention
from benchmarks.baselines.lightning1 import lightning1

log_decay = torch.tensor([-50.0, -0.01, 0.0])

def results(attention, *inputs):
    q, k, v, do = inputs
    qkv = [x.requires_grad_() for x in (q, k, v)]
    o = attention(*qkv)
    return o, *torch.autograd.grad(o, qkv, do)

for dtype, T, D in [(torch.float32, 150, 20), (torch.float16, 131, 16)]:
    q, k, v, do = (torch.randn(1, T, 3, D, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(4))
    got = results(lambda q, k, v: lightning1(q, k, v, log_decay), q, k, v, do)
    exact = results(
        lambda q, k, v: lightning_attention(q, k, v, log_decay, backend="reference").output,
        *(x.detach().double() for x in (q, k, v, do)),
    )
    for name, x, y in zip(("o", "dq", "dk", "dv"), got, exact):
        errors = (x - y).norm(dim=(1, 3)) / y.norm(dim=(1, 3))
        assert errors.max() <= 4 * torch.finfo(dtype).eps, (dtype, T, D, name, errors)
"""


def test_outputs_and_gradients_equal_the_reference():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
