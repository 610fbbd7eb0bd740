"""Decoding steps of every backend against attention."""

from typing import Any

import pytest
import torch
from oracle import BACKENDS, Case, device_of, dtype_of, error, make_inputs

from lightning_attention import lightning_attention, lightning_attention_commit, lightning_attention_step

BACKENDS_AND_DTYPES = [
    *(
        (backend, dtype)
        for backend in ("chunked", "reference")
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    ),
    pytest.param("triton", torch.float32, marks=pytest.mark.triton),
    pytest.param("triton", torch.bfloat16, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("case", [Case(T=6), Case(T=6, slope=None, scale=0.5), Case(T=6, B=1, K=5, V=7)], ids=str)
def test_steps_of_one_token_equal_attention(backend, dtype, case):
    inputs = make_inputs(case, dtype).on(device_of(backend))
    exact = inputs.to(torch.float64)
    expected = lightning_attention(
        *exact.qkv, exact.log_decay, output_final_state=True, backend="reference", **exact.options()
    )
    state = inputs.state.clone()
    outputs = [
        lightning_attention_step(q, k, v, inputs.log_decay, state=state, scale=case.scale, backend=backend)
        for q, k, v in zip(inputs.q.unbind(1), inputs.k.unbind(1), inputs.v.unbind(1), strict=True)
    ]
    rounding = torch.finfo(dtype).eps
    assert error(torch.stack(outputs, dim=1), expected.output) <= rounding
    assert expected.final_state is not None
    assert error(state, expected.final_state) <= 4 * torch.finfo(state.dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_step_of_several_tokens_equals_attention(backend):
    inputs = make_inputs(Case(T=5), dtype_of(backend)).on(device_of(backend))
    exact = inputs.to(torch.float64)
    expected = lightning_attention(*exact.qkv, exact.log_decay, output_final_state=True, **exact.options())
    state = inputs.state.clone()
    o = lightning_attention_step(*inputs.qkv, inputs.log_decay, state=state, backend=backend)
    rounding = 4 * torch.finfo(state.dtype).eps
    assert error(o, expected.output) < rounding
    assert expected.final_state is not None
    assert error(state, expected.final_state) < rounding


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    "slots",
    [(0, 1, 2, 3), (6, 5, 4, 3), (4, -1, 5, 9), (9, 2, 7, 0), (-1, -1, -1, -1)],
    ids=["one run", "reversed", "two runs and padding", "scattered", "padding"],
)
@pytest.mark.parametrize("head_dim", [8, 64])
def test_slots_in_any_order_are_updated_and_other_memory_is_not(slots, tokens, head_dim):
    """Runs of consecutive slots, with large states, are updated in place."""
    inputs = make_inputs(Case(B=4, T=tokens, H=8, K=head_dim, V=head_dim), torch.float64)
    size = 8 * head_dim**2
    memory = torch.randn(10, 3 * size, dtype=torch.float64)
    expected_pool = memory[:, size : 2 * size].unflatten(1, (8, head_dim, head_dim)).clone()
    before, pool = memory.clone(), memory[:, size : 2 * size].unflatten(1, (8, head_dim, head_dim))
    q, k, v = inputs.qkv if tokens > 1 else [x[:, 0] for x in inputs.qkv]
    options: dict[str, Any] = {"state_indices": torch.tensor(slots)}
    o = lightning_attention_step(q, k, v, inputs.log_decay, state=pool, backend="chunked", **options)
    expected = lightning_attention_step(q, k, v, inputs.log_decay, state=expected_pool, backend="reference", **options)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(pool, expected_pool)
    for part in (slice(0, size), slice(2 * size, 3 * size)):
        assert torch.equal(memory[:, part], before[:, part])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_batch_rows_use_only_their_slots(backend, tokens):
    """Batch rows of padding (-1) give zeros; other slots do not change."""
    inputs = make_inputs(Case(B=4, T=tokens), dtype_of(backend)).on(device_of(backend))
    exact = inputs.to(torch.float64)
    pool = torch.randn_like(inputs.state[:1]).expand(6, -1, -1, -1).clone()
    before, indices = pool.clone(), torch.tensor([5, -1, 0, 2], device=pool.device)
    o = lightning_attention_step(*inputs.qkv, inputs.log_decay, state=pool, state_indices=indices, backend=backend)
    batch_rows, slots = torch.tensor([0, 2, 3]), torch.tensor([5, 0, 2])
    expected = lightning_attention(
        exact.q[batch_rows],
        exact.k[batch_rows],
        exact.v[batch_rows],
        exact.log_decay,
        initial_state=before[slots].double(),
        output_final_state=True,
    )
    rounding = 4 * torch.finfo(pool.dtype).eps
    assert error(o[batch_rows], expected.output) < rounding
    assert torch.equal(o[1], torch.zeros_like(o[1]))
    assert expected.final_state is not None
    assert error(pool[slots], expected.final_state) < rounding
    others = torch.tensor([1, 3, 4])
    assert torch.equal(pool[others], before[others])


# Slots that batch rows read, of 9, and those that receive the states after 4 tokens.
SAVED = {
    "its own among them": ([5, 2, 0], [[1, 5, -1, 3], [-1, -1, -1, 4], [0, 6, 7, 8]]),
    "one for all": ([5, 5, 5], [[1, 0, -1, 3], [-1, -1, -1, 4], [2, 6, 7, 8]]),
    "padding": ([5, -1, 0], [[1, 5, -1, 3], [-1, -1, -1, -1], [0, 6, 7, 8]]),
    "none": ([5, 2, 0], [[-1] * 4] * 3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slots", SAVED.values(), ids=SAVED)
@pytest.mark.parametrize("pool_dtype", [None, torch.bfloat16], ids=["float32", "bfloat16 pool"])
def test_states_after_tokens_are_saved_in_slots(backend, slots, pool_dtype):
    """Equal to steps of one token on copies of the states; other slots do not change."""
    inputs = make_inputs(Case(B=3, T=4), dtype_of(backend)).on(device_of(backend))
    read, saved = (torch.tensor(x, dtype=torch.int32, device=inputs.q.device) for x in slots)
    pool = torch.randn_like(inputs.state[:1]).expand(9, -1, -1, -1).clone()
    pool = pool if pool_dtype is None or pool.dtype == torch.float64 else pool.to(pool_dtype)
    expected_pool, states = pool.clone(), pool[read.clamp_min(0).long()].to(inputs.state.dtype)
    expected = torch.zeros_like(inputs.v)
    for t in range(4):
        q, k, v = (x[:, t] for x in inputs.qkv)
        expected[:, t] = lightning_attention_step(q, k, v, inputs.log_decay, state=states, backend=backend)
        is_saved = (saved[:, t] >= 0) & (read >= 0)
        expected_pool[saved[:, t][is_saved].long()] = states[is_saved].to(pool.dtype)
    expected[read < 0] = 0
    options: dict[str, Any] = {"state": pool, "state_indices": read, "saved_indices": saved}
    o = lightning_attention_step(*inputs.qkv, inputs.log_decay, backend=backend, **options)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(pool, expected_pool)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_after_one_token_is_saved_in_a_slot(backend):
    inputs = make_inputs(Case(B=2, T=1), dtype_of(backend)).on(device_of(backend))
    before, expected_state = inputs.state.clone(), inputs.state.flip(0).clone()
    pool = torch.cat([before, torch.zeros_like(before)])
    q, k, v = (x[:, 0] for x in inputs.qkv)
    read, saved = torch.tensor([1, 0], device=q.device), torch.tensor([3, -1], device=q.device)
    o = lightning_attention_step(q, k, v, state=pool, state_indices=read, saved_indices=saved, backend=backend)
    expected = lightning_attention_step(q, k, v, state=expected_state, backend=backend)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(pool[3], expected_state[0])
    assert torch.equal(pool[:2], before)
    assert not pool[2].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_are_saved_without_indices_of_what_is_read(backend):
    inputs = make_inputs(Case(B=2, T=3), dtype_of(backend)).on(device_of(backend))
    state, expected = inputs.state.clone(), inputs.state.clone()
    saved = torch.tensor([[-1, -1, 0], [-1, -1, 1]], device=state.device)
    options: dict[str, Any] = {"log_decay": inputs.log_decay, "backend": backend}
    o = lightning_attention_step(*inputs.qkv, state=state, saved_indices=saved, **options)
    torch.testing.assert_close(o, lightning_attention_step(*inputs.qkv, state=expected, **options))
    torch.testing.assert_close(state, expected)


WRONG_SLOTS = [
    ([0, 1], [[2, 2], [3, 4]], ValueError, "saved_indices must differ, since a slot keeps one state"),
    ([0, 1], [[2, 3], [3, 4]], ValueError, "saved_indices must differ, since a slot keeps one state"),
    (
        [0, 1],
        [[2, 1], [3, 4]],
        ValueError,
        "batch row 0 must not hold slot 1, which batch row 1 reads",
    ),
    ([0, 1], [[2, 5], [3, 4]], ValueError, r"saved_indices must be -1 or in \[0, 5\), got 2 to 5"),
    ([0, 1], [[2, -2], [3, 4]], ValueError, r"saved_indices must be -1 or in \[0, 5\), got -2 to 4"),
    ([0, 1], [2, 3], ValueError, r"saved_indices must be \[B, T\] = \[2, 2\], got shape \(2,\)"),
    ([0, 1], [[2.0, 1.0], [3.0, 4.0]], TypeError, "saved_indices must be int32 or int64, got torch.float32"),
]


@pytest.mark.parametrize(("read", "saved", "kind", "message"), WRONG_SLOTS, ids=[x[3][:50] for x in WRONG_SLOTS])
def test_wrong_slots_of_saved_states_are_refused(read, saved, kind, message):
    x, pool = torch.randn(2, 2, 1, 4), torch.zeros(5, 1, 4, 4)
    indices: dict[str, Any] = {"state_indices": torch.tensor(read), "saved_indices": torch.tensor(saved)}
    with pytest.raises(kind, match=message):
        lightning_attention_step(x, x, x, state=pool, **indices)
    assert not pool.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_strides_of_the_state_do_not_matter(backend, tokens):
    inputs = make_inputs(Case(T=tokens), dtype_of(backend)).on(device_of(backend))
    state = inputs.state.transpose(2, 3).contiguous().transpose(2, 3)
    expected = inputs.state.clone()
    options = {"log_decay": inputs.log_decay, "backend": backend}
    o = lightning_attention_step(*inputs.qkv, state=state, **options)
    rounding = 4 * torch.finfo(state.dtype).eps
    assert error(lightning_attention_step(*inputs.qkv, state=expected, **options), o.double()) < rounding
    assert error(state, expected.double()) < rounding


def test_states_larger_than_the_caches_of_a_cpu_are_updated_in_parts():
    inputs = make_inputs(Case(B=9, T=1, H=4, K=256, V=512), torch.float64)
    q, k, v = (x[:, 0] for x in inputs.qkv)
    state, expected = inputs.state.clone(), inputs.state.clone()
    assert state.nbytes > 32 << 20
    o = lightning_attention_step(q, k, v, inputs.log_decay, state=state, scale=0.5)
    for row in range(9):
        one = slice(row, row + 1)
        of_row = lightning_attention_step(q[one], k[one], v[one], inputs.log_decay, state=expected[one], scale=0.5)
        torch.testing.assert_close(o[one], of_row)
    torch.testing.assert_close(state, expected)


def test_an_empty_batch_gives_an_empty_output():
    q = torch.randn(0, 2, 4)
    indices = torch.zeros(0, dtype=torch.int32)
    o = lightning_attention_step(q, q, q, state=torch.zeros(3, 2, 4, 4), state_indices=indices)
    assert o.shape == q.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", ["step", "commit"])
def test_a_state_that_a_backward_pass_needs_is_not_updated_unnoticed(backend, function):
    inputs = make_inputs(Case(T=3), dtype_of(backend)).on(device_of(backend))
    q, k, v = inputs.qkv
    o = lightning_attention(q.requires_grad_(), k, v, initial_state=inputs.state, backend=backend).output
    with torch.no_grad():
        if function == "step":
            lightning_attention_step(q, k, v, state=inputs.state, backend=backend)
        else:
            last = torch.zeros(len(q), dtype=torch.int32, device=q.device)
            lightning_attention_commit(k, v, state=inputs.state, last=last, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_final_state_can_be_updated_in_place(backend):
    inputs = make_inputs(Case(T=3), dtype_of(backend)).on(device_of(backend))
    q, k, v = inputs.qkv
    final = lightning_attention(q.requires_grad_(), k, v, output_final_state=True, backend=backend).final_state
    assert final is not None
    with torch.no_grad():
        lightning_attention_step(q, k, v, state=final.detach(), backend=backend)
    final[0] = 0
    final.sum().backward()
    assert q.grad is not None
    assert not q.grad.any()  # q does not change the state


@pytest.mark.parametrize(("K", "V"), [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("tokens", [(), (1,), (3,)], ids=str)
def test_empty_heads_give_zeros_or_nothing(K, V, tokens):
    q, v = torch.randn(2, *tokens, 3, K), torch.randn(2, *tokens, 3, V)
    o = lightning_attention_step(q, q, v, state=torch.zeros(2, 3, K, V))
    assert torch.equal(o, torch.zeros_like(v))
