"""`torch.export` with dynamic sizes."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from lightning_attention import lightning_attention, lightning_attention_step

H, K, V = 3, 4, 5
BATCH, LENGTH = Dim("batch", min=1, max=64), Dim("length", min=1, max=4096)
# The number of sequences plus one; export specializes on a single sequence.
BOUNDS = Dim("bounds", min=3, max=64)
QKV = ({0: BATCH, 1: LENGTH},) * 3


class Attention(nn.Module):
    log_decay: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("log_decay", -torch.rand(H))

    def forward(self, q, k, v, initial_state=None):
        return tuple(lightning_attention(q, k, v, self.log_decay, initial_state=initial_state, output_final_state=True))


class Packed(Attention):
    def forward(self, q, k, v, cu_seqlens):
        return tuple(lightning_attention(q, k, v, self.log_decay, cu_seqlens=cu_seqlens, output_final_state=True))


class Step(Attention):
    def forward(self, q, k, v, state):
        return lightning_attention_step(q, k, v, self.log_decay, state=state)


def qkv(*sizes: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(*sizes, H, size) for size in (K, K, V))


def state(count: int) -> Tensor:
    return torch.randn(count, H, K, V)


CASES = {
    "attention": (Attention(), qkv(2, 20), QKV, [qkv(5, 300), qkv(1, 1)]),
    "with a state": (Attention(), (*qkv(2, 20), state(2)), (*QKV, {0: BATCH}), [(*qkv(5, 7), state(5))]),
    "packed": (
        Packed(),
        (*qkv(1, 20), torch.tensor([0, 7, 20])),
        (*({1: LENGTH},) * 3, {0: BOUNDS}),
        [(*qkv(1, 333), torch.tensor([0, 7, 20, 20, 333]))],
    ),
    "step": (
        Step(),
        (*(x[:, 0] for x in qkv(2, 1)), state(2)),
        ({0: BATCH},) * 4,
        [(*(x[:, 0] for x in qkv(7, 1)), state(7))],
    ),
    "step of several tokens": (Step(), (*qkv(2, 3), state(2)), (*QKV, {0: BATCH}), [(*qkv(7, 2), state(7))]),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(("module", "example", "dims", "others"), CASES.values(), ids=CASES.keys())
@pytest.mark.filterwarnings("ignore")
def test_exported_equals_eager(module, example, dims, others, grad):
    with torch.set_grad_enabled(grad and not isinstance(module, Step)):
        exported = export(module, example, dynamic_shapes=dims).module()
    for given in others:
        with torch.no_grad():
            ours, theirs = ([x.clone() for x in given] for _ in range(2))
            torch.testing.assert_close(exported(*theirs), module(*ours))
            torch.testing.assert_close(theirs, ours)
