"""The operators as PyTorch sees them: schemas, fake kernels and autograd.

A backend is a module with `unsupported_reasons`, `forward`, `prefill`, `backward`, `step`, `verify` and `commit`; its
name travels as an argument, so a new backend adds a module and a line here, and no operator. It may have more:
`is_slow`; `step_token`, a step of one token `[B, H, D]` without slots; and `write_state` and `read_state_` for slices
of a sequence.
"""

from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import chunked, hopper, reference, transforms, triton
from .problem import Problem, check_drafts, check_log_decay, check_state_indices, check_state_positions, state_dtype

# In the order in which backend="auto" asks them.
BACKENDS = {"hopper": hopper, "triton": triton, "chunked": chunked, "reference": reference}


def choose_backend(name: str, problem: Problem) -> str:
    """The backend to run: the one named, or for "auto" the first that can and is not slow."""
    if name == "auto":
        for name, backend in BACKENDS.items():
            if not backend.unsupported_reasons(problem) and not _is_slow(backend, problem):
                return name
    if name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    if reasons := BACKENDS[name].unsupported_reasons(problem):
        raise NotImplementedError(f"backend {name!r} cannot run this: {'; '.join(reasons)}")
    return name


def _is_slow(backend: ModuleType, problem: Problem) -> bool:
    is_slow = getattr(backend, "is_slow", None)
    return is_slow is not None and is_slow(problem)


# What makes the launches of a call again, by the look of its arguments.
_replays: dict[tuple, Callable] = {}
MAX_REPLAYS = 1024


