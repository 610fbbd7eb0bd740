"""torch.func and forward mode: results of plain autograd, or an error that says what is not supported."""

import sys
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_attention import (
    lightning_attention,
    lightning_attention_commit,
    lightning_attention_prefill,
    lightning_attention_prefill_,
    lightning_attention_step,
    lightning_attention_verify,
)

B, T, H, D, M = 2, 5, 3, 4, 3
LOG_DECAY = -torch.tensor([0.1, 0.5, 2.0])
# PyTorch itself compiles its rules for forward mode with the deprecated torch.jit.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script")
SHAPES = ((B, T, H, D), (B, T, H, D), (B, T, H, D), (B, H, D, D))
ALL = (0, 1, 2, 3)
Result = TypeVar("Result")


def inputs(*mapped: int) -> tuple[Tensor, ...]:
    """Return q, k, v and an initial state."""
    return tuple(torch.randn(*mapped, *shape, dtype=torch.float64) for shape in SHAPES)


def loss(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor) -> Tensor:
    o, state = lightning_attention(q, k, v, LOG_DECAY, initial_state=initial_state, output_final_state=True)
    assert state is not None
    return o.sin().sum() + state.cos().sum()


def gradients(*given: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in given]
    return torch.autograd.grad(loss(*leaves), leaves)


def each(function: Callable[..., Result], given: tuple[Tensor, ...]) -> list[Result]:
    return [function(*sample) for sample in zip(*(x.unbind() for x in given), strict=True)]


def test_grad_and_vjp_equal_autograd():
    given = inputs()
    expected = gradients(*given)
    torch.testing.assert_close(torch.func.grad(loss, argnums=ALL)(*given), expected)
    value, pull, *_ = torch.func.vjp(loss, *given)
    torch.testing.assert_close(value, loss(*given))
    torch.testing.assert_close(pull(torch.ones_like(value)), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.grad(loss, argnums=ALL)(*given), expected)


def test_grad_of_packed_sequences_equals_autograd():
    q, k, v, _ = (x[:1] for x in inputs())
    cu_seqlens = torch.tensor([0, 2, 2, 5])

    def packed(q: Tensor) -> Tensor:
        return lightning_attention(q, k, v, LOG_DECAY, cu_seqlens=cu_seqlens).output.sin().sum()

    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(packed)(q), torch.autograd.grad(packed(leaf), leaf)[0])


def test_jacrev_equals_the_jacobian():
    q, k, v, _ = inputs()

    def output(q: Tensor) -> Tensor:
        return lightning_attention(q, k, v, LOG_DECAY).output

    torch.testing.assert_close(torch.func.jacrev(output)(q), torch.autograd.functional.jacobian(output, q))


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (0, None, 2, None), (None, 1, None, 3)], ids=str)
def test_vmap_equals_separate_calls(in_dims):
    mapped, single = inputs(M), inputs()
    given = [m.movedim(0, dim) if dim is not None else s for m, s, dim in zip(mapped, single, in_dims, strict=True)]
    samples = [
        tuple(m[i] if dim is not None else s for m, s, dim in zip(mapped, single, in_dims, strict=True))
        for i in range(M)
    ]
    torch.testing.assert_close(torch.vmap(loss, in_dims)(*given), torch.stack([loss(*sample) for sample in samples]))


def test_vmap_over_decays_equals_separate_calls():
    q, k, v, _ = inputs()
    decays = -torch.rand(M, H)
    mapped = torch.vmap(lambda log_decay: lightning_attention(q, k, v, log_decay).output)(decays)
    torch.testing.assert_close(mapped, torch.stack([lightning_attention(q, k, v, x).output for x in decays]))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_per_sample_gradients_equal_separate_gradients(compiled):
    given = inputs(M)
    call = torch.vmap(torch.func.grad(loss, argnums=ALL))
    call = torch.compile(call, backend="aot_eager") if compiled else call
    expected = tuple(torch.stack(x) for x in zip(*each(gradients, given), strict=True))
    torch.testing.assert_close(call(*given), expected)


