"""The operators as PyTorch sees them: schemas, fake kernels, autocast, registration.

The name of the backend is an argument: a new backend is a line in `backends.py`, not an operator.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import cross_entropy, transforms
from .backends import check_metadata, choose_by_chunk_size, prepare
from .calls import call
from .inputs import (
    AppendInputs,
    AttentionInputs,
    DecodingInputs,
    FoldInputs,
    GradientInputs,
    PrefillInputs,
    SlotPrefillInputs,
)
from .problem import Problem, state_dtype
from .values import check_distinct_slots

NAMESPACE = "lightning_attention"
# Arguments that operators share, in the order of `AttentionInputs` and `DecodingInputs`.
ATTENTION = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens"
DECODING = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor state, Tensor? state_indices"
DECODING_IN_PLACE = DECODING.replace("Tensor state", "Tensor(a!) state")
SLOT_PREFILL = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor(a!) state, Tensor? cu_seqlens, Tensor? state_indices, "
    "Tensor? has_initial_state, Tensor? state_positions, Tensor? saved_indices"
)
RING = "Tensor(a!) state, Tensor(b!) keys, Tensor(c!) values, Tensor(d!) count"
RINGS = f"Tensor q, Tensor k, Tensor v, Tensor? log_decay, {RING}"
RINGS_READ = re.sub(r"\(\w!\)", "", RINGS)
SEQUENCES = "Tensor? state_indices, Tensor? has_initial_state, Tensor? cu_seqlens, Tensor? lengths"
# Dispatch keys of autocast, one for each type of device; the last is that of devices outside of PyTorch.
AUTOCAST_KEYS = [f"Autocast{name}" for name in ("CPU", "CUDA", "HPU", "MPS", "MTIA", "XLA", "XPU", "PrivateUse1")]


def register(signature: str, fake: Callable, num_factors: int = 0) -> Callable[[Callable], Any]:
    """Register a function and its fake kernel; the operator takes the place of the function.

    Its first `num_factors` arguments are factors of products, which autocast casts.
    `torch.library.custom_op` costs 45 µs a call, `define` and `impl` 2 µs.
    """

    def decorate(implementation: Callable) -> Any:
        name = f"{NAMESPACE}::{implementation.__name__}"
        torch.library.define(name, signature)
        torch.library.impl(name, "CompositeExplicitAutograd", implementation)
        torch.library.register_fake(name, fake)
        operator = getattr(torch.ops.lightning_attention, implementation.__name__).default
        for key in AUTOCAST_KEYS if num_factors else ():
            torch.library.impl(name, key, partial(_under_autocast, operator, num_factors))
        return operator

    return decorate


# For operators of q, k and v.
_operator = partial(register, num_factors=3)


def _under_autocast(operator: Callable, num_factors: int, *arguments):
    """The kernel of an operator under autocast: products inside of it are of factors as `autocast` returns them."""
    factors = autocast(*arguments[:num_factors])
    with torch.autocast(factors[0].device.type, enabled=False):
        return operator(*factors, *arguments[num_factors:])


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the device of x; None if it is off."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Inputs as PyTorch's own matrix products get them: under autocast cast to its dtype, except float64."""
    dtype = autocast_dtype(inputs[0])
    if dtype is None:
        return inputs
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in inputs)


def _mark_updated(state: Tensor) -> None:
    """Tell autograd, which may have saved the state for a backward pass, that a kernel has written to it."""
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)


# Fakes check what is traced. The backend is chosen when the operator runs: sizes that decide are no guards.
def _fake_forward(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend, invariant=False):
    check_metadata("forward", AttentionInputs(q, k, v, log_decay, initial_state, cu_seqlens), backend)
    return [_fake_output(v), *([_fake_state(q, v, cu_seqlens)] if output_final_state else [])]


def _fake_backward(q, k, v, log_decay, initial_state, cu_seqlens, do, d_final_state, scale, backend, invariant=False):
    d_initial_state = [] if initial_state is None else [_fake_state(q, v, cu_seqlens)]
    return [_fake_output(q), _fake_output(k), _fake_output(v), *d_initial_state]


