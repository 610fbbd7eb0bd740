"""`linear_cross_entropy` equals `F.cross_entropy(F.linear(x, weight).float(), labels)`."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import INTERPRETED, device_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from lightning_attention.nn import linear_cross_entropy

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
OPERATOR = torch.ops.lightning_attention.linear_cross_entropy.default
DEVICES = pytest.mark.parametrize(
    "device", ["cpu", pytest.param(device_of("triton"), marks=pytest.mark.triton, id="triton")]
)


def plain(x: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    logits = F.linear(x, weight)
    logits = logits if logits.dtype == FP64 else logits.float()
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)


def make_inputs(
    *shape: int, W: int = 12, V: int = 30, dtype: torch.dtype = FP32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs whose logits are about 1."""
    x, weight = torch.randn(*shape, W).to(device, dtype), (torch.randn(V, W) / W**0.5).to(device, dtype)
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(V, shape, device=device)


def with_gradients(loss_of: Any, x: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> list[Tensor]:
    loss = loss_of(x, weight, labels, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight))]


def assert_accurate(x: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> None:
    """Assert that errors against float64 are at most twice those of plain PyTorch, a rounding of every term added."""
    wide, wide_weight = (y.detach().double().requires_grad_() for y in (x, weight))
    exact = with_gradients(plain, wide, wide_weight, labels, **options)
    baseline = with_gradients(plain, x, weight, labels, **options)
    found = with_gradients(linear_cross_entropy, x, weight, labels, **options)
    terms = sums_of_magnitudes(wide, wide_weight, labels, **options)
    for y, plainly, expected, magnitudes in zip(found, baseline, exact, terms, strict=True):
        assert y.dtype == plainly.dtype
        rounding = torch.finfo(x.dtype).eps * magnitudes.norm()
        assert (y.double() - expected).norm() <= 2 * ((plainly.double() - expected).norm() + rounding)


def sums_of_magnitudes(x: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> list[Tensor]:
    """The sums that make the loss and its gradients, of absolute values: larger than the sums where terms cancel."""
    logits = F.linear(x, weight).detach().flatten(0, -2).requires_grad_()
    loss = F.cross_entropy(logits, labels.flatten(), **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    kept = labels.flatten() != -100
    largest = logits.detach().abs().amax(dim=1)[kept]
    of_loss = loss.detach() + (largest.mean() if options.get("reduction", "mean") == "mean" else largest.sum())
    gradient = gradient.abs()
    return [of_loss, gradient @ weight.detach().abs(), gradient.mT @ x.detach().flatten(0, -2).abs()]


@DEVICES
@settings(max_examples=15 if INTERPRETED else 40, deadline=None)
@given(
    st.sampled_from([FP32, BF16, FP16]),
    st.sampled_from([(), (1,), (9,), (2, 3)]),
    st.integers(1, 40),
    st.integers(2, 70),
    st.floats(0, 1),
    st.sampled_from(["mean", "sum"]),
)
def test_loss_and_gradients_match_float64(device, dtype, batch, W, V, ignored, reduction):
    x, weight, labels = make_inputs(*batch, 11, W=W, V=V, dtype=dtype, device=device)
    labels[torch.rand(labels.shape, device=device) < ignored] = -100
    labels[..., 0] = V - 1
    assert_accurate(x, weight, labels, reduction=reduction)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(("N", "W", "V"), [(1, 64, 50_304), (5000, 256, 50_257), (20_001, 128, 50_304)])
def test_loss_and_gradients_on_a_gpu_match_float64(dtype, N, W, V):
    """The last case has two chunks."""
    x, weight, labels = make_inputs(N, W=W, V=V, dtype=dtype, device="cuda")
    labels[N // 2 + 1 :: 3] = -100
    assert_accurate(x, weight, labels)


@pytest.mark.gpu
def test_memory_on_a_gpu_is_that_of_a_chunk():
    x, weight, labels = make_inputs(65_536, W=128, V=50_304, dtype=BF16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(x, weight, labels).backward()
    logits, gradients = 2 * 2**29, 2 * (x.numel() + 4 * weight.numel())
    assert torch.cuda.max_memory_allocated() - before < 1.2 * (logits + 2 * gradients)
    assert logits + 2 * gradients < 2 * len(labels) * len(weight) / 4


def test_gradients_match_finite_differences():
    x, weight, labels = make_inputs(2, 3, W=4, V=5, dtype=FP64)
    labels[0, 1] = -100
    for reduction in ("mean", "sum"):
        torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, labels, reduction=reduction), (x, weight))  # noqa: B023


@DEVICES
def test_ignored_tokens_add_nothing(device):
    x, weight, labels = make_inputs(6, device=device)
    kept = torch.tensor([True, False, True, True, False, True], device=device)
    kept_x = x.detach()[kept].requires_grad_()
    for ignore_index in (-100, -1, 7):
        given = torch.where(kept, torch.where(labels == 7, 8, labels), ignore_index)
        expected = with_gradients(linear_cross_entropy, kept_x, weight, given[kept], reduction="sum")
        loss, dx, dweight = with_gradients(
            linear_cross_entropy, x, weight, given, ignore_index=ignore_index, reduction="sum"
        )
        torch.testing.assert_close([loss, dx[kept], dweight], expected, rtol=1e-5, atol=1e-6)
        assert dx[~kept].eq(0).all()


@DEVICES
@pytest.mark.parametrize("shape", [(3,), (0,)], ids=["ignored", "empty"])
def test_no_labels_give_0_as_a_sum_and_nan_as_a_mean(device, shape):
    x, weight, labels = make_inputs(*shape, device=device)
    labels.fill_(-100)
    loss, dx, dweight = with_gradients(linear_cross_entropy, x, weight, labels, reduction="sum")
    assert loss == 0
    assert dx.eq(0).all()
    assert dweight.eq(0).all()
    assert linear_cross_entropy(x, weight, labels).isnan()


@DEVICES
@pytest.mark.parametrize("shape", [(), (6,), (2, 3)], ids=str)
def test_no_channels_give_the_loss_of_equal_logits(device, shape):
    x, weight, labels = make_inputs(*shape, W=1, device=device)
    x, weight = x.detach()[..., :0].requires_grad_(), weight.detach()[:, :0].requires_grad_()
    loss, dx, dweight = with_gradients(linear_cross_entropy, x, weight, labels)
    assert loss.item() == pytest.approx(math.log(30))
    assert (dx.shape, dweight.shape) == (x.shape, weight.shape)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_labels_may_be_any_integers(dtype):
    x, weight, labels = make_inputs(6)
    assert linear_cross_entropy(x, weight, labels.to(dtype)) == linear_cross_entropy(x, weight, labels)


@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_gradients_that_are_not_needed_are_not_computed(frozen):
    x, weight, labels = make_inputs(6)
    names = ["x", "weight"]
    leaves = dict(zip(names, (x, weight), strict=True))
    expected = dict(zip(names, with_gradients(linear_cross_entropy, x, weight, labels)[1:], strict=True))
    for name in leaves if frozen == "both" else [frozen]:
        leaves[name].requires_grad_(False)
    with torch.profiler.profile() as profile:
        loss = linear_cross_entropy(x, weight, labels)
    products = sum(event.name in ("aten::mm", "aten::addmm_") for event in profile.events() or [])
    assert products == (1 if frozen == "both" else 2)
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, expected[name])


def test_backward_scales_and_repeats():
    x, weight, labels = make_inputs(6)
    _, dx, dweight = with_gradients(linear_cross_entropy, x, weight, labels)
    loss = linear_cross_entropy(x, weight, labels)
    for _ in range(2):
        (5 * loss).backward(retain_graph=True)
    torch.testing.assert_close([x.grad, weight.grad], [10 * dx, 10 * dweight])


def test_large_sums_do_not_overflow_in_float16():
    """4096 tokens with the label 0, each of which adds up to 64: the sum exceeds 65504, the mean does not."""
    x, weight = torch.full((4096, 8), 64.0, dtype=FP16), torch.zeros(5, 8, dtype=FP16, requires_grad=True)
    linear_cross_entropy(x, weight, torch.zeros(4096, dtype=torch.int64)).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[:2, 0], torch.tensor([-0.8 * 64, 0.2 * 64]).half(), rtol=1e-3, atol=0)


def test_second_derivative_raises():
    x, weight, labels = make_inputs(6)
    for leaf in (x, weight):
        (gradient,) = torch.autograd.grad(linear_cross_entropy(x, weight, labels), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="linear_cross_entropy has no second derivative"):
            gradient.sum().backward()


@DEVICES
def test_autocast_multiplies_in_its_dtype_and_keeps_gradients_float32(device):
    x, weight, labels = make_inputs(6, device=device)
    low_x, low_weight = (y.detach().bfloat16().requires_grad_() for y in (x, weight))
    expected = with_gradients(linear_cross_entropy, low_x, low_weight, labels)
    for given_x in (x, low_x):
        with torch.autocast(x.device.type, BF16):
            found = with_gradients(linear_cross_entropy, given_x, weight, labels)
        assert found[2].dtype == FP32
        torch.testing.assert_close([y.float() for y in found], [y.float() for y in expected], rtol=0, atol=0)
    with torch.autocast(x.device.type, BF16):
        assert linear_cross_entropy(x.double(), weight.double(), labels).dtype == FP64


@DEVICES
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_operator_passes_opcheck(device, needs):
    x, weight, labels = make_inputs(6, device=device)
    torch.library.opcheck(OPERATOR, (x.detach(), weight.detach(), labels, -100, *needs))


@DEVICES
@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager_at_every_length_without_recompilation(device):
    def scaled(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return 3 * linear_cross_entropy(2 * x, weight, labels)

    compiled = torch.compile(scaled, fullgraph=True, dynamic=True)
    inputs = {length: make_inputs(2, length, device=device) for length in (20, 21, 5)}
    expected = {length: with_gradients(scaled, *x) for length, x in inputs.items()}
    torch.testing.assert_close(with_gradients(compiled, *inputs[20]), expected[20])
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (21, 5):
            torch.testing.assert_close(with_gradients(compiled, *inputs[length]), expected[length])


@pytest.mark.filterwarnings("ignore")
def test_transforms_equal_the_plain_formula():
    x, weight, labels = (y.detach() for y in make_inputs(4, 6))
    for transform in (
        lambda loss: torch.func.grad(loss, (0, 1))(x, weight, labels),
        lambda loss: torch.func.vmap(loss, (0, None, 0))(x, weight, labels),
        lambda loss: torch.func.jvp(lambda y: loss(y, weight, labels), (x,), (x,)),
        lambda loss: torch.func.hessian(lambda y: loss(y, weight, labels[0, :2]))(x[0, :2]),
    ):
        torch.testing.assert_close(transform(linear_cross_entropy), transform(plain))


def test_subclasses_equal_the_plain_formula():
    x, weight, labels = (y.detach() for y in make_inputs(6))
    loss: Any = linear_cross_entropy(TwoTensor(x, 2 * x), weight, labels)
    torch.testing.assert_close(loss.a, plain(x, weight, labels))
    torch.testing.assert_close(loss.b, plain(2 * x, weight, labels))


def test_meta_and_fake_tensors_have_the_right_metadata():
    x, weight, labels = (y.detach().to("meta") for y in make_inputs(2, 6, dtype=BF16))
    with FakeTensorMode():
        fake = torch.empty(2, 6, 12, dtype=BF16), torch.empty(30, 12, dtype=BF16), torch.zeros(2, 6, dtype=torch.int64)
    for inputs in ((x, weight, labels), fake):
        leaves = [y.requires_grad_() for y in inputs[:2]]
        loss = linear_cross_entropy(leaves[0], leaves[1], inputs[2])
        assert (loss.shape, loss.dtype) == ((), FP32)
        gradients = torch.autograd.grad(loss, leaves)
        assert [(g.shape, g.dtype) for g in gradients] == [(y.shape, BF16) for y in leaves]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_equals_not(use_reentrant):
    inputs = make_inputs(6)
    loss: Any = checkpoint(linear_cross_entropy, *inputs, use_reentrant=use_reentrant)
    loss.backward()
    torch.testing.assert_close([y.grad for y in inputs[:2]], with_gradients(linear_cross_entropy, *inputs)[1:])


X, WEIGHT, LABELS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)
BAD = [
    ({"x": [1.0]}, TypeError, "x must be a dense tensor, got list"),
    ({"labels": 3}, TypeError, "labels must be a dense tensor, got int"),
    (
        {"x": torch.zeros(2, 3, 6)},
        ValueError,
        r"x must be \[..., W\] and weight \[V, W\], got shapes \(2, 3, 6\) and \(5",
    ),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[..., W\] and weight \[V, W\], got shapes \(\) and \(5, 4\)"),
    ({"weight": torch.zeros(4)}, ValueError, r"x must be \[..., W\] and weight \[V, W\], got shapes .* and \(4,\)"),
    ({"labels": LABELS[0]}, ValueError, r"labels must be \[...\] = \[2, 3\], got shape \(3,\)"),
    ({"labels": LABELS.float()}, TypeError, "labels must be integers, got torch.float32"),
    ({"labels": LABELS.bool()}, TypeError, "labels must be integers, got torch.bool"),
    ({"labels": LABELS + 5}, IndexError, r"labels must be in \[0, 5\) or ignore_index = -100, got 5"),
    ({"labels": LABELS - 1}, IndexError, r"labels must be in \[0, 5\) or ignore_index = -100, got -1"),
    ({"weight": WEIGHT.half()}, TypeError, "weight must be torch.float32, as x, got torch.float16"),
    ({"x": X.long(), "weight": WEIGHT.long()}, TypeError, "x must be float64, .* or float16, got torch.int64"),
    ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on the device of x, cpu, got meta"),
    ({"labels": LABELS.to("meta")}, ValueError, "labels must be on the device of x, cpu, got meta"),
    ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
    ({"weight": torch.zeros(0, 4)}, ValueError, r"weight must be \[V, W\] with V >= 1, got shape \(0, 4\)"),
    ({"ignore_index": True}, TypeError, "ignore_index must be an integer, got True"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got None"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got 1.5"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=lambda x: str(x)[:40] if isinstance(x, str) else None)
def test_bad_arguments_are_refused(change, kind, message):
    arguments: dict[str, Any] = {"x": X, "weight": WEIGHT, "labels": LABELS} | change
    with pytest.raises(kind, match=message):
        linear_cross_entropy(**arguments)


def test_loss_of_equal_logits_is_that_of_a_uniform_distribution():
    assert linear_cross_entropy(X, WEIGHT, LABELS).item() == pytest.approx(math.log(5))
