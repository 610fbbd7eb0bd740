"""Elementwise functions between the products of a layer, with gradients of one kernel each on a GPU.

Such a kernel reads and writes every tensor once, where PyTorch's compiler takes twice as long. What a product would
keep for its backward pass is not kept: the kernel computes it again. On other devices, under transforms, and where a
module is not plain, these are the modules' own functions.
"""

from importlib.util import find_spec
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops import transforms
from ..ops.autograd import need_gradients
from ..ops.custom_ops import autocast, register
from .norms import SimpleRMSNorm

DTYPES = torch.float32, torch.float16, torch.bfloat16
HAS_TRITON = find_spec("triton") is not None


def activated_parts(qkvu: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`silu(q), silu(k), v, u`, of the quarters of `[..., 4 W]`."""
    return _ActivatedParts.apply(qkvu) if _has_kernels(qkvu) else _activated_parts(qkvu)


def gated_linear(vu: Tensor, linear: nn.Module) -> Tensor:
    """`linear(v ⊙ u)`, of the halves of `[..., 2 W]`."""
    weight = _weight(linear, vu)
    return linear(_product(vu)) if weight is None else _GatedLinear.apply(vu, weight)


def gated_norm_linear(x: Tensor, u: Tensor, norm: nn.Module, linear: nn.Module) -> Tensor:
    """`linear(norm(x) ⊙ u)`, of `[..., W]`."""
    weight = _weight(linear, x) if x.dtype == u.dtype and is_plain(norm, SimpleRMSNorm) else None
    return linear(norm(x) * u) if weight is None else _GatedNormLinear.apply(x, u, weight, norm.eps)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """True if the module's product with its weight may be computed without calling it."""
    return is_plain(module, nn.Linear) and module.bias is None and type(module.weight) is nn.Parameter


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if nothing replaces the module's `forward`, and no hook sees its inputs or outputs."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) is kind and not any(hooks) and "forward" not in vars(module)


def _weight(linear: nn.Module, x: Tensor) -> Tensor | None:
    """The weight as the product of x with it takes it, if kernels compute the gradient."""
    if not (_has_kernels(x) and is_plain_linear(linear)):
        return None
    (weight,) = autocast(linear.weight)
    return weight if weight.dtype == x.dtype else None


def _has_kernels(x: Tensor) -> bool:
    return HAS_TRITON and x.is_cuda and x.dtype in DTYPES and need_gradients(x) and not transforms.is_transformed()


def _activated_parts(qkvu: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, u = qkvu.chunk(4, dim=-1)
    return F.silu(q), F.silu(k), v, u


def _product(vu: Tensor) -> Tensor:
    v, u = vu.chunk(2, dim=-1)
    return v * u


class _ActivatedParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkvu):
        ctx.save_for_backward(qkvu)
        return _activated_parts(qkvu)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        (qkvu,) = ctx.saved_tensors
        return activated_parts_gradient(qkvu, *gradients)


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vu, weight):
        ctx.save_for_backward(vu, weight)
        return F.linear(_product(vu), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        vu, weight = ctx.saved_tensors
        dvu, y = product_gradient(vu, dz @ weight)
        return dvu, _weight_gradient(ctx, 1, dz, y)


class _GatedNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, u, weight, eps):
        ctx.save_for_backward(x, u, weight)
        ctx.eps = eps
        return F.linear(F.rms_norm(x, x.shape[-1:], eps=eps) * u, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        x, u, weight = ctx.saved_tensors
        dx, du, y = gated_norm_gradient(x, u, dz @ weight, ctx.eps)
        return dx, du, _weight_gradient(ctx, 2, dz, y), None


def _weight_gradient(ctx: Any, index: int, dz: Tensor, y: Tensor) -> Tensor | None:
    return dz.flatten(0, -2).mT @ y.flatten(0, -2) if ctx.needs_input_grad[index] else None


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register("(Tensor qkvu, Tensor dq, Tensor dk, Tensor dv, Tensor du) -> Tensor", lambda qkvu, *_: _like(qkvu))
def activated_parts_gradient(*x):
    """`d_qkvu`."""
    from ..ops.triton import gates

    return gates.activated_parts_gradient(*[y.contiguous() for y in x])


@register("(Tensor vu, Tensor dy) -> (Tensor, Tensor)", lambda vu, dy: (_like(vu), _like(dy)))
def product_gradient(vu, dy):
    """`d_vu`, and the product `y`."""
    from ..ops.triton import gates

    return gates.product_gradient(vu.contiguous(), dy.contiguous())


@register(
    "(Tensor x, Tensor u, Tensor dy, float eps) -> (Tensor, Tensor, Tensor)",
    lambda x, u, dy, eps: (_like(x), _like(u), _like(dy)),
)
def gated_norm_gradient(x, u, dy, eps):
    """`dx`, `du`, and the product `y`."""
    from ..ops.triton import gates

    u = u if u.stride(-1) == 1 else u.contiguous()
    return gates.gated_norm_gradient(x.contiguous(), u, dy.contiguous(), eps)