def _fake_prefill(q, k, v, log_decay, initial_state, cu_seqlens, state_positions, scale, backend):
    x = PrefillInputs(q, k, v, log_decay, initial_state, cu_seqlens, state_positions)
    check_metadata("prefill", x, backend)
    state = _fake_state(q, v, cu_seqlens)
    return _fake_output(v), state, state.new_empty(q.shape[0], state_positions.shape[0], *state.shape[1:])


def _fake_prefill_(q, k, v, *others):
    *slots, _, backend = others
    check_metadata("prefill_", SlotPrefillInputs(q, k, v, *slots), backend)
    return _fake_output(v)


def _fake_step(q, k, v, log_decay, state, state_indices, scale, backend, saved_indices=None):
    check_metadata(
        "step", DecodingInputs(q, k, v, log_decay, state, state_indices, saved_indices=saved_indices), backend
    )
    return _fake_output(v)


def _fake_verify(q, k, v, log_decay, state, state_indices, parents, scale, backend):
    check_metadata("verify", DecodingInputs(q, k, v, log_decay, state, state_indices, parents), backend)
    return _fake_output(v)


def _fake_commit(q, k, v, log_decay, state, state_indices, parents, last, backend):
    check_metadata("commit", DecodingInputs(q, k, v, log_decay, state, state_indices, parents, last), backend)


def _fake_append(q, k, v, *others):
    *x, _, backend = others
    x = AppendInputs(q, k, v, *x)
    choose_by_chunk_size(backend, Problem.of_append(x), x.keys.shape[2])
    return _fake_output(v)


def _fake_fold(log_decay, state, keys, values, count, state_indices, backend):
    x = FoldInputs(keys, values, state, count, log_decay, state_indices)
    choose_by_chunk_size(backend, Problem.of_fold(x), x.keys.shape[2])


def _fake_linear_cross_entropy(x, weight, labels, ignore_index, needs_dx, needs_dweight):
    dtype = cross_entropy.accumulation_dtype(x.dtype)
    dx = [_fake_output(x)] if needs_dx else []
    dweight = [weight.new_empty(weight.shape, dtype=dtype)] if needs_dweight else []
    return [x.new_empty((), dtype=dtype), *dx, *dweight]


