"""`lightning_attention` of every backend against its definition, and the properties of its results."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    BACKENDS,
    INTERPRETED,
    Case,
    assert_accurate,
    assert_state_is_float32_between_chunks,
    attention,
    definition,
    device_of,
    dtype_of,
    error,
    make_inputs,
    run,
)

from lightning_attention import lightning_attention
from lightning_attention.ops import reference
from lightning_attention.ops.chunked import CHUNK_SIZE
from lightning_attention.ops.problem import DTYPES
from lightning_attention.ops.tiles import CHUNKS_AT_ONCE, chunks_at_once

C = CHUNK_SIZE
# In float32 the reference, which adds tokens one by one, is less accurate than products of matrices.
BACKENDS_AND_DTYPES = [
    *(("chunked", dtype) for dtype in DTYPES),
    ("reference", torch.float64),
    ("reference", torch.bfloat16),
    *(pytest.param("triton", dtype, marks=pytest.mark.triton) for dtype in (torch.float32, torch.float16)),
    pytest.param("triton", torch.bfloat16, marks=pytest.mark.gpu),
]

CASES = [
    Case(),
    Case(state=False),
    Case(slope=None),
    Case(slope=8.0, T=C + 3),
    Case(slope=100.0, T=C + 3),
    Case(slope=1e-4, T=3 * C),
    Case(scale=0.3, T=C + 1),
    Case(T=0),
    Case(T=1),
    Case(B=0),
    Case(T=C),
    Case(T=2 * C - 1, H=1),
    Case(K=5, V=7),
    Case(K=192, V=1, T=C + 5),
    Case(K=1, V=96),
    Case(K=0, V=3),
    Case(K=3, V=0),
    Case(lengths=(5,)),
    Case(lengths=()),
    Case(lengths=(0, 0)),
    Case(lengths=(C, C, C), state=False),
    Case(lengths=(3, 0, C + 7, 1, 2 * C, 0), K=8, V=5),
    Case(lengths=(1, 2 * C + 1, 90), slope=50.0, scale=2.0),
    Case(lengths=(40, C + 2), slope=None),
    Case(lengths=(*(1,) * C, 0, 30, 2, C, 0, *(3,) * 20), H=1, K=4, V=3, scale=0.5),
    Case(lengths=(*(5,) * 30, 2 * C), H=1, state=False),
    Case(B=CHUNKS_AT_ONCE + 3, T=C + 1, H=1, K=3, V=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES, ids=str)
def test_matches_the_definition(backend, case, dtype):
    inputs = make_inputs(case, dtype).on(device_of(backend))
    if backend == "triton" and min(case.K, case.V) == 0:
        with pytest.raises(NotImplementedError, match="head sizes must be 1 to 256"):
            run(attention(backend), inputs)
        return
    if case.lengths == () or case.B == 0:
        o, state = attention(backend)(*inputs.qkv, inputs.log_decay, **inputs.options())
        assert o.shape == inputs.v.shape
        assert state.shape == inputs.d_final_state.shape
        return
    actual = run(attention(backend), inputs)
    assert actual["o"].dtype == dtype
    assert actual["o"].is_contiguous()
    assert actual["final_state"].dtype == inputs.d_final_state.dtype
    assert_accurate(actual, inputs)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *product(("chunked", "reference"), (torch.bfloat16, torch.float16)),
        pytest.param("triton", torch.float16, marks=pytest.mark.triton),
        pytest.param("triton", torch.bfloat16, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_state_is_float32_between_chunks(backend, dtype):
    assert_state_is_float32_between_chunks(backend, Case(B=1, T=16 * C, H=2, slope=1e-4, state=False), dtype)


sizes = st.integers(1, 12)
cases = st.builds(
    Case,
    B=st.integers(1, 3),
    T=st.integers(0, 2 * C + 3),
    H=st.integers(1, 3),
    K=sizes,
    V=sizes,
    lengths=st.none() | st.lists(st.integers(0, 9) | st.integers(0, C + 30), min_size=1, max_size=9).map(tuple),
    slope=st.none() | st.sampled_from([1e-3, 0.5, 3.0, 200.0]),
    state=st.booleans(),
)


@settings(max_examples=25, deadline=None)
@given(cases)
def test_chunked_equals_the_recurrence(case):
    inputs = make_inputs(case)
    exact = run(definition, inputs)
    for name, value in run(attention("chunked"), inputs).items():
        assert error(value, exact[name]) < 1e-12, name


# The interpreter takes about a second for a call and its gradients.
EXAMPLES = 10 if INTERPRETED else 25

PROPERTY_BACKENDS = ("chunked", pytest.param("triton", marks=pytest.mark.triton))


@pytest.mark.parametrize("backend", PROPERTY_BACKENDS)
@settings(max_examples=EXAMPLES, deadline=None)
@given(T=st.integers(1, 3 * C), data=st.data())
def test_two_calls_equal_one_call(backend, T, data):
    cut = data.draw(st.integers(0, T))

    def two_calls(q, k, v, log_decay, *, initial_state, **options):
        outputs, state = [], initial_state
        for at in (slice(0, cut), slice(cut, T)):
            o, state = attention(backend)(q[:, at], k[:, at], v[:, at], log_decay, initial_state=state, **options)
            outputs.append(o)
        return torch.cat(outputs, dim=1), state

    inputs = make_inputs(Case(T=T, B=1, H=2), dtype_of(backend)).on(device_of(backend))
    assert_accurate(run(two_calls, inputs), inputs)


@pytest.mark.parametrize("backend", PROPERTY_BACKENDS)
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5) | st.integers(0, 2 * C), min_size=1, max_size=9),
    permutation=st.permutations(range(9)),
)
def test_packed_equals_separate(backend, lengths, permutation):
    """Packed sequences are independent, so separate calls may have any order."""
    inputs = make_inputs(Case(lengths=tuple(lengths), H=1), dtype_of(backend)).on(device_of(backend))
    packed = run(attention(backend), inputs)
    order = [n for n in permutation if n < len(lengths)]
    assert inputs.cu_seqlens is not None
    bounds = inputs.cu_seqlens.tolist()

    def separate(q, k, v, log_decay, *, initial_state, cu_seqlens, scale):
        results = {}
        for n in order:
            at = slice(bounds[n], bounds[n + 1])
            results[n] = attention(backend)(
                q[:, at], k[:, at], v[:, at], log_decay, initial_state=initial_state[n : n + 1], scale=scale
            )
        in_order = [results[n] for n in range(len(lengths))]
        return torch.cat([o for o, _ in in_order], dim=1), torch.cat([state for _, state in in_order])

    rounding = 8 * torch.finfo(inputs.q.dtype).eps
    for name, value in run(separate, inputs).items():
        assert error(value, packed[name].double()) < rounding, name


@pytest.mark.parametrize("backend", PROPERTY_BACKENDS)
def test_permuting_the_batch_permutes_the_result(backend):
    inputs = make_inputs(Case(B=4, T=C + 9), torch.float32).on(device_of(backend))
    q, k, v = inputs.qkv
    order = torch.tensor([2, 0, 3, 1])
    straight, _ = lightning_attention(q, k, v, inputs.log_decay, backend=backend)
    permuted, _ = lightning_attention(q[order], k[order], v[order], inputs.log_decay, backend=backend)
    torch.testing.assert_close(permuted, straight[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decay_of_zero_keeps_only_the_current_token(backend):
    """A log_decay of -inf is λ = 0: a token attends to itself alone."""
    inputs = make_inputs(Case(T=C + 3), dtype_of(backend)).on(device_of(backend))
    forgets = torch.full((3,), -torch.inf, device=inputs.q.device)
    o, state = attention(backend)(*inputs.qkv, forgets, **inputs.options())
    q, k, v = (x.double() for x in inputs.qkv)
    rounding = 4 * torch.finfo(inputs.q.dtype).eps
    assert error(o, (q * k).sum(-1, keepdim=True) * v) < rounding
    assert error(state, k[:, -1, :, :, None] * v[:, -1, :, None, :]) < rounding
    assert error(reference.quadratic(q, k, v, forgets, 1.0), o.double()) < rounding


@given(num_chunks=st.integers(0, 100), H=st.integers(1, 100), device=st.sampled_from(["cpu", "cuda"]))
def test_chunks_at_once_fit_the_call_and_the_cache(num_chunks, H, device):
    at_once = chunks_at_once(num_chunks, H, 64 * 64, device)
    assert 1 <= at_once <= max(num_chunks, 1)
    assert at_once == 1 or device != "cpu" or at_once * H <= CHUNKS_AT_ONCE


def test_quadratic_equals_the_recurrence():
    inputs = make_inputs(Case(state=False, scale=0.5))
    o, _ = definition(*inputs.qkv, inputs.log_decay, **inputs.options())
    assert error(reference.quadratic(*inputs.qkv, inputs.log_decay, 0.5), o) < 1e-13


def assert_gradients_pass_gradcheck(backend: str, case: Case) -> None:
    inputs = make_inputs(case)
    leaves = [x.requires_grad_() for x in (*inputs.qkv, inputs.initial_state) if x is not None]

    def call(q, k, v, initial_state):
        options = inputs.options() | {"initial_state": initial_state}
        return attention(backend)(q, k, v, inputs.log_decay, **options)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("case", [Case(T=5, K=2, V=3), Case(lengths=(3, 0, 4), K=2, V=2, scale=0.5)], ids=str)
def test_gradients_pass_gradcheck(backend, case):
    assert_gradients_pass_gradcheck(backend, case)


@pytest.mark.parametrize(
    "case", [Case(B=1, T=C + 3, H=1, K=2, V=2), Case(lengths=(C + 2, 0, 3), H=1, K=1, V=2)], ids=str
)
def test_gradients_across_chunks_pass_gradcheck(case):
    assert_gradients_pass_gradcheck("chunked", case)


def test_gradients_of_output_and_state_add_up():
    """A loss of the output alone, and of the final state alone."""
    inputs = make_inputs(Case(T=C + 1))
    both = run(attention("chunked"), inputs)
    leaves = [x.requires_grad_() for x in inputs.qkv]
    parts = []
    for index, gradient in ((0, inputs.do), (1, inputs.d_final_state)):
        outputs = attention("chunked")(*inputs.qkv, inputs.log_decay, **inputs.options())
        parts.append(torch.autograd.grad(outputs[index], leaves, gradient, allow_unused=True))
    for name, of_output, of_state in zip(("dq", "dk", "dv"), *parts, strict=True):
        assert error(of_output + of_state, both[name]) < 1e-13, name


def test_second_derivatives_are_refused():
    inputs = make_inputs(Case())
    q = inputs.q.requires_grad_()
    o, _ = lightning_attention(q, inputs.k, inputs.v)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dq.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [None, (50, 0, C + 22)], ids=["fixed", "packed"])
def test_strides_do_not_matter(backend, lengths):
    """Head-first views, views of one projection, a broadcast head and an expanded gradient."""
    B, T, H, D = (2, C + 3, 3, 8) if lengths is None else (1, sum(lengths), 3, 8)
    new = {"dtype": dtype_of(backend), "device": device_of(backend)}
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths], device=new["device"]).cumsum(0)
    q = torch.randn(B, H, T, D, **new).transpose(1, 2)
    k = torch.randn(B, T, 3 * H * D, **new)[..., D : D + H * D].unflatten(-1, (H, D))
    v = torch.randn(B, T, 1, 2 * D, **new)[..., ::2].expand(-1, -1, H, -1)
    log_decay = -torch.rand(2 * H, device=new["device"])[::2]
    leaves = q, k, v
    copies = q_copy, k_copy, v_copy = q.double().contiguous(), k.double().contiguous(), v.double().contiguous()
    for x in (*leaves, *copies):
        x.requires_grad_()
    o, _ = lightning_attention(q, k, v, log_decay, cu_seqlens=cu_seqlens, backend=backend)
    expected, _ = attention("reference")(q_copy, k_copy, v_copy, log_decay, cu_seqlens=cu_seqlens)
    rounding = 8 * torch.finfo(new["dtype"]).eps
    assert error(o, expected) < rounding
    for actual, exact in zip(
        torch.autograd.grad(o.sum(), leaves), torch.autograd.grad(expected.sum(), copies), strict=True
    ):
        assert error(actual, exact) < rounding


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_element_is_written(backend):
    """PyTorch fills new memory with NaN in deterministic mode."""
    torch.use_deterministic_algorithms(True)
    try:
        for case in (Case(T=C + 1), Case(lengths=(2, 0, C + 1))):
            inputs = make_inputs(case, dtype_of(backend)).on(device_of(backend))
            for name, value in run(attention(backend), inputs).items():
                assert value.isfinite().all(), name
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", PROPERTY_BACKENDS)
def test_inputs_are_not_changed(backend):
    inputs = make_inputs(Case(T=C + 1, scale=0.5), dtype_of(backend)).on(device_of(backend))
    before = {name: value.clone() for name, value in vars(inputs).items() if isinstance(value, torch.Tensor)}
    run(attention(backend), inputs)
    for name, value in before.items():
        assert torch.equal(getattr(inputs, name), value), name


@pytest.mark.parametrize("backend", PROPERTY_BACKENDS)
def test_repeated_calls_are_bit_identical(backend):
    inputs = make_inputs(Case(T=3 * C + 5, H=4, K=32, V=32), torch.float32).on(device_of(backend))
    first, second = run(attention(backend), inputs), run(attention(backend), inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("backend", PROPERTY_BACKENDS)
def test_attention_is_causal(backend):
    inputs = make_inputs(Case(T=2 * C), torch.float32).on(device_of(backend))
    o, _ = lightning_attention(*inputs.qkv, inputs.log_decay, backend=backend)
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, C + 10 :], v[:, C + 10 :] = float("nan"), float("nan")
    poisoned, _ = lightning_attention(inputs.q, k, v, inputs.log_decay, backend=backend)
    assert torch.equal(poisoned[:, :C], o[:, :C])