@pytest.mark.parametrize("mapped", [False, True], ids=["grad", "vmap"])
def test_fullgraph_is_refused(mapped):
    """Transforms of the operator run outside of compiled graphs, which `fullgraph=True` does not allow."""
    torch._dynamo.reset()  # forgets frames that earlier tests left to eager
    call = torch.func.grad(loss, argnums=ALL)
    compiled = torch.compile(torch.vmap(call) if mapped else call, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"lightning_attention under torch\.func is not traced"):
        compiled(*inputs(*[M] * mapped))


def test_gradients_through_vmap_equal_separate_gradients():
    given = inputs(M)
    expected = tuple(torch.stack(x) for x in zip(*each(gradients, given), strict=True))

    def total(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor) -> Tensor:
        return torch.vmap(loss)(q, k, v, initial_state).sum()

    torch.testing.assert_close(torch.func.grad(total, argnums=ALL)(*given), expected)
    leaves = [x.clone().requires_grad_() for x in given]
    torch.testing.assert_close(torch.autograd.grad(total(*leaves), leaves), expected)


def test_vmap_over_sequence_bounds_is_refused():
    q, k, v, _ = (x[:1] for x in inputs())
    bounds = torch.tensor([[0, 2, 5], [0, 3, 5]])
    with pytest.raises(NotImplementedError, match=r"cannot be mapped over cu_seqlens by torch\.vmap"):
        torch.vmap(lambda x: lightning_attention(q, k, v, cu_seqlens=x).output)(bounds)


def second(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor) -> Tensor:
    return torch.func.grad(lambda q: torch.func.grad(loss)(q, k, v, initial_state).sum())(q)


@pytest.mark.parametrize(
    "transform",
    [second, torch.func.jacrev(torch.func.jacrev(loss)), torch.func.jacrev(torch.func.grad(loss))],
    ids=["grad-grad", "jacrev-jacrev", "jacrev-grad"],
)
def test_second_derivatives_are_refused(transform):
    with pytest.raises(NotImplementedError, match="lightning_attention has no second derivative"):
        transform(*inputs())


def test_weights_of_gradients_have_derivatives():
    """The derivative of a weighted sum of gradients in its weights needs no second derivative of the operator."""
    given = inputs()
    weighted = torch.func.grad(lambda w: (torch.func.grad(loss)(*given) * w).sum())
    torch.testing.assert_close(weighted(given[0]), gradients(*given)[0])


def attend(q, k, v, state):
    return lightning_attention(q, k, v, LOG_DECAY, initial_state=state).output


def prefill(q, k, v, state):
    return lightning_attention_prefill(q, k, v, LOG_DECAY, initial_state=state, state_positions=[2, 4]).states


def prefill_(q, k, v, state):
    exists = torch.tensor([True] * (len(q) - 1) + [False])
    return lightning_attention_prefill_(q, k, v, LOG_DECAY, state=state, has_initial_state=exists)


def step_to_slots(q, k, v, state):
    saved = torch.full(q.shape[:2], -1)
    saved[:, 1] = torch.arange(len(q))
    return lightning_attention_step(q, k, v, LOG_DECAY, state=state, saved_indices=saved)


def step(q, k, v, state):
    return lightning_attention_step(q, k, v, LOG_DECAY, state=state)


def step_token(q, k, v, state):
    return lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], LOG_DECAY, state=state)


def verify(q, k, v, state):
    return lightning_attention_verify(q, k, v, LOG_DECAY, state=state)


def commit(q, k, v, state):
    lightning_attention_commit(k, v, LOG_DECAY, state=state, last=torch.tensor([1, 3]))
    return state


OPERATORS = [attend, prefill, prefill_, step, step_to_slots, step_token, verify, commit]
operators = pytest.mark.parametrize("operator", OPERATORS, ids=[f.__name__ for f in OPERATORS])


