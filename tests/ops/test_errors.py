"""Inputs of wrong shapes, dtypes, devices and values: one error that says what was expected."""

import pytest
import torch

from lightning_attention import lightning_attention, lightning_attention_step
from lightning_attention.ops.backends import BACKENDS


def good() -> dict:
    return {
        "q": torch.randn(1, 6, 2, 4),
        "k": torch.randn(1, 6, 2, 4),
        "v": torch.randn(1, 6, 2, 3),
        "log_decay": torch.tensor([-0.5, -1.0]),
    }


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


BAD = [
    ({"q": torch.randn(6, 2, 4)}, ValueError, r"q must be \[B, T, H, K\], got shape \(6, 2, 4\)"),
    ({"k": torch.randn(1, 6, 2, 5)}, ValueError, "k must have the shape of q"),
    ({"v": torch.randn(1, 5, 2, 3)}, ValueError, r"v must be \[1, 6, 2, 'V'\] to fit q, got shape \(1, 5, 2, 3\)"),
    ({"v": torch.randn(6, 2, 3)}, ValueError, "v must be"),
    ({name: torch.ones(1, 6, 0, 4) for name in "qkv"}, ValueError, r"q must have at least one head"),
    ({"q": torch.ones(1, 6, 2, 4, dtype=torch.int64)}, TypeError, "q must be one of torch.float64"),
    ({"k": torch.randn(1, 6, 2, 4).half()}, TypeError, "k must have the dtype of q torch.float32, got torch.float16"),
    ({"v": torch.randn(1, 6, 2, 3).double()}, TypeError, "v must have the dtype of q"),
    ({"k": meta(1, 6, 2, 4)}, ValueError, "k must be on the device of q, cpu, got meta"),
    ({"log_decay": torch.tensor([-0.5])}, ValueError, r"log_decay must be \[H\] = \[2\], got shape \(1,\)"),
    ({"log_decay": torch.tensor([-0.5, float("nan")])}, ValueError, "log_decay must be <= 0, got a maximum of nan$"),
    ({"log_decay": torch.tensor([-0.5, -1.0]).bfloat16()}, TypeError, "log_decay must be torch.float32"),
    ({"log_decay": meta(2)}, ValueError, "log_decay must be on the device"),
    ({"log_decay": torch.tensor([-0.5, -1.0], requires_grad=True)}, ValueError, "must not require a gradient"),
    ({"initial_state": torch.zeros(2, 2, 4, 3)}, ValueError, r"initial_state must be \[N, H, K, V\] = \[1, 2, 4, 3\]"),
    ({"initial_state": torch.zeros(1, 2, 4, 3).half()}, TypeError, "initial_state must be torch.float32 when q is"),
    ({"initial_state": meta(1, 2, 4, 3)}, ValueError, "initial_state must be on the device"),
    ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens must be int32 or int64"),
    ({"cu_seqlens": torch.tensor([[0, 6]])}, ValueError, r"cu_seqlens must be \[N \+ 1\]"),
    ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, ValueError, r"cu_seqlens must be \[N \+ 1\]"),
    ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens must run from 0 to T = 6, got 0 to 5"),
    ({"cu_seqlens": torch.tensor([1, 6])}, ValueError, "cu_seqlens must run from 0"),
    ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, ValueError, "cu_seqlens must not decrease"),
    ({"cu_seqlens": meta(2).int()}, ValueError, "cu_seqlens must be on the device"),
    (
        {"backend": "fast"},
        ValueError,
        "backend must be 'auto' or one of 'hopper', 'triton', 'chunked', 'reference', got 'fast'",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[f"{i}-{next(iter(b[0]))}" for i, b in enumerate(BAD)])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_bad_inputs_of_attention_are_refused(backend, change, kind, message):
    arguments = good() | {"backend": backend} | change
    with pytest.raises(kind, match=message):
        lightning_attention(**arguments)


def test_packed_sequences_need_one_batch_row():
    arguments = {name: x.expand(2, *x.shape[1:]) if x.dim() == 4 else x for name, x in good().items()}
    with pytest.raises(ValueError, match="B must be 1, got 2"):
        lightning_attention(**arguments, cu_seqlens=torch.tensor([0, 6]))


BAD_STEPS = [
    ({"q": torch.randn(2, 4)}, ValueError, r"q must be \[B, H, K\] or \[B, T, H, K\]"),
    ({"v": torch.randn(6, 3)}, ValueError, "v must be"),
    ({"state": torch.zeros(5, 2, 4, 3)}, ValueError, r"state must be \[N, H, K, V\] = \[6, 2, 4, 3\]"),
    ({"state": torch.zeros(6, 2, 4)}, ValueError, r"state must be \[N, H, K, V\]"),
    ({"state": torch.zeros(6, 2, 4, 3).double()}, TypeError, "state must be torch.float32"),
    ({"state_indices": torch.zeros(5, dtype=torch.int32)}, ValueError, r"state_indices must be \[B\] = \[6\]"),
    ({"state_indices": torch.zeros(6)}, TypeError, "state_indices must be int32 or int64"),
    ({"state_indices": torch.arange(1, 7)}, ValueError, r"state_indices must be -1 or in \[0, 6\), got 1 to 6"),
    ({"state_indices": torch.arange(-2, 4)}, ValueError, "state_indices must be -1 or"),
    ({"q": torch.randn(6, 2, 4, requires_grad=True)}, ValueError, r"call it under torch.no_grad\(\)"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), BAD_STEPS, ids=[f"{i}-{next(iter(b[0]))}" for i, b in enumerate(BAD_STEPS)]
)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_bad_inputs_of_a_step_are_refused(backend, change, kind, message):
    arguments = {name: x[0] if x.dim() == 4 else x for name, x in good().items()}
    arguments |= {"state": torch.zeros(6, 2, 4, 3), "backend": backend} | change
    with pytest.raises(kind, match=message):
        lightning_attention_step(**arguments)


def test_an_unsupported_problem_is_refused_with_reasons(monkeypatch):
    monkeypatch.setattr(BACKENDS["chunked"], "unsupported_reasons", lambda problem: ["reason one", "reason two"])
    with pytest.raises(NotImplementedError, match="backend 'chunked' cannot run this: reason one; reason two"):
        lightning_attention(**good(), backend="chunked")
    lightning_attention(**good())