def recorded(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`; where its arguments look like earlier ones, no more than the launches that these made.

    So checks, choices and sizes cost an eager call on a GPU nothing. On other devices, and where operators have to be
    seen, the function is called.
    """
    if (look := _look(function, arguments)) is None:
        return function(*arguments)
    if replay := _replays.get(look):
        return replay(*arguments)
    result, replay = triton.record(function, *arguments)
    if replay:
        if len(_replays) == MAX_REPLAYS:
            _replays.clear()
        _replays[look] = replay
    return result


def _look(function: Callable, arguments: tuple[Any, ...]) -> tuple | None:
    """What of them is checked, and what launches depend on; None where nothing can be recorded."""
    x = arguments[0]
    if not x.is_cuda or _is_observed(x) or not triton.runs_on(x.device):
        return None
    looks = [
        (x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.data_ptr() % 16) if isinstance(x, Tensor) else x
        for x in arguments
    ]
    return function, triton.product_precision(x.dtype), *looks


def is_autocast_enabled(device_type: str) -> bool:
    """Also for meta, a device that autocast does not know."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _operator(fake: Callable, mutates_args: Iterable[str] = ()) -> Callable[[Callable], Callable]:
    """Registers a function and its fake, and returns what calls the operator.

    Unlike `custom_op` this wraps little, 6 µs a call instead of 45; and nothing where nobody would notice.
    """

    def register(implementation: Callable) -> Callable:
        def run(x: Tensor, *arguments):
            if not is_autocast_enabled(device_type := x.device.type):
                return implementation(x, *arguments)
            with torch.autocast(device_type, enabled=False):
                return implementation(x, *arguments)

        name = f"lightning_attention::{implementation.__name__}"
        torch.library.define(name, torch.library.infer_schema(implementation, mutates_args=mutates_args))
        torch.library.impl(name, "CompositeExplicitAutograd", run)
        torch.library.register_fake(name, fake)
        operator = getattr(torch.ops.lightning_attention, implementation.__name__).default

        def call(x: Tensor, *arguments):
            if _is_observed(x):
                return operator(x, *arguments)
            return run(x, *arguments) if is_autocast_enabled(x.device.type) else implementation(x, *arguments)

        return call

    return register


def _is_observed(x: Tensor) -> bool:
    """Whether somebody has to see operators: a compiler, a subclass, a mode, a transform or a profiler."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or transforms.is_transformed()
        or torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    )


def _fake_forward(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend):
    return _fake_output(v), _fake_state(q, v, cu_seqlens) if output_final_state else _no_state(q)


def _fake_backward(q, k, v, do, log_decay, initial_state, d_final_state, cu_seqlens, scale, backend):
    d_initial_state = _no_state(q) if initial_state is None else _fake_state(q, v, cu_seqlens)
    return _fake_output(q), _fake_output(k), _fake_output(v), d_initial_state


def _fake_step(q, k, v, log_decay, state, state_indices, scale, backend):
    return _fake_output(v)


def _fake_verify(q, k, v, log_decay, state, parents, state_indices, scale, backend):
    return _fake_output(v)


def _fake_commit(k, v, log_decay, state, last, parents, state_indices, backend):
    return None


def _fake_prefill(q, k, v, log_decay, initial_state, cu_seqlens, scale, state_positions, backend):
    state = _fake_state(q, v, cu_seqlens)
    return _fake_output(v), state, state.new_empty(q.shape[0], state_positions.shape[0], *state.shape[1:])


def _fake_output(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty(num_sequences, q.shape[2], q.shape[3], v.shape[3], dtype=state_dtype(q.dtype))


def _no_state(q: Tensor) -> Tensor:
    """An operator cannot return None."""
    return q.new_empty(0, dtype=state_dtype(q.dtype))


@_operator(_fake_forward)
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = BACKENDS[backend].forward
    o, final_state = run(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state)
    return o, _no_state(q) if final_state is None else final_state


@_operator(_fake_backward)
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    d_final_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = BACKENDS[backend].backward
    dq, dk, dv, d_initial_state = run(q, k, v, do, log_decay, initial_state, d_final_state, cu_seqlens, scale)
    return dq, dk, dv, _no_state(q) if initial_state is None else d_initial_state


@_operator(_fake_step, mutates_args=("state",))
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    check_log_decay(log_decay)
    check_state_indices(state_indices, state.shape[0])
    run = BACKENDS[backend]
    if q.dim() == 4:
        return run.step(q, k, v, log_decay, state, state_indices, scale)
    if state_indices is None and state.dtype == state_dtype(q.dtype) and hasattr(run, "step_token"):
        return run.step_token(q, k, v, log_decay, state, scale)
    q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    return run.step(q, k, v, log_decay, state, state_indices, scale).squeeze(1)


@_operator(_fake_verify)
def verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    parents: Tensor | None,
    state_indices: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    check_log_decay(log_decay)
    check_state_indices(state_indices, state.shape[0])
    check_drafts(parents, None, q.shape[1])
    return BACKENDS[backend].verify(q, k, v, log_decay, state, parents, state_indices, scale)


@_operator(_fake_commit, mutates_args=("state",))
def commit(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    last: Tensor,
    parents: Tensor | None,
    state_indices: Tensor | None,
    backend: str,
) -> None:
    check_log_decay(log_decay)
    check_state_indices(state_indices, state.shape[0])
    check_drafts(parents, last, k.shape[1])
    if k.numel():
        BACKENDS[backend].commit(k, v, log_decay, state, last, parents, state_indices)


@_operator(_fake_prefill)
def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    state_positions: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if state_positions.is_cpu:
        check_state_positions(state_positions.tolist(), q.shape[1])
    return BACKENDS[backend].prefill(q, k, v, log_decay, initial_state, cu_seqlens, scale, state_positions)


class _Attention(torch.autograd.Function):
    """The gradient of `forward`. Written in the old style, which takes 15 µs a call; with `setup_context` it is 42."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend):
        ctx.save_for_backward(q, k, v, log_decay, initial_state, cu_seqlens)
        ctx.scale, ctx.output_final_state, ctx.backend = scale, output_final_state, backend
        ctx.set_materialize_grads(False)
        return recorded(_forward, q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend)

    @staticmethod
    def backward(ctx, do, d_final_state):
        q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(v)
        if not ctx.output_final_state:  # the compiler makes one up
            d_final_state = None
        arguments = q, k, v, do, log_decay, initial_state, d_final_state, cu_seqlens, ctx.scale, ctx.backend
        differentiate = _Gradients.apply if torch.is_grad_enabled() else partial(recorded, _backward)
        dq, dk, dv, d_initial_state = differentiate(*arguments)
        return dq, dk, dv, None, d_initial_state, None, None, None, None


class _Gradients(torch.autograd.Function):
    """`backward`, where the gradients are to be differentiated again."""

    @staticmethod
    def forward(ctx, *arguments):
        return recorded(_backward, *arguments)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("lightning_attention has no second derivative")


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
) -> tuple[Tensor, Tensor | None]:
    """Checked, by the backend that is chosen, and with gradients where one is needed."""
    arguments = q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend
    if transforms.is_transformed():
        o, final_state = _apply_transformed(*arguments)
        return o, final_state if output_final_state else None
    differentiable = (q, k, v) if initial_state is None else (q, k, v, initial_state)
    if torch.is_grad_enabled() and any(x.requires_grad for x in differentiable):
        return _Attention.apply(*arguments)
    return recorded(_forward, *arguments)


def _forward(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend):
    problem = Problem.of_attention(q, k, v, log_decay, initial_state, cu_seqlens)
    backend = choose_backend(backend, problem)
    o, final_state = forward(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend)
    return o, final_state if output_final_state else None


def _backward(q, k, v, do, log_decay, initial_state, d_final_state, cu_seqlens, scale, backend):
    problem = Problem.of_attention(q, k, v, log_decay, initial_state, cu_seqlens)._replace(is_backward=True)
    backend = choose_backend(backend, problem)
    *gradients, d_initial_state = backward(
        q, k, v, do, log_decay, initial_state, d_final_state, cu_seqlens, scale, backend
    )
    return *gradients, None if initial_state is None else d_initial_state


NAME = "lightning_attention"
# Arguments of `forward` and `backward`.
FORWARD = ("q", "k", "v", "log_decay", "initial_state", "cu_seqlens", "scale", "output_final_state", "backend")
BACKWARD = ("q", "k", "v", "do", "log_decay", "initial_state", "d_final_state", "cu_seqlens", "scale", "backend")


class _TransformedAttention(torch.autograd.Function):
    """`forward` with its gradient, as the transforms of torch.func want one."""

    @staticmethod
    def forward(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend):
        o, final_state = _forward(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend)
        return o, _no_state(q) if final_state is None else final_state

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, log_decay, initial_state, cu_seqlens, ctx.scale, ctx.output_final_state, ctx.backend = inputs
        ctx.save_for_backward(q, k, v, log_decay, initial_state, cu_seqlens)

    @staticmethod
    def backward(ctx, do, d_final_state):
        q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
        if not ctx.output_final_state:
            d_final_state = None
        dq, dk, dv, d_initial_state = _TransformedGradients.apply(
            q, k, v, do, log_decay, initial_state, d_final_state, cu_seqlens, ctx.scale, ctx.backend
        )
        return dq, dk, dv, None, None if initial_state is None else d_initial_state, None, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        raise _no_forward_mode(FORWARD, tangents)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        rule = transforms.mapped_over_heads(NAME, _TransformedAttention.apply, FORWARD, (-2, -3))
        return rule(info, in_dims, *arguments)


class _TransformedGradients(torch.autograd.Function):
    """`backward`, which is not differentiated again."""

    @staticmethod
    def forward(q, k, v, do, log_decay, initial_state, d_final_state, cu_seqlens, scale, backend):
        *gradients, d_initial_state = _backward(
            q, k, v, do, log_decay, initial_state, d_final_state, cu_seqlens, scale, backend
        )
        return *gradients, _no_state(q) if d_initial_state is None else d_initial_state

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("lightning_attention has no second derivative")

    @staticmethod
    def jvp(ctx, *tangents):
        raise _no_forward_mode(BACKWARD, tangents)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        rule = transforms.mapped_over_heads(NAME, _TransformedGradients.apply, BACKWARD, (-2, -2, -2, -3))
        return rule(info, in_dims, *arguments)


@torch.compiler.disable(reason="lightning_attention under torch.func is not traced: it runs outside of the graph")
def _apply_transformed(q, k, v, log_decay, initial_state, *rest):
    if not transforms.is_functional():  # whose transforms find `jvp`, at any level
        transforms.refuse_tangents(NAME, q=q, k=k, v=v, initial_state=initial_state)
    return _TransformedAttention.apply(q, k, v, log_decay, initial_state, *rest)


def _no_forward_mode(names, tangents) -> NotImplementedError:
    given = [name for name, tangent in zip(names, tangents, strict=True) if tangent is not None]
    return transforms.no_forward_mode(NAME, given[0] if given else names[0])


# Operators without a gradient, and the dimension of heads of every output, counted from the last.
for _name, _heads in (("step", (-2,)), ("verify", (-2,)), ("commit", ()), ("prefill", (-2, -3, -3))):
    _overload = getattr(torch.ops.lightning_attention, _name).default
    transforms.refuse_forward_mode(_overload)
    transforms.register_vmap(_overload, _heads)
