"""The gradient of the operator, for autograd and for the transforms of torch.func."""

from typing import Any

import torch
from torch import Tensor

from . import custom_ops, transforms
from .inputs import AttentionInputs, GradientInputs

NAME = "lightning_attention"
# Names of the arguments of the functions below.
INPUTS = AttentionInputs._fields
FORWARD = (*INPUTS, "scale", "output_final_state", "backend", "invariant")
BACKWARD = (*GradientInputs._fields, "scale", "backend", "invariant")


def is_needed(*inputs: Tensor | None) -> bool:
    """True if `attention` has to be called in place of the forward operator."""
    return transforms.is_transformed() or need_gradients(*inputs)


def need_gradients(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in inputs])  # noqa: C419 (faster than a generator)


def refuse_gradient(log_decay: Tensor | None) -> None:
    if log_decay is not None and log_decay.requires_grad and torch.is_grad_enabled():
        raise ValueError("log_decay must not require a gradient: none is computed for it; pass log_decay.detach()")


def attention(q, k, v, log_decay, *rest) -> tuple[Tensor, ...]:
    """The output, and the final state if it is asked for, with gradients; takes the arguments `FORWARD`."""
    refuse_gradient(log_decay)
    arguments = *distinct(*custom_ops.autocast(q, k, v)), log_decay, *rest
    if transforms.is_transformed():
        from .compiler import transformed_attention

        return transformed_attention(*arguments)
    return _Attention.apply(*arguments)


def distinct(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of tensors that occur twice, which the compiler refuses as inputs of an autograd function."""
    if torch.compiler.is_compiling():
        k, v = (k.view_as(k) if k is q else k), (v.view_as(v) if v is q or v is k else v)
    return q, k, v


class _Attention(torch.autograd.Function):
    """The old style, with `ctx` in `forward`, costs 9 µs a call; `setup_context`, which torch.func needs, 28."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments[: len(INPUTS)])
        ctx.scale, _, *ctx.options = arguments[len(INPUTS) :]
        ctx.set_materialize_grads(False)
        return tuple(custom_ops.forward(*arguments))

    @staticmethod
    def backward(ctx, *gradients):
        differentiate = _Gradients.apply if torch.is_grad_enabled() else custom_ops.backward
        return _gradients(differentiate, ctx, *gradients)


class _Gradients(torch.autograd.Function):
    """The backward operator, where its results are to be differentiated again."""

    @staticmethod
    def forward(ctx, *arguments):
        return tuple(custom_ops.backward(*arguments))

    @staticmethod
    def backward(ctx, *gradients):
        raise _no_second_derivative()


class TransformedAttention(torch.autograd.Function):
    """`_Attention` for the transforms of torch.func. The compiler counts the parameters of `forward`."""

    @staticmethod
    def forward(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend, invariant):
        x = q, k, v, log_decay, initial_state, cu_seqlens
        return tuple(custom_ops.forward(*x, scale, output_final_state, backend, invariant))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[: len(INPUTS)])
        ctx.scale, _, *ctx.options = inputs[len(INPUTS) :]

    @staticmethod
    def backward(ctx, *gradients):
        return _gradients(_TransformedGradients.apply, ctx, *gradients)

    @staticmethod
    def jvp(ctx, *tangents):
        raise _no_forward_mode(FORWARD, tangents)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        rule = transforms.mapped_over_heads(NAME, TransformedAttention.apply, FORWARD, (-2, -3))
        return rule(info, in_dims, *arguments)


class _TransformedGradients(torch.autograd.Function):
    """`_Gradients` for the transforms of torch.func."""

    @staticmethod
    def forward(q, k, v, log_decay, initial_state, cu_seqlens, do, d_final_state, scale, backend, invariant):
        x = q, k, v, log_decay, initial_state, cu_seqlens
        return tuple(custom_ops.backward(*x, do, d_final_state, scale, backend, invariant))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *gradients):
        raise _no_second_derivative()

    @staticmethod
    def jvp(ctx, *tangents):
        raise _no_forward_mode(BACKWARD, tangents)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        rule = transforms.mapped_over_heads(NAME, _TransformedGradients.apply, BACKWARD, (-2, -2, -2, -3))
        return rule(info, in_dims, *arguments)


def _gradients(differentiate: Any, ctx: Any, do: Tensor | None, d_final_state: Tensor | None = None) -> tuple:
    """Gradients of the arguments `FORWARD`, by a function of the arguments `BACKWARD`."""
    saved = ctx.saved_tensors
    do = torch.zeros_like(saved[2]) if do is None else do
    dq, dk, dv, *d_initial_state = differentiate(*saved, do, d_final_state, ctx.scale, *ctx.options)
    return dq, dk, dv, None, d_initial_state[0] if d_initial_state else None, None, None, None, None, None


def _no_forward_mode(names, tangents) -> NotImplementedError:
    given = [name for name, tangent in zip(names, tangents, strict=True) if tangent is not None]
    return transforms.no_forward_mode(NAME, given[0] if given else names[0])


def _no_second_derivative() -> NotImplementedError:
    return NotImplementedError("lightning_attention has no second derivative")
