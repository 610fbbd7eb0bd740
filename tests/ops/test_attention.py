import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, assert_accurate, definition, error, make_inputs, run
from torch import Tensor

from lightning_attention import lightning_attention
from lightning_attention.ops import reference
from lightning_attention.ops.chunked import CHUNK_SIZE
from lightning_attention.ops.problem import DTYPES

BACKENDS = ("chunked", "reference")
C = CHUNK_SIZE

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
]


def attention(backend):
    def call(q, k, v, log_decay, **options) -> tuple[Tensor, Tensor]:
        o, state = lightning_attention(q, k, v, log_decay, output_final_state=True, backend=backend, **options)
        assert state is not None
        return o, state

    return call


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    # In float32 the reference, which adds token after token, is less accurate than any product of matrices.
    [*(("chunked", dtype) for dtype in DTYPES), ("reference", torch.float64), ("reference", torch.bfloat16)],
    ids=str,
)
def test_matches_the_definition(backend, case, dtype):
    if case.lengths == () or case.B == 0:
        inputs = make_inputs(case, dtype)
        o, state = attention(backend)(inputs.q, inputs.k, inputs.v, inputs.log_decay, **inputs.options())
        assert o.shape == inputs.v.shape
        assert state.shape == inputs.d_final_state.shape
        return
    inputs = make_inputs(case, dtype)
    actual = run(attention(backend), inputs)
    assert actual["o"].dtype == dtype
    assert actual["o"].is_contiguous()
    assert actual["final_state"].dtype == inputs.d_final_state.dtype
    assert_accurate(actual, inputs)


sizes = st.integers(1, 12)
cases = st.builds(
    Case,
    B=st.integers(1, 3),
    T=st.integers(0, 2 * C + 3),
    H=st.integers(1, 3),
    K=sizes,
    V=sizes,
    lengths=st.none() | st.lists(st.integers(0, C + 30), min_size=1, max_size=4).map(tuple),
    slope=st.none() | st.sampled_from([1e-3, 0.5, 3.0, 200.0]),
    state=st.booleans(),
)


@settings(max_examples=25, deadline=None)
@given(cases)
def test_chunked_is_recurrent(case):
    inputs = make_inputs(case)
    exact = run(definition, inputs)
    for name, value in run(attention("chunked"), inputs).items():
        assert error(value, exact[name]) < 1e-12, name


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3 * C), st.data())
def test_pieces_are_the_whole(T, data):
    cut = data.draw(st.integers(0, T))
    inputs = make_inputs(Case(T=T))
    whole = run(attention("chunked"), inputs)

    def in_pieces(q, k, v, log_decay, *, initial_state, **options):
        pieces, state = [], initial_state
        for piece in (slice(0, cut), slice(cut, T)):
            o, state = attention("chunked")(
                q[:, piece], k[:, piece], v[:, piece], log_decay, initial_state=state, **options
            )
            pieces.append(o)
        return torch.cat(pieces, dim=1), state

    for name, value in run(in_pieces, inputs).items():
        assert error(value, whole[name]) < 1e-12, name


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2 * C), min_size=1, max_size=5), st.permutations(range(5)))
def test_packed_is_one_by_one(lengths, permutation):
    """Also in any order: packing is a set of independent sequences."""
    inputs = make_inputs(Case(lengths=tuple(lengths)))
    packed = run(attention("chunked"), inputs)
    order = [n for n in permutation if n < len(lengths)]
    assert inputs.cu_seqlens is not None
    bounds = inputs.cu_seqlens.tolist()

    def one_by_one(q, k, v, log_decay, *, initial_state, cu_seqlens, scale):
        results = {}
        for n in order:
            at = slice(bounds[n], bounds[n + 1])
            results[n] = attention("chunked")(
                q[:, at], k[:, at], v[:, at], log_decay, initial_state=initial_state[n : n + 1], scale=scale
            )
        in_order = [results[n] for n in range(len(lengths))]
        return torch.cat([o for o, _ in in_order], dim=1), torch.cat([state for _, state in in_order])

    for name, value in run(one_by_one, inputs).items():
        assert error(value, packed[name]) < 1e-12, name


