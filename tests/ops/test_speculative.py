"""Speculative decoding: `verify` and `commit` against decoding token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BACKENDS, Case, Inputs, device_of, dtype_of, error, make_inputs
from torch import Tensor

from lightning_attention import lightning_attention_commit, lightning_attention_step, lightning_attention_verify
from lightning_attention.ops.calls import call
from lightning_attention.ops.inputs import DecodingInputs

TREES = {
    "chain": None,
    "the same chain": [-1, 0, 1, 2, 3, 4, 5],
    "all after the state": [-1] * 7,
    "two chains": [-1, -1, 0, 1, 2, 3, 4],
    "a tree": [-1, 0, 0, 1, 1, 2, 5],
}
CASES = [Case(B=3, T=7), Case(B=3, T=7, K=5, V=20, scale=0.3), Case(B=3, T=7, K=40, V=16, slope=None)]


def tree(parents: list[int] | None, inputs: Inputs) -> Tensor | None:
    """Return parents `[B, T]` with one tree for all batch rows."""
    if parents is None:
        return None
    return torch.tensor(parents, device=inputs.q.device).expand(inputs.q.shape[0], -1).contiguous()


def path(parents: list[int] | None, draft: int) -> list[int]:
    return [] if draft < 0 else [*path(parents, draft - 1 if parents is None else parents[draft]), draft]


def decoded(inputs: Inputs, drafts: list[int], backend: str) -> tuple[Tensor | None, Tensor]:
    """Decode drafts one by one; return the last output and the state."""
    state, o = inputs.state.clone(), None
    for t in drafts:
        q, k, v = (x[:, t] for x in inputs.qkv)
        o = lightning_attention_step(q, k, v, inputs.log_decay, state=state, scale=inputs.scale, backend=backend)
    return o, state


def verified(inputs: Inputs, backend: str, **options) -> Tensor:
    before = inputs.state.clone()
    options = {"state": inputs.state, "scale": inputs.scale} | options
    o = lightning_attention_verify(*inputs.qkv, inputs.log_decay, backend=backend, **options)
    assert torch.equal(inputs.state, before)
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parents", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_verify_equals_decoding_the_ancestors(backend, case, parents):
    inputs = make_inputs(case, dtype_of(backend)).on(device_of(backend))
    o = verified(inputs, backend, parents=tree(parents, inputs))
    assert o.dtype == inputs.q.dtype
    exact = make_inputs(case, dtype_of(backend)).to(torch.float64)
    for t in range(case.T):
        expected, _ = decoded(exact, path(parents, t), "reference")
        assert expected is not None
        assert error(o[:, t], expected) < 8 * torch.finfo(o.dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parents", TREES.values(), ids=TREES.keys())
def test_commit_equals_decoding_the_accepted_drafts(backend, parents):
    """States are bit-identical; every batch row accepts another draft."""
    inputs = make_inputs(Case(B=4, T=7, K=12), dtype_of(backend)).on(device_of(backend))
    for lasts in ([-1, 0, 1, 2], [3, 4, 5, 6]):
        state = inputs.state.clone()
        last = torch.tensor(lasts, device=state.device)
        lightning_attention_commit(
            inputs.k, inputs.v, inputs.log_decay, state=state, last=last, parents=tree(parents, inputs), backend=backend
        )
        for b, draft in enumerate(lasts):
            _, expected = decoded(inputs, path(parents, draft), backend)
            assert torch.equal(state[b], expected[b])


@settings(max_examples=20, deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(0, 1000))
def test_chunked_equals_reference_for_any_tree(data, T, seed):
    """Every batch row has a tree of its own."""
    inputs = make_inputs(Case(B=2, T=T), seed=seed)
    parents = torch.tensor([[data.draw(st.integers(-1, t - 1)) for t in range(T)] for _ in range(2)])
    last = torch.tensor([data.draw(st.integers(-1, T - 1)) for _ in range(2)])
    outputs, states = [], []
    for backend in ("chunked", "reference"):
        outputs.append(verified(inputs, backend, parents=parents))
        states.append(inputs.state.clone())
        options = {"last": last, "parents": parents, "backend": backend}
        lightning_attention_commit(inputs.k, inputs.v, inputs.log_decay, state=states[-1], **options)
    assert error(*outputs) < 1e-13
    assert error(*states) < 1e-14


@pytest.mark.triton
@pytest.mark.parametrize("T", [1, 16, 17, 64])
def test_kernels_equal_reference_for_trees_of_many_drafts(T):
    inputs = make_inputs(Case(B=2, T=T, H=1), torch.float32)
    generator = torch.Generator().manual_seed(0)
    parents = torch.stack([torch.randint(-1, max(t, 0) or 1, (2,), generator=generator) for t in range(T)], dim=1)
    parents = torch.minimum(parents, torch.arange(T) - 1)
    expected = verified(inputs.to(torch.float64), "reference", parents=parents)
    gpu = inputs.on(device_of("triton"))
    o = verified(gpu, "triton", parents=parents.to(gpu.q.device))
    assert error(o, expected) < 1e-6
    state = gpu.state.clone()
    last = torch.tensor([T - 1, T // 2], device=state.device)
    options = {"last": last, "parents": parents.to(state.device), "backend": "triton"}
    lightning_attention_commit(gpu.k, gpu.v, gpu.log_decay, state=state, **options)
    for b, draft in enumerate(last.tolist()):
        _, after = decoded(gpu, path(parents[b].tolist(), draft), "triton")
        assert torch.equal(state[b], after[b])


@pytest.mark.triton
def test_chains_may_be_longer_than_trees():
    """Batch rows of padding give zeros; a free slot is full of NaN."""
    inputs = make_inputs(Case(B=2, T=70, H=1), torch.float32)
    expected = verified(inputs.to(torch.float64), "reference")
    inputs = inputs.on(device_of("triton"))
    assert error(verified(inputs, "triton"), expected) < 1e-6
    pool = torch.cat([torch.full_like(inputs.state[:1], float("nan")), inputs.state[:1]])
    options = {"state": pool, "state_indices": torch.tensor([1, -1], device=pool.device), "backend": "triton"}
    o = lightning_attention_verify(*inputs.qkv, inputs.log_decay, **options)
    assert error(o[:1], expected[:1]) < 1e-6
    assert torch.equal(o[1], torch.zeros_like(o[1]))


@pytest.mark.triton
def test_invalid_parents_are_not_read():
    """On a GPU `last` and `parents` are not checked. Beyond the parents of a batch row lie those of the next one."""
    from lightning_attention.ops.triton import decoding

    inputs = make_inputs(Case(B=2, T=4, H=1), torch.float32).on(device_of("triton"))
    states = []
    for others in ([-1, -1, -1, -1], [-1, 0, 1, 2], [9, 9, 9, 9]):
        parents = torch.tensor([[-1, 0, 9, 0], others], device=inputs.q.device)
        state, last = inputs.state.clone(), torch.tensor([7, -1], device=parents.device)
        drafts = DecodingInputs(*inputs.qkv, inputs.log_decay, state, None, parents, last)
        call(decoding.commit, drafts)
        call(decoding.verify, drafts, 1.0)
        states.append(state)
    assert all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parents", [None, [-1, 0, 0]], ids=["chain", "tree"])
def test_batch_rows_use_only_their_slots(backend, parents):
    """Padding gives zeros; NaN in free slots does not spread."""
    inputs = make_inputs(Case(B=4, T=3), dtype_of(backend)).on(device_of(backend))
    pool = torch.full_like(inputs.state[:1], float("nan")).expand(7, -1, -1, -1).clone()
    indices = torch.tensor([5, -1, 0, 2], dtype=torch.int32, device=pool.device)
    batch_rows, slots = torch.tensor([0, 2, 3]), torch.tensor([5, 0, 2])
    pool[slots] = inputs.state[batch_rows]
    before, options = pool.clone(), {"parents": tree(parents, inputs), "state_indices": indices, "backend": backend}
    o = lightning_attention_verify(*inputs.qkv, inputs.log_decay, state=pool, **options)
    assert torch.equal(pool.nan_to_num(123.0), before.nan_to_num(123.0))
    expected = verified(inputs, backend, parents=tree(parents, inputs))
    assert torch.equal(o[1], torch.zeros_like(o[1]))
    assert error(o[batch_rows], expected[batch_rows].double()) < 8 * torch.finfo(o.dtype).eps
    last = torch.tensor([2, 2, -1, 1], device=pool.device)
    lightning_attention_commit(inputs.k, inputs.v, inputs.log_decay, state=pool, last=last, **options)
    for b, slot in ((0, 5), (3, 2)):
        assert torch.equal(pool[slot], decoded(inputs, path(parents, int(last[b])), backend)[1][b])
    assert torch.equal(pool[0], before[0])
    assert pool[[1, 3, 4, 6]].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_states_are_rounded_once_a_call(backend):
    """Arithmetic is float32; a state is rounded when it is stored, once a call."""
    inputs = make_inputs(Case(B=2, T=4), torch.float32).on(device_of(backend))
    kept = inputs.state.bfloat16()
    wide = kept.float()
    arguments = inputs.k, inputs.v, inputs.log_decay
    options = {"backend": backend}
    expected = lightning_attention_verify(inputs.q, *arguments, state=wide, **options)
    o = lightning_attention_verify(inputs.q, *arguments, state=kept, **options)
    assert error(o, expected.double()) < 1e-6
    last = torch.tensor([1, 3], device=kept.device)
    lightning_attention_commit(*arguments, state=kept, last=last, **options)
    lightning_attention_commit(*arguments, state=wide, last=last, **options)
    rounding = torch.finfo(torch.bfloat16).eps
    assert error(kept, wide.double()) < rounding
    wide = kept.float()
    o = lightning_attention_step(inputs.q, *arguments, state=kept, **options)
    assert error(o, lightning_attention_step(inputs.q, *arguments, state=wide, **options).double()) < 1e-6
    assert error(kept, wide.double()) < rounding


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    inputs = make_inputs(Case(B=2, T=4, H=2), dtype_of(backend)).on(device_of(backend))
    expected = verified(inputs, backend)
    q, k, v = torch.stack(inputs.qkv, dim=2).unbind(2)
    state = inputs.state.transpose(2, 3).contiguous().transpose(2, 3)
    o = lightning_attention_verify(q, k, v, inputs.log_decay, state=state, backend=backend)
    assert error(o, expected.double()) < 8 * torch.finfo(o.dtype).eps
    last = torch.tensor([0, 2], device=state.device)
    lightning_attention_commit(k, v, inputs.log_decay, state=state, last=last, backend=backend)
    for b, draft in enumerate(last.tolist()):
        after = decoded(inputs, path(None, draft), backend)[1][b]
        assert error(state[b], after.double()) < 8 * torch.finfo(state.dtype).eps


def test_no_drafts_leave_the_state_unchanged():
    inputs = make_inputs(Case(T=0))
    state = inputs.state.clone()
    assert verified(inputs, "chunked").shape == inputs.v.shape
    lightning_attention_commit(inputs.k, inputs.v, state=state, last=torch.tensor([-1, -1]))
    assert torch.equal(state, inputs.state)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_equals_eager():
    inputs = make_inputs(Case(T=3), torch.float32)
    parents, last = tree([-1, 0, 0], inputs), torch.tensor([2, 1])

    def both(q, k, v, log_decay, state):
        o = lightning_attention_verify(q, k, v, log_decay, state=state, parents=parents)
        lightning_attention_commit(k, v, log_decay, state=state, last=last, parents=parents)
        return o, state + 0

    arguments = *inputs.qkv, inputs.log_decay
    expected = both(*arguments, inputs.state.clone())
    found = torch.compile(both, fullgraph=True, backend="aot_eager")(*arguments, inputs.state.clone())
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


REFUSED = {
    "parents of another shape": (
        {"parents": torch.zeros(2, 3, dtype=torch.int32)},
        ValueError,
        r"parents must be \[B, T\] = \[2, 4\], got shape \(2, 3\)",
    ),
    "parents in float": ({"parents": torch.zeros(2, 4)}, TypeError, "parents must be int32 or int64"),
    "a parent after its draft": (
        {"parents": torch.tensor([[-1, 1, 0, 0]] * 2)},
        ValueError,
        r"parents must be -1 or the index of an earlier draft, got \[\[-1, 1, 0, 0\]",
    ),
    "a last draft out of range": ({"last": torch.tensor([0, 4])}, ValueError, r"last must be -1 or in \[0, 4\)"),
    "last of another shape": ({"last": torch.tensor([0])}, ValueError, r"last must be \[B\] = \[2\]"),
    "slots out of range": (
        {"state_indices": torch.tensor([0, 2])},
        ValueError,
        r"state_indices must be -1 or in \[0, 2\), got 0 to 2",
    ),
    "a state in float16": ({"state": torch.zeros(2, 3, 16, 16).half()}, TypeError, "state must be torch.float32 or"),
}


@pytest.mark.parametrize(("change", "kind", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_arguments_are_refused(change, kind, message):
    inputs = make_inputs(Case(T=4), torch.float32)
    options = {"state": inputs.state, "last": torch.tensor([0, 0])} | change
    with pytest.raises(kind, match=message):
        lightning_attention_commit(inputs.k, inputs.v, inputs.log_decay, **options)
    if "last" not in change:
        del options["last"]
        with pytest.raises(kind, match=message):
            lightning_attention_verify(*inputs.qkv, inputs.log_decay, **options)


def test_chunked_equals_reference_for_a_tree_of_more_than_64_drafts():
    inputs = make_inputs(Case(B=1, T=70, H=1))
    parents = (torch.arange(70)[None] - 3).clamp_min(-1)
    expected = verified(inputs, "reference", parents=parents)
    assert error(verified(inputs, "chunked", parents=parents), expected) < 1e-13


def test_gradients_are_refused():
    x, state = torch.zeros(1, 3, 1, 4), torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="lightning_attention_commit keeps no gradient"):
        lightning_attention_commit(x.requires_grad_(), x, state=state, last=torch.tensor([0]))
