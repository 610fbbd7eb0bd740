"""Gradients of gates by kernels equal autograd's; modules that are not plain are called."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import HAS_GPU
from torch import Tensor, nn

from lightning_attention.nn import SimpleGLU, SimpleRMSNorm, gates

DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
# Widths below, at and above a block, and one that is no multiple of anything.
WIDTHS = 5, 24, 1000, 1024, 2100


def activated_parts(x: Tensor) -> Tensor:
    return torch.cat(gates._activated_parts(x), dim=-1)


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def gradients(function, inputs: list[Tensor], d_output: Tensor) -> list[Tensor]:
    """Gradients, and the output, in float64."""
    inputs = [x.double().requires_grad_() for x in inputs]
    output = function(*inputs)
    return [*torch.autograd.grad(output, inputs, d_output.double()), output.detach()]


def assert_rounded(given: list[Tensor], exact: list[Tensor]) -> None:
    """Results are exact but for a few roundings."""
    for x, y in zip(given, exact, strict=True):
        eps = torch.finfo(x.dtype).eps
        torch.testing.assert_close(x.double(), y, rtol=2 * eps, atol=4 * eps * float(y.abs().max()))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_of_kernels_equal_those_of_the_formula(width, dtype):
    parts, (d_q, d_k, d_v, d_u) = drawn(2, 3, 4 * width, dtype=dtype), drawn(4, 2, 3, width, dtype=dtype)
    exact = gradients(activated_parts, [parts], torch.cat([d_q, d_k, d_v, d_u], dim=-1))[:1]
    assert_rounded([gates.activated_parts_gradient(parts, d_q, d_k, d_v, d_u)], exact)

    halves, d_y = drawn(2, 3, 2 * width, dtype=dtype), drawn(2, 3, width, dtype=dtype)
    assert_rounded(gates.product_gradient(halves, d_y), gradients(gates._product, [halves], d_y))

    x, u = drawn(2, 2, 3, width, dtype=dtype)
    exact = gradients(lambda x, u: F.rms_norm(x, x.shape[-1:], eps=1e-6) * u, [x, u], d_y)
    assert_rounded(gates.gated_norm_gradient(x, u, d_y, 1e-6), exact)
    part_of_wider_rows = torch.cat([x, u, x], dim=-1)[..., width : 2 * width]
    assert_rounded(gates.gated_norm_gradient(x, part_of_wider_rows, d_y, 1e-6), exact)


@pytest.mark.triton
def test_gradients_that_are_not_contiguous():
    halves, d_y = drawn(3, 2, 8, dtype=torch.float32).transpose(0, 1), drawn(2, 4, 3, dtype=torch.float32).mT
    assert_rounded(gates.product_gradient(halves, d_y), gradients(gates._product, [halves], d_y))


@pytest.mark.triton
def test_no_tokens_give_empty_gradients():
    halves, d_y = drawn(2, 0, 8, dtype=torch.float32), drawn(2, 0, 4, dtype=torch.float32)
    assert [tuple(x.shape) for x in gates.product_gradient(halves, d_y)] == [(2, 0, 8), (2, 0, 4)]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_layers_on_a_gpu_have_the_gradients_of_a_cpu(dtype, is_compiled):
    """Both sublayers; what is kept for the backward pass has no product that a kernel computes again."""
    glu, norm, linear = SimpleGLU(64, 160), SimpleRMSNorm(), nn.Linear(64, 64, bias=False)

    def layers(x: Tensor) -> Tensor:
        q, k, v, u = gates.activated_parts(torch.cat([x, 2 * x, x.sin(), x], dim=-1))
        return glu(gates.gated_norm_linear(q * k + v, u, norm, linear))

    x, d_y = torch.randn(2, 33, 64), torch.randn(2, 33, 64)
    exact = run(layers, [glu.double(), linear.double()], x.double(), d_y.double())
    modules, x, d_y = [glu.float().cuda(), linear.float().cuda()], x.cuda(), d_y.cuda()
    function = torch.compile(layers, fullgraph=True) if is_compiled else layers
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        given = run(function, modules, x, d_y)
    for y, z in zip(given, exact, strict=True):
        error = (y.cpu().double() - z).norm() / z.norm()
        assert error < (2e-2 if dtype else 1e-5)


def run(function, modules, x: Tensor, d_y: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = 1 * function(x)  # a thread whose first operation is a product warns that it has no CUDA context
    leaves = [x, *(parameter for module in modules for parameter in module.parameters())]
    return [y, *torch.autograd.grad(y, leaves, d_y.to(y.dtype))]


@pytest.mark.gpu
def test_products_are_not_kept():
    glu, x = SimpleGLU(64, 160).cuda(), torch.randn(2, 33, 64, device="cuda")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        glu(x)
    sizes = [y.numel() for y in kept]
    assert 2 * 33 * 320 in sizes
    assert 2 * 33 * 160 not in sizes


@pytest.mark.gpu
def test_second_derivatives_are_refused():
    x = torch.randn(3, 64, device="cuda", requires_grad=True)
    (d_x,) = torch.autograd.grad(SimpleGLU(64, 32).cuda()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x.sum().backward()


def tripled(x: Any) -> Any:
    return 3 * x


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_modules_that_are_not_plain_are_called(device):
    glu, x = SimpleGLU(8, 16).to(device), torch.randn(2, 8, device=device)
    y = glu(x)
    handle = glu.out_proj.register_forward_hook(lambda module, inputs, output: tripled(output))
    torch.testing.assert_close(glu(x), 3 * y)
    handle.remove()
    doubled = Doubled(16, 8, bias=False, device=device)
    doubled.weight = glu.out_proj.weight
    glu.out_proj = doubled
    torch.testing.assert_close(glu(x), 2 * y)
    glu.out_proj = nn.Linear(16, 8, device=device)
    glu(x).sum().backward()
    assert glu.out_proj.bias.grad is not None