def test_a_permuted_batch_is_a_permuted_result():
    inputs = make_inputs(Case(B=4, T=C + 9), torch.float32)
    q, k, v = inputs.q, inputs.k, inputs.v
    order = torch.tensor([2, 0, 3, 1])
    straight, _ = lightning_attention(q, k, v, inputs.log_decay)
    permuted, _ = lightning_attention(q[order], k[order], v[order], inputs.log_decay)
    torch.testing.assert_close(permuted, straight[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_that_forgets_at_once(backend):
    """log_decay of -inf is λ = 0: every token sees itself alone."""
    inputs = make_inputs(Case(T=C + 3))
    forgets = torch.full((3,), -torch.inf)
    o, state = attention(backend)(inputs.q, inputs.k, inputs.v, forgets, **inputs.options())
    q, k, v = inputs.q, inputs.k, inputs.v
    assert error(o, (q * k).sum(-1, keepdim=True) * v) < 1e-13
    assert error(state, k[:, -1, :, :, None] * v[:, -1, :, None, :]) < 1e-13
    assert error(reference.quadratic(q, k, v, forgets, 1.0), o) < 1e-13


def test_the_quadratic_form_is_the_recurrence():
    inputs = make_inputs(Case(state=False, scale=0.5))
    o, _ = definition(inputs.q, inputs.k, inputs.v, inputs.log_decay, **inputs.options())
    assert error(reference.quadratic(inputs.q, inputs.k, inputs.v, inputs.log_decay, 0.5), o) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [Case(T=5, K=2, V=3), Case(lengths=(3, 0, 4), K=2, V=2, scale=0.5)], ids=str)
def test_gradcheck(backend, case):
    inputs = make_inputs(case)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.initial_state) if x is not None]

    def call(q, k, v, initial_state):
        options = inputs.options() | {"initial_state": initial_state}
        return attention(backend)(q, k, v, inputs.log_decay, **options)

    assert torch.autograd.gradcheck(call, leaves)


def test_gradcheck_through_a_chunk_boundary(monkeypatch):
    monkeypatch.setattr("lightning_attention.ops.chunked.CHUNK_SIZE", 4)
    test_gradcheck("chunked", Case(B=1, T=10, H=2, K=2, V=3))
    test_gradcheck("chunked", Case(lengths=(9, 1, 0, 5), H=2, K=2, V=3))


def test_one_output_alone_has_a_gradient():
    """A loss of the output only, and of the final state only."""
    inputs = make_inputs(Case(T=C + 1))
    both = run(attention("chunked"), inputs)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    parts = []
    for index, gradient in ((0, inputs.do), (1, inputs.d_final_state)):
        outputs = attention("chunked")(inputs.q, inputs.k, inputs.v, inputs.log_decay, **inputs.options())
        parts.append(torch.autograd.grad(outputs[index], leaves, gradient, allow_unused=True))
    for name, of_output, of_state in zip(("dq", "dk", "dv"), *parts, strict=True):
        assert error(of_output + of_state, both[name]) < 1e-13, name


def test_a_second_derivative_is_refused():
    inputs = make_inputs(Case())
    q = inputs.q.requires_grad_()
    o, _ = lightning_attention(q, inputs.k, inputs.v)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dq.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [None, (50, 0, C + 22)], ids=["fixed", "packed"])
def test_any_strides(backend, lengths):
    """Head-first views, slices of one projection, a broadcast head and a gradient that is expanded."""
    B, T, H, D = (2, C + 3, 3, 8) if lengths is None else (1, sum(lengths), 3, 8)
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    q = torch.randn(B, H, T, D, dtype=torch.float64).transpose(1, 2)
    k = torch.randn(B, T, 3 * H * D, dtype=torch.float64)[..., D : D + H * D].unflatten(-1, (H, D))
    v = torch.randn(B, T, 1, 2 * D, dtype=torch.float64)[..., ::2].expand(-1, -1, H, -1)
    log_decay = -torch.rand(2 * H)[::2]
    leaves, copies = (q, k, v), (q.contiguous(), k.contiguous(), v.contiguous())
    for x in (*leaves, *copies):
        x.requires_grad_()
    o, _ = lightning_attention(q, k, v, log_decay, cu_seqlens=cu_seqlens, backend=backend)
    expected, _ = attention("reference")(*copies, log_decay, cu_seqlens=cu_seqlens)
    assert error(o, expected) < 1e-13
    for actual, exact in zip(
        torch.autograd.grad(o.sum(), leaves), torch.autograd.grad(expected.sum(), copies), strict=True
    ):
        assert error(actual, exact) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_element_is_written(backend):
    """PyTorch fills new memory with NaN in deterministic mode."""
    torch.use_deterministic_algorithms(True)
    try:
        for case in (Case(T=C + 1), Case(lengths=(2, 0, C + 1))):
            for name, value in run(attention(backend), make_inputs(case)).items():
                assert value.isfinite().all(), name
    finally:
        torch.use_deterministic_algorithms(False)


def test_inputs_are_left_alone():
    inputs = make_inputs(Case(T=C + 1, scale=0.5))
    before = {name: value.clone() for name, value in vars(inputs).items() if isinstance(value, torch.Tensor)}
    run(attention("chunked"), inputs)
    for name, value in before.items():
        assert torch.equal(getattr(inputs, name), value), name


def test_the_same_call_gives_the_same_bits():
    inputs = make_inputs(Case(T=3 * C + 5, H=4, K=32, V=32), torch.float32)
    first, second = run(attention("chunked"), inputs), run(attention("chunked"), inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_future_does_not_reach_the_past():
    inputs = make_inputs(Case(T=2 * C), torch.float32)
    o, _ = lightning_attention(inputs.q, inputs.k, inputs.v, inputs.log_decay)
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, C + 10 :], v[:, C + 10 :] = float("nan"), float("nan")
    poisoned, _ = lightning_attention(inputs.q, k, v, inputs.log_decay)
    assert torch.equal(poisoned[:, :C], o[:, :C])
