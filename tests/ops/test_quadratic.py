"""Quadratic attention computes the operator: in PyTorch, and by its kernel on a GPU or interpreted."""

import pytest
import torch
from oracle import Case, device_of, make_inputs

from lightning_attention import lightning_attention
from lightning_attention.ops import quadratic
from lightning_attention.ops.quadratic import quadratic_attention

CASES = [
    Case(B=2, T=150, H=3, K=20, V=20),
    Case(B=1, T=131, H=2, K=32, V=16, slope=50.0),
    Case(B=1, T=70, H=2, K=16, V=40, slope=None),
    Case(lengths=(0, 1, 129, 0, 64, 3, 200), H=2, K=16, V=24, slope=0.01),
    Case(lengths=(300,), H=1, K=24, V=24, slope=0.1),
    Case(B=1, T=0, H=2, K=16, V=16),
]


def results(attention, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output and gradients."""
    leaves = [x[name].clone().requires_grad_() for name in ("q", "k", "v")]
    o = attention(*leaves, x["log_decay"], cu_seqlens=x["cu_seqlens"])
    return dict(zip(("o", "dq", "dk", "dv"), (o, *torch.autograd.grad(o, leaves, x["do"])), strict=True))


def exact(q, k, v, log_decay, cu_seqlens):
    return lightning_attention(q, k, v, log_decay, cu_seqlens=cu_seqlens, backend="reference").output


def on(device: str, dtype: torch.dtype, case: Case) -> tuple[dict, dict]:
    """Inputs on a device, and in float64 on the CPU."""
    inputs = make_inputs(case, dtype)
    names = "q", "k", "v", "do", "log_decay", "cu_seqlens"
    x = {name: getattr(inputs, name) for name in names}
    wide = {n: y.cpu().double() if y is not None and n in names[:4] else y for n, y in x.items()}
    return {name: None if y is None else y.to(device) for name, y in x.items()}, wide


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pytorch_equals_the_reference(monkeypatch, case):
    monkeypatch.setattr(quadratic, "BLOCK", 64)
    x, wide = on("cpu", torch.float64, case)
    expected = results(exact, wide)
    for name, found in results(quadratic_attention, x).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_equals_the_reference(case, dtype):
    x, wide = on(device_of("triton"), dtype, case)
    expected = results(exact, wide)
    for name, found in results(quadratic_attention, x).items():
        assert found.dtype == dtype
        norm = expected[name].norm()
        assert (found.cpu().double() - expected[name]).norm() <= 6 * torch.finfo(dtype).eps * norm, name


@pytest.mark.parametrize("device", ["cpu", pytest.param("triton", marks=pytest.mark.triton)])
def test_scores_may_exceed_the_range_of_float16(device):
    q = torch.full((1, 1, 1, 16), 64.0, dtype=torch.float16, device=device_of(device) if device == "triton" else device)
    o = quadratic_attention(q, q, torch.full_like(q, 0.001))
    torch.testing.assert_close(o, torch.full_like(q, 65.5), rtol=2e-3, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("K", [128, 256])
def test_large_tiles_run_on_a_gpu(K):
    """LRPE-d makes K twice V."""
    x, wide = on("cuda", torch.bfloat16, Case(lengths=(700, 1300), H=2, K=K, V=128, slope=0.01))
    expected = results(exact, wide)
    for name, found in results(quadratic_attention, x).items():
        assert (found.cpu().double() - expected[name]).norm() <= 2e-2 * expected[name].norm(), name


q = torch.randn(1, 10, 2, 16)
REFUSED = {
    "bounds after the first token": ({"cu_seqlens": torch.tensor([2, 10])}, ValueError, "cu_seqlens must run from 0"),
    "bounds before the last token": ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens must run from 0"),
    "falling bounds": ({"cu_seqlens": torch.tensor([0, 7, 5, 10])}, ValueError, "cu_seqlens must not decrease"),
    "float bounds": ({"cu_seqlens": torch.tensor([0.0, 10.0])}, TypeError, "cu_seqlens must be int32 or int64"),
    "a list of bounds": ({"cu_seqlens": [0, 10]}, TypeError, "cu_seqlens must be a dense tensor"),
    "growth": ({"log_decay": torch.tensor([0.1, 0.2])}, ValueError, "log_decay must be <= 0"),
    "one decay of two": ({"log_decay": torch.tensor([-0.1])}, ValueError, r"log_decay must be \[H\]"),
    "a decay with a gradient": ({"log_decay": torch.zeros(2, requires_grad=True)}, ValueError, "log_decay must not re"),
    "more keys than queries": ({"k": torch.randn(1, 12, 2, 16)}, ValueError, "k must have the shape of q"),
    "integers": ({"q": q.long(), "k": q.long(), "v": q.long()}, TypeError, "q must be one of torch.float64"),
}


@pytest.mark.parametrize(("change", "kind", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_arguments_are_refused(change, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        quadratic_attention(**{"q": q, "k": q, "v": q} | change)


def test_packed_batch_rows_are_refused():
    with pytest.raises(ValueError, match="B must be 1, got 2"):
        quadratic_attention(*q.expand(3, 2, -1, -1, -1), cu_seqlens=torch.tensor([0, 5, 10]))


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # PyTorch compiles its rules for forward mode with it
@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap, torch.func.jacfwd], ids=lambda x: x.__name__)
def test_transforms_are_refused(transform):
    with pytest.raises(NotImplementedError, match="quadratic_attention does not run under the transforms"):
        transform(lambda x: quadratic_attention(x, x, x).sum())(q if transform is not torch.vmap else q[None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_stay_float32_under_autocast(dtype):
    large, small = 150 * q, 1e-4 * q
    with torch.autocast("cpu", dtype):
        o = quadratic_attention(large, large, small)
    exact = quadratic_attention(*(x.to(dtype).double() for x in (large, large, small)))
    assert o.dtype == dtype
    torch.testing.assert_close(o.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3 * float(exact.abs().max()))


def test_one_tensor_may_be_query_key_and_value():
    """The compiler takes no tensor twice as an input of an autograd function."""
    x = q.clone().requires_grad_()
    o = torch.compile(lambda x: quadratic_attention(x, x, x), fullgraph=True, backend="aot_eager")(x)
    expected = quadratic_attention(x, x, x)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(torch.autograd.grad(o.sum(), x), torch.autograd.grad(expected.sum(), x))
