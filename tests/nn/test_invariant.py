"""Bits of a token do not depend on the other rows of a product, on a CPU."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attention.nn import (
    LRPE,
    CosFormerFeatures,
    EluFeatures,
    PositiveRandomFeatures,
    SimpleGLU,
    make_norm,
)
from lightning_attention.nn.invariant import invariant_functions

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
ROWS = 200  # of all tokens; no multiple of a block
SHARES = [(0, 1), (3, 4), (8, 10), (131, 134), (5, 10), (0, 7), (17, 25), (40, 53), (3, 68), (1, 200)]


@pytest.fixture(params=[1, 2, 16], ids="{}_threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def check_shares(function: Callable[[Tensor, Tensor], Tensor], *shape: int, dtype: torch.dtype) -> None:
    """Outputs and gradients of shares of the rows equal those of all rows."""
    x, positions = torch.randn(ROWS, *shape, dtype=dtype), torch.arange(ROWS)

    def results(rows: slice) -> tuple[Tensor, Tensor]:
        given = x[None, rows].clone().requires_grad_()
        with invariant_functions(given):
            y = function(given, positions[None, rows])
        y.backward(cotangents[rows].view_as(y).clone())
        assert given.grad is not None
        return y.detach()[0], given.grad[0]

    with torch.no_grad(), invariant_functions(x):
        cotangents = torch.randn_like(function(x[None], positions[None])[0])
    y, dx = results(slice(0, ROWS))
    for start, stop in SHARES:
        share_y, share_dx = results(slice(start, stop))
        assert torch.equal(share_y, y[start:stop]), (start, stop)
        assert torch.equal(share_dx, dx[start:stop]), (start, stop)


@DTYPES
@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [(192, 768), (512, 192), (192, 259), (24, 50), (259, 13), (17, 2), (1, 3), (1023, 31), (64, 50000)],
)
def test_linear(inputs, outputs, dtype, threads):
    weight = torch.randn(outputs, inputs, dtype=dtype)
    check_shares(lambda x, _: F.linear(x, weight), inputs, dtype=dtype)


@DTYPES
def test_linear_equals_that_of_torch(dtype):
    linear, x = nn.Linear(50, 30, dtype=dtype), torch.randn(2, 5, 50, dtype=dtype)
    with invariant_functions(x):
        y = linear(x)
    torch.testing.assert_close(y, linear(x))
    with invariant_functions(x):
        assert linear(x[:0]).shape == (0, 5, 30)
        assert linear(x[0, 0]).shape == (30,)


@DTYPES
def test_silu_equals_that_of_torch(dtype):
    x = torch.tensor([-1e4, -200, -90, -1.5, -1e-30, 0, 1e-30, 2, 90, 1e4], dtype=dtype, requires_grad=True)
    (dx,) = torch.autograd.grad(F.silu(x).sum(), x)
    with invariant_functions(x):
        y = F.silu(x)
    torch.testing.assert_close(y, F.silu(x))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], dx)


MODULES = {
    "silu": (lambda: lambda x, _: F.silu(x), (131,)),
    "simple-rms": (lambda: lambda x, _: make_norm("simple_rms", 192, 1e-6)(x), (192,)),
    "rms": (lambda: lambda x, _: make_norm("rms", 63, 1e-6)(x), (63,)),
    "layer": (lambda: lambda x, _: make_norm("layer", 100, 1e-6)(x), (100,)),
    "log-softmax": (lambda: lambda x, _: x.log_softmax(-1), (5003,)),
    "lrpe": (lambda: LRPE(3, 21), (3, 21)),
    "elu": (lambda: lambda x, t: EluFeatures(21)(x, t, is_query=True), (3, 21)),
    "cosformer": (lambda: lambda x, t: CosFormerFeatures(21, 1000)(x, t, is_query=True), (3, 21)),
    "performer-query": (lambda: lambda x, t: PositiveRandomFeatures(21, 48)(x, t, is_query=True), (3, 21)),
    "performer-key": (lambda: lambda x, t: PositiveRandomFeatures(21, 48)(x, t, is_query=False), (3, 21)),
}


@DTYPES
@pytest.mark.parametrize("name", MODULES)
def test_module(name, dtype, threads):
    make, shape = MODULES[name]
    torch.set_default_dtype(dtype)
    try:
        check_shares(make(), *shape, dtype=dtype)
    finally:
        torch.set_default_dtype(torch.float32)


@DTYPES
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_glu(activation, dtype, threads):
    glu = SimpleGLU(72, 1300, activation=activation).to(dtype)
    check_shares(lambda x, _: glu(x), 72, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "autocast", "message"),
    [(torch.bfloat16, False, "got torch[.]bfloat16"), (torch.float32, True, "got torch[.]bfloat16")],
    ids=["bfloat16", "autocast"],
)
def test_refused(dtype, autocast, message):
    x = torch.ones(2, 2, dtype=dtype)
    with torch.autocast("cpu", enabled=autocast), pytest.raises(ValueError, match=message):
        invariant_functions(x)
