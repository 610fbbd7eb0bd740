"""The operators as PyTorch sees them: schemas, fake kernels, registration.

The name of the backend is an argument: a new backend is a line in `backends.py`, not an operator.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from . import transforms
from .backends import BACKENDS
from .problem import check_values, state_dtype

NAMESPACE = "lightning_attention"
# Dispatch keys of autocast, one for each type of device; the last is that of devices outside of PyTorch.
AUTOCAST_KEYS = [f"Autocast{name}" for name in ("CPU", "CUDA", "HPU", "MPS", "MTIA", "XLA", "XPU", "PrivateUse1")]


def _operator(fake: Callable, mutates_args: Iterable[str] = ()) -> Callable[[Callable], Callable]:
    """Register a function and its fake kernel; the operator takes the place of the function.

    `torch.library.custom_op` costs 45 µs a call, `define` and `impl` 3 µs.
    """

    def register(implementation: Callable) -> Callable:
        name = f"{NAMESPACE}::{implementation.__name__}"
        torch.library.define(name, torch.library.infer_schema(implementation, mutates_args=mutates_args))
        torch.library.impl(name, "CompositeExplicitAutograd", implementation)
        torch.library.register_fake(name, fake)
        operator = getattr(torch.ops.lightning_attention, implementation.__name__).default
        for key in AUTOCAST_KEYS:
            torch.library.impl(name, key, _without_autocast(operator))
        return operator

    return register


def _without_autocast(operator: Callable) -> Callable:
    """The kernel of an operator under autocast: products inside of it are of the inputs as they are given."""

    def call(x: Tensor, *arguments):
        with torch.autocast(x.device.type, enabled=False):
            return operator(x, *arguments)

    return call


def _fake_forward(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend):
    return _fake_output(v), _fake_state(q, v, cu_seqlens) if output_final_state else no_state(q)


def _fake_backward(q, k, v, do, log_decay, initial_state, d_final_state, cu_seqlens, scale, backend):
    d_initial_state = no_state(q) if initial_state is None else _fake_state(q, v, cu_seqlens)
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


def no_state(q: Tensor) -> Tensor:
    """An empty tensor in place of None, which an operator cannot return."""
    return torch.empty(0, dtype=state_dtype(q.dtype), device=q.device)


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
    check_values(q.shape[1], log_decay=log_decay, cu_seqlens=cu_seqlens)
    run = BACKENDS[backend].forward
    o, final_state = run(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state)
    return o, no_state(q) if final_state is None else final_state


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
    return dq, dk, dv, no_state(q) if initial_state is None or d_initial_state is None else d_initial_state


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
    check_values(q.shape[1], log_decay=log_decay, cu_seqlens=cu_seqlens, state_positions=state_positions)
    run = BACKENDS[backend].prefill
    return run(q, k, v, log_decay, initial_state, cu_seqlens, scale, state_positions)


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
    check_values(1, log_decay=log_decay, state_indices=state_indices, num_slots=state.shape[0])
    return BACKENDS[backend].step(q, k, v, log_decay, state, state_indices, scale)


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
    slots = {"state_indices": state_indices, "num_slots": state.shape[0]}
    check_values(q.shape[1], log_decay=log_decay, parents=parents, **slots)
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
    slots = {"state_indices": state_indices, "num_slots": state.shape[0]}
    check_values(k.shape[1], log_decay=log_decay, parents=parents, last=last, **slots)
    if k.numel():
        BACKENDS[backend].commit(k, v, log_decay, state, last, parents, state_indices)


# Operators without a gradient, with the dimension of heads of each output, counted from the last.
for _operator_without_gradient, _heads in ((step, (-2,)), (verify, (-2,)), (commit, ()), (prefill, (-2, -3, -3))):
    transforms.register_vmap(_operator_without_gradient, _heads)
