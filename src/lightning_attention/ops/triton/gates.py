"""Kernels of the gradients of gates, see `nn.gates`.

Names as in the other kernels: `i_` index, `o_` offsets, `b_` block; `N` tokens of width `W`, contiguous.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.primitives import jit

# Columns of a program, where columns do not depend on each other. A thread has 8 columns: 16 bytes in 16 bits.
BLOCK = 1024


def activated_parts_gradient(qkvu: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, du: Tensor) -> Tensor:
    dqkvu = torch.empty_like(qkvu)
    _launch(activated_parts_gradient_kernel, dq, qkvu=qkvu, dq=dq, dk=dk, dv=dv, du=du, dqkvu=dqkvu)
    return dqkvu


def product_gradient(vu: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dvu, y = torch.empty_like(vu), torch.empty_like(dy)
    _launch(product_gradient_kernel, dy, vu=vu, dy=dy, dvu=dvu, y=y)
    return dvu, y


def gated_norm_gradient(x: Tensor, u: Tensor, dy: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients; u may be a slice of the last dimension of a wider tensor."""
    dx, du, y = torch.empty_like(x), torch.empty_like(dy), torch.empty_like(dy)
    u = u.reshape(-1, u.shape[-1])  # a view of such a slice
    parts = {"u": u, "stride_ut": u.stride(0)}
    _launch(gated_norm_gradient_kernel, dy, in_one_block=True, x=x, **parts, dy=dy, dx=dx, du=du, y=y, eps=eps)
    return dx, du, y


def _launch(kernel: Any, of_width: Tensor, *, in_one_block: bool = False, **arguments: Any) -> None:
    """Launch programs for tokens of a tensor `[..., W]`, and for blocks of its columns or for all columns at once."""
    width = of_width.shape[-1]
    block = triton.next_power_of_2(width)
    block = block if in_one_block else min(block, BLOCK)
    grid = of_width.numel() // width, triton.cdiv(width, block)
    with torch.accelerator.device_index(of_width.device.index):
        kernel[grid](**arguments, W=width, BLOCK=block, num_warps=min(max(block // 256, 1), 16))


@jit
def activated_parts_gradient_kernel(qkvu, dq, dk, dv, du, dqkvu, W: tl.constexpr, BLOCK: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o_w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o_w < W
    o_x = i_n * W + o_w
    o_q = i_n * 4 * W + o_w
    tl.store(dqkvu + o_q, _silu_gradient(qkvu + o_q, dq + o_x, mask), mask=mask)
    tl.store(dqkvu + o_q + W, _silu_gradient(qkvu + o_q + W, dk + o_x, mask), mask=mask)
    tl.store(dqkvu + o_q + 2 * W, tl.load(dv + o_x, mask=mask), mask=mask)
    tl.store(dqkvu + o_q + 3 * W, tl.load(du + o_x, mask=mask), mask=mask)


@jit
def _silu_gradient(x, dy, mask):
    b_x = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_x)
    return tl.load(dy, mask=mask, other=0.0).to(tl.float32) * b_sigmoid * (1 + b_x * (1 - b_sigmoid))


@jit
def product_gradient_kernel(vu, dy, dvu, y, W: tl.constexpr, BLOCK: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o_w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o_w < W
    o_v = i_n * 2 * W + o_w
    b_v = tl.load(vu + o_v, mask=mask).to(tl.float32)
    b_u = tl.load(vu + o_v + W, mask=mask).to(tl.float32)
    b_dy = tl.load(dy + i_n * W + o_w, mask=mask).to(tl.float32)
    tl.store(dvu + o_v, b_dy * b_u, mask=mask)
    tl.store(dvu + o_v + W, b_dy * b_v, mask=mask)
    tl.store(y + i_n * W + o_w, b_v * b_u, mask=mask)


@jit
def gated_norm_gradient_kernel(x, u, dy, dx, du, y, stride_ut, eps, W: tl.constexpr, BLOCK: tl.constexpr):
    o_w = tl.arange(0, BLOCK)
    mask = o_w < W
    i_n = tl.program_id(0).to(tl.int64)
    o_x = i_n * W + o_w
    b_x = tl.load(x + o_x, mask=mask, other=0.0).to(tl.float32)
    b_u = tl.load(u + i_n * stride_ut + o_w, mask=mask, other=0.0).to(tl.float32)
    b_dy = tl.load(dy + o_x, mask=mask, other=0.0).to(tl.float32)
    rms = tl.rsqrt(tl.sum(b_x * b_x) / W + eps)
    b_n = b_x * rms
    b_dn = b_dy * b_u
    tl.store(dx + o_x, rms * (b_dn - b_n * (tl.sum(b_dn * b_n) / W)), mask=mask)
    tl.store(du + o_x, b_dy * b_n, mask=mask)
    tl.store(y + o_x, b_n.to(x.dtype.element_ty).to(tl.float32) * b_u, mask=mask)
