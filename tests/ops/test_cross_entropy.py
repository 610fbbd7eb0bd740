"""Chunks of logits, their losses and their gradients, in plain PyTorch and in Triton."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import device_of, error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_attention.ops.cross_entropy import (
    MAX_LOGITS_ON_CPU,
    accumulation_dtype,
    chunk_length,
    loss_and_gradients,
    softmax_gradient,
)

# Where `softmax_gradient` runs: the interpreter of Triton makes "triton" of a CPU.
ON = pytest.mark.parametrize("backend", ["chunked", pytest.param("triton", marks=pytest.mark.triton)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def plain(labels: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
    """The summed loss and the gradients of logits, or of x and weight, in plain PyTorch."""
    leaves = [x.detach().clone().requires_grad_() for x in factors]
    logits = F.linear(*leaves) if len(leaves) == 2 else leaves[0]
    loss = F.cross_entropy(logits.to(accumulation_dtype(logits.dtype)), labels, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def assert_accurate(actual: Sequence[Tensor], baseline: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Assert that errors against float64 are at most twice those of plain PyTorch, plus a rounding."""
    for found, plainly, expected in zip(actual, baseline, exact, strict=True):
        assert error(found, expected) <= 2 * error(plainly, expected) + torch.finfo(plainly.dtype).eps


def run(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    losses = torch.full((len(labels),), torch.nan, device=logits.device)
    gradient = softmax_gradient(logits.clone(), labels, ignore_index, losses, True)
    return losses, gradient


@given(st.integers(0, 10**6), st.integers(1, 300_000), st.sampled_from([1 << 10, 1 << 23, 1 << 29]))
def test_chunks_are_the_fewest_that_fit_and_equal(num_tokens, vocab_size, max_logits):
    length = chunk_length(num_tokens, vocab_size, max_logits)
    assert length == 1 or length * vocab_size <= max_logits
    num_chunks = math.ceil(num_tokens / length)
    assert num_chunks == math.ceil(num_tokens / max(max_logits // vocab_size, 1)) or length == 1
    assert num_chunks * length - num_tokens < num_chunks or num_tokens == 0


@ON
@DTYPES
@pytest.mark.parametrize("vocab_size", [1, 7, 259, 4096, 4097, 9000])
def test_softmax_gradient_matches_float64(backend, dtype, vocab_size):
    logits = (4 * torch.randn(9, vocab_size)).to(device_of(backend), dtype)
    labels = torch.randint(vocab_size, (9,), device=logits.device)
    labels[2], labels[3], labels[4] = -100, 0, vocab_size - 1
    losses, gradient = run(logits, labels)
    assert_accurate((losses.sum(), gradient), plain(labels, logits), plain(labels, logits.double()))
    assert losses[2] == 0
    assert gradient[2].eq(0).all()


@ON
def test_probabilities_near_1_are_not_rounded_before_the_label_is_subtracted(backend):
    """`p - 1` is -1e-4 here, and 0 after p is rounded to bfloat16."""
    logits = torch.tensor([[10.0, 0.8]], device=device_of(backend)).bfloat16()
    _, gradient = run(logits, torch.tensor([0], device=logits.device))
    exact = -1 / (1 + math.exp(10.0 - logits[0, 1].item()))
    assert gradient[0, 0].item() == pytest.approx(exact, rel=1e-2)


@ON
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter: log(0), -inf - -inf
def test_infinite_logits_are_as_in_cross_entropy(backend):
    """A block without finite logits, a token without, and a label of probability 0."""
    logits = torch.randn(3, 9000, device=device_of(backend))
    logits[0, :5000] = logits[1] = logits[2, 8] = -math.inf
    labels = torch.tensor([8999, 8, 8], device=logits.device)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    losses, gradient = run(logits, labels)
    torch.testing.assert_close(losses, expected.float(), equal_nan=True)
    assert losses[2] == math.inf
    (d_expected,) = torch.autograd.grad(expected[0], exact)
    torch.testing.assert_close(gradient[0], d_expected[0].float())
    assert gradient[1].isnan().all()


@ON
@pytest.mark.parametrize("label", [-1, 5, 10**12, -(10**12)])
def test_labels_out_of_range_give_nan(backend, label):
    logits = torch.randn(3, 5, device=device_of(backend))
    losses, gradient = run(logits, torch.tensor([0, label, -100], device=logits.device))
    assert losses.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(dim=1).tolist() == [False, True, False]
    assert not gradient[[0, 2]].isnan().any()


@ON
def test_an_ignored_label_may_be_a_symbol(backend):
    logits = torch.randn(3, 5, device=device_of(backend))
    losses, gradient = run(logits, torch.tensor([0, 2, 4], device=logits.device), ignore_index=2)
    assert (losses == 0).tolist() == gradient.eq(0).all(dim=1).tolist() == [False, True, False]


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **kwargs or {})
        for x in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
        return outputs


def test_only_a_chunk_of_logits_is_in_memory():
    N, V = 50, 1 << 20
    x, weight, labels = torch.randn(N, 2), torch.randn(V, 2), torch.randint(V, (N,))
    with Largest() as largest:
        loss_and_gradients(x, weight, labels, -100, True, True)
    assert 2 * V < largest.numel <= MAX_LOGITS_ON_CPU < N * V


@DTYPES
def test_chunks_together_match_float64(dtype):
    N, V = 20, 1 << 20
    x, weight, labels = torch.ones(N, 2).to(dtype), (torch.randn(V, 2) / 8).to(dtype), torch.arange(N) % 3
    assert len(range(0, N, chunk_length(N, V, MAX_LOGITS_ON_CPU))) == 3
    found = loss_and_gradients(x, weight, labels, -100, True, True)
    assert_accurate(found, plain(labels, x, weight), plain(labels, x.double(), weight.double()))