def _fake_output(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    num_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty(num_sequences, q.shape[2], q.shape[3], v.shape[3], dtype=state_dtype(q.dtype))


@_operator(
    f"({ATTENTION}, float scale, bool output_final_state, str backend, bool invariant=False) -> Tensor[]", _fake_forward
)
def forward(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, backend, invariant=False):
    """`[o, final_state]`, or `[o]`."""
    x = AttentionInputs(q, k, v, log_decay, initial_state, cu_seqlens)
    return call(prepare, x, "forward", backend, scale, output_final_state, invariant)


@_operator(
    f"({ATTENTION}, Tensor do, Tensor? d_final_state, float scale, str backend, bool invariant=False) -> Tensor[]",
    _fake_backward,
)
def backward(q, k, v, log_decay, initial_state, cu_seqlens, do, d_final_state, scale, backend, invariant=False):
    """`[dq, dk, dv, d_initial_state]`, or `[dq, dk, dv]`."""
    x = GradientInputs(q, k, v, log_decay, initial_state, cu_seqlens, do, d_final_state)
    return call(prepare, x, "backward", backend, scale, invariant)


@_operator(
    f"({ATTENTION}, Tensor state_positions, float scale, str backend) -> (Tensor, Tensor, Tensor)", _fake_prefill
)
def prefill(q, k, v, log_decay, initial_state, cu_seqlens, state_positions, scale, backend):
    x = PrefillInputs(q, k, v, log_decay, initial_state, cu_seqlens, state_positions)
    return tuple(call(prepare, x, "prefill", backend, scale))


@_operator(f"({SLOT_PREFILL}, float scale, str backend) -> Tensor", _fake_prefill_)
def prefill_(q, k, v, log_decay, state, *others):
    *slots, scale, backend = others
    (o,) = call(prepare, SlotPrefillInputs(q, k, v, log_decay, state, *slots), "prefill_", backend, scale)
    _mark_updated(state)
    return o


@_operator(f"({DECODING_IN_PLACE}, float scale, str backend, Tensor? saved_indices=None) -> Tensor", _fake_step)
def step(q, k, v, log_decay, state, state_indices, scale, backend, saved_indices=None):
    x = DecodingInputs(q, k, v, log_decay, state, state_indices, saved_indices=saved_indices)
    (o,) = call(prepare, x, "step", backend, scale)
    _mark_updated(state)
    return o


@_operator(f"({DECODING}, Tensor? parents, float scale, str backend) -> Tensor", _fake_verify)
def verify(q, k, v, log_decay, state, state_indices, parents, scale, backend):
    (o,) = call(prepare, DecodingInputs(q, k, v, log_decay, state, state_indices, parents), "verify", backend, scale)
    return o


@_operator(f"({DECODING_IN_PLACE}, Tensor? parents, Tensor last, str backend) -> ()", _fake_commit)
def commit(q, k, v, log_decay, state, state_indices, parents, last, backend):
    call(prepare, DecodingInputs(q, k, v, log_decay, state, state_indices, parents, last), "commit", backend)
    _mark_updated(state)


@_operator(f"({RINGS}, {SEQUENCES}, float scale, str backend) -> Tensor", _fake_append)
def append(*arguments):
    """Attend from decoding states, and add the tokens to them."""
    *x, scale, backend = arguments
    x = AppendInputs(*x)
    check_distinct_slots(x.state_indices)
    (o,) = call(prepare, x, "append", backend, scale, True)
    for part in (x.state, x.keys, x.values, x.count):
        _mark_updated(part)
    return o


@_operator(f"({RINGS_READ}, {SEQUENCES}, float scale, str backend) -> Tensor", _fake_append)
def attend(*arguments):
    """Attend from decoding states, which stay as they are."""
    *x, scale, backend = arguments
    (o,) = call(prepare, AppendInputs(*x), "append", backend, scale, False)
    return o


@register(f"(Tensor? log_decay, {RING}, Tensor? state_indices, str backend) -> ()", _fake_fold)
def fold(log_decay, state, keys, values, count, state_indices, backend):
    """Add the tokens of decoding states to their states."""
    x = FoldInputs(keys, values, state, count, log_decay, state_indices)
    check_distinct_slots(x.state_indices)
    call(prepare, x, "fold", backend)
    for part in (x.state, x.count):
        _mark_updated(part)


@register(
    "(Tensor x, Tensor weight, Tensor labels, int ignore_index, bool needs_dx, bool needs_dweight) -> Tensor[]",
    _fake_linear_cross_entropy,
    num_factors=2,
)
def linear_cross_entropy(x, weight, labels, ignore_index, needs_dx, needs_dweight):
    """`[loss, dx, dweight]`, without the gradients that are not needed."""
    return cross_entropy.loss_and_gradients(x, weight, labels, ignore_index, needs_dx, needs_dweight)


torch.library.register_autograd(
    f"{NAMESPACE}::linear_cross_entropy", cross_entropy.scale_gradients, setup_context=cross_entropy.save_gradients
)


# Operators without a gradient, with the dimension of heads of each output, counted from the last.
for _operator_without_gradient, _heads in (
    (backward, (-2, -2, -2, -3)),
    (step, (-2,)),
    (verify, (-2,)),
    (commit, ()),
    (prefill, (-2, -3, -3)),
    (prefill_, (-2,)),
):
    transforms.register_vmap(_operator_without_gradient, _heads)
for _operator_on_rings in (append, attend, fold):
    transforms.refuse_vmap(_operator_on_rings)