@operators
@torch.no_grad()
def test_vmap_of_every_operator_equals_separate_calls(operator):
    given = inputs(M)
    expected = torch.stack(each(operator, tuple(x.clone() for x in given)))
    state = given[3].clone()
    torch.testing.assert_close(torch.vmap(operator)(*given[:3], state), expected)
    if operator in (prefill_, step, step_to_slots, step_token, commit):
        updated = given[3].clone()
        each(operator, (*given[:3], updated))
        torch.testing.assert_close(state, updated)


@pytest.mark.parametrize(
    "operator", [prefill_, step, step_to_slots, commit], ids=["prefill_", "step", "step_to_slots", "commit"]
)
@torch.no_grad()
def test_vmap_with_a_shared_state_is_refused(operator):
    *mapped, _ = inputs(M)
    with pytest.raises(NotImplementedError, match="updates state in place"):
        torch.vmap(operator, in_dims=(0, 0, 0, None))(*mapped, inputs()[3])


@operators
@forward_mode
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("index", ALL, ids=["q", "k", "v", "state"])
def test_tangents_are_refused(operator, index, grad):
    if operator is commit and index == 0:
        return  # it takes no q
    name = (*"qkv", "initial_state" if operator in (attend, prefill) else "state")[index]
    given = list(inputs())
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        given[index] = forward_ad.make_dual(given[index], torch.ones_like(given[index]))
        with pytest.raises(NotImplementedError, match=f"no forward-mode derivative .* and {name} has a tangent"):
            operator(*given)


@operators
@forward_mode
def test_a_tangent_of_log_decay_is_refused(operator, monkeypatch):
    with torch.no_grad(), forward_ad.dual_level():
        tangent = torch.ones_like(LOG_DECAY)
        monkeypatch.setattr(sys.modules[__name__], "LOG_DECAY", forward_ad.make_dual(LOG_DECAY, tangent))
        with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .* and log_decay has a tangent"):
            operator(*inputs())


@operators
@forward_mode
def test_forward_mode_is_refused(operator):
    given = inputs()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(operator, given, given)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jacfwd(operator, argnums=2)(*given)


@pytest.mark.parametrize(
    "transform",
    [
        lambda *given: torch.func.jvp(torch.func.grad(loss), given, given),
        lambda *given: torch.func.jvp(lambda q: torch.vmap(attend)(q, *inputs(B)[1:]), (q := inputs(B)[:1]), q),
        lambda *given: torch.vmap(lambda q: torch.func.jvp(loss, (q, *given[1:]), (q, *given[1:])))(inputs(M)[0]),
        torch.func.hessian(loss),
        lambda *given: torch.func.linearize(loss, *given),
    ],
    ids=["jvp-grad", "jvp-vmap", "vmap-jvp", "hessian", "linearize"],
)
@forward_mode
def test_nested_forward_mode_is_refused(transform):
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        transform(*inputs())


@forward_mode
def test_tangents_of_other_tensors_are_allowed():
    q, k, v, state = inputs()
    o = attend(q, k, v, state)
    value, tangent, *_ = torch.func.jvp(lambda x: attend(q, k, v, state) * x, (q,), (v,))
    torch.testing.assert_close(value, o * q)
    torch.testing.assert_close(tangent, o * v)


@operators
def test_inference_mode_keeps_results(operator):
    given = inputs()
    with torch.no_grad():
        expected = operator(*(x.clone() for x in given))
    with torch.inference_mode():
        torch.testing.assert_close(operator(*(x.clone() for x in given)), expected)


@pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
def test_vmap_over_gradients_of_the_output_equals_separate_gradients(packed):
    q, k, v, state = (x[:1].requires_grad_() for x in inputs())
    initial_state, cu_seqlens = (None, torch.tensor([0, 2, 5])) if packed else (state, None)
    o = lightning_attention(q, k, v, LOG_DECAY, initial_state=initial_state, cu_seqlens=cu_seqlens).output
    leaves = (q, k, v) if packed else (q, k, v, state)

    def pull(do: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(o, leaves, do, retain_graph=True)

    given = torch.randn(M, *o.shape, dtype=o.dtype)
    separate = [torch.stack(gradient) for gradient in zip(*map(pull, given), strict=True)]
    torch.testing.assert_close(list(torch.vmap(pull)(given)), separate)
