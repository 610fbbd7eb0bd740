"""The gradient of the operator, for autograd and for the transforms of torch.func."""

import torch
from torch import Tensor

from . import custom_ops, transforms

NAME = "lightning_attention"
# Names of the arguments of `attention` and of the backward operator.
FORWARD = (
    "q",
    "k",
    "v",
    "log_decay",
    "initial_state",
    "cu_seqlens",
    "scale",
    "output_final_state",
    "backend",
    "backward_backend",
)
BACKWARD = ("q", "k", "v", "do", "log_decay", "initial_state", "d_final_state", "cu_seqlens", "scale", "backend")


def is_needed(*inputs: Tensor | None) -> bool:
    """True if `attention` has to be called in place of the forward operator."""
    return transforms.is_transformed() or need_gradients(*inputs)


def need_gradients(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    backend: str,
    backward_backend: str,
) -> tuple[Tensor, Tensor | None]:
    """The output, and the final state if it is asked for, with gradients."""
    arguments = q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend, backward_backend
    o, final_state = _apply_transformed(*arguments) if transforms.is_transformed() else _Attention.apply(*arguments)
    return o, final_state if output_final_state else None


class _Attention(torch.autograd.Function):
    """The old style, with `ctx` in `forward`, costs 9 µs a call; `setup_context`, which torch.func needs, 28."""

    @staticmethod
    def forward(
        ctx, q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend, backward_backend
    ):
        ctx.save_for_backward(q, k, v, log_decay, initial_state, cu_seqlens)
        ctx.scale, ctx.output_final_state, ctx.backend = scale, output_final_state, backward_backend
        ctx.set_materialize_grads(False)
        return custom_ops.forward(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend)

    @staticmethod
    def backward(ctx, do, d_final_state):
        differentiate = _Gradients.apply if torch.is_grad_enabled() else custom_ops.backward
        d_final_state = d_final_state if ctx.output_final_state else None
        return _gradients(differentiate, ctx.saved_tensors, do, d_final_state, ctx.scale, ctx.backend)


class _Gradients(torch.autograd.Function):
    """The backward operator, where its results are to be differentiated again."""

    @staticmethod
    def forward(ctx, *arguments):
        return custom_ops.backward(*arguments)

    @staticmethod
    def backward(ctx, *gradients):
        raise _no_second_derivative()


class _TransformedAttention(torch.autograd.Function):
    """`_Attention` for the transforms of torch.func."""

    @staticmethod
    def forward(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend, backward_backend):
        return custom_ops.forward(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale, ctx.output_final_state, _, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, do, d_final_state):
        d_final_state = d_final_state if ctx.output_final_state else None  # a transform makes one up
        return _gradients(_TransformedGradients.apply, ctx.saved_tensors, do, d_final_state, ctx.scale, ctx.backend)

    @staticmethod
    def jvp(ctx, *tangents):
        raise _no_forward_mode(FORWARD, tangents)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        rule = transforms.mapped_over_heads(NAME, _TransformedAttention.apply, FORWARD, (-2, -3))
        return rule(info, in_dims, *arguments)


class _TransformedGradients(torch.autograd.Function):
    """`_Gradients` for the transforms of torch.func."""

    @staticmethod
    def forward(q, k, v, do, log_decay, initial_state, d_final_state, cu_seqlens, scale, backend):
        return custom_ops.backward(q, k, v, do, log_decay, initial_state, d_final_state, cu_seqlens, scale, backend)

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


def _gradients(differentiate, tensors, do, d_final_state, scale, backend):
    """Gradients of the arguments of `forward` above, by a function of the arguments `BACKWARD`."""
    q, k, v, log_decay, initial_state, cu_seqlens = tensors
    do = torch.zeros_like(v) if do is None else do
    dq, dk, dv, d_initial_state = differentiate(
        q, k, v, do, log_decay, initial_state, d_final_state, cu_seqlens, scale, backend
    )
    return dq, dk, dv, None, None if initial_state is None else d_initial_state, None, None, None, None, None


@torch.compiler.disable(reason="lightning_attention under torch.func is not traced: it runs outside of the graph")
def _apply_transformed(q, k, v, log_decay, initial_state, *rest):
    if not transforms.is_functional():  # torch.func finds `jvp` by itself, at any level
        transforms.refuse_tangents(NAME, q=q, k=k, v=v, initial_state=initial_state)
    return _TransformedAttention.apply(q, k, v, log_decay, initial_state, *rest)


def _no_forward_mode(names, tangents) -> NotImplementedError:
    given = [name for name, tangent in zip(names, tangents, strict=True) if tangent is not None]
    return transforms.no_forward_mode(NAME, given[0] if given else names[0])


def _no_second_derivative() -> NotImplementedError:
    return NotImplementedError("lightning_attention has no second derivative")
