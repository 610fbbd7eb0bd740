"""Decoding states in PyTorch: tokens appended in any pieces have the bits of one forward pass."""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_attention.ops import chunked, reference
from lightning_attention.ops.chunked import CHUNK_SIZE
from lightning_attention.ops.inputs import AppendInputs, AttentionInputs, FoldInputs, GradientInputs
from lightning_attention.ops.problem import Problem, state_dtype

C = CHUNK_SIZE
FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16
MODULES = {"chunked": chunked, "reference": reference}
modules = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


class Tokens(NamedTuple):
    """Tokens `[B, T, H, D]` of B sequences, and what goes with them."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None
    scale: float

    def forward(self) -> list[Tensor]:
        return chunked.forward(AttentionInputs(*self[:5], None), self.scale, True)


class Pool(NamedTuple):
    """Decoding states, as `AppendInputs` takes them."""

    state: Tensor
    keys: Tensor
    values: Tensor
    count: Tensor

    def clone(self) -> "Pool":
        return Pool(*(x.clone() for x in self))

    def equals(self, other: "Pool", slots: Any = slice(None)) -> bool:
        pairs = zip(self, other, strict=True)
        return all(torch.equal(x[slots].nan_to_num(7), y[slots].nan_to_num(7)) for x, y in pairs)


def make_tokens(B, T, H, K, V, dtype=FP32, slope: float | None = 0.5, state=True, scale=1.0) -> Tokens:
    q, k, v = (torch.randn(B, T, H, D).to(dtype) for D in (K, K, V))
    log_decay = None if slope is None else -slope * torch.rand(H)
    return Tokens(q, k, v, log_decay, torch.randn(B, H, K, V, dtype=state_dtype(dtype)) if state else None, scale)


def make_pool(x: Tokens, num_slots: int, storage: torch.dtype | None = None) -> Pool:
    """Slots that an earlier sequence has left full of NaN."""
    H, K, V = *x.q.shape[2:], x.v.shape[3]
    state = torch.full((num_slots, H, K, V), torch.nan, dtype=storage or state_dtype(x.q.dtype))
    keys, values = (torch.full((num_slots, H, C, D), torch.nan, dtype=x.q.dtype) for D in (K, V))
    return Pool(state, keys, values, torch.full((num_slots, H), C - 1, dtype=torch.int32))


def begin(x: Tokens, pool: Pool, slots: Tensor) -> Tensor | None:
    """Put the initial states into slots; `has_initial_state` if there are none."""
    if x.initial_state is None:
        return torch.zeros(len(slots), dtype=torch.bool)
    pool.state[slots], pool.count[slots] = x.initial_state.to(pool.state.dtype), 0
    return None


def append(
    x: Tokens, pool: Pool, slots: Tensor | None, has_state=None, module: Any = chunked, update=True, **options: Any
) -> Tensor:
    inputs = AppendInputs(*x[:4], *pool, slots, has_state, **options)
    return module.append(inputs, x.scale, update)[0]


def cut(x: Tokens, *at) -> Tokens:
    return x._replace(q=x.q[at], k=x.k[at], v=x.v[at])


sizes = st.sampled_from([(64, 64), (16, 8), (20, 33), (1, 3), (48, 96), (128, 128)])
problems = st.builds(
    lambda sizes, **rest: make_tokens(K=sizes[0], V=sizes[1], **rest),
    sizes,
    B=st.integers(1, 5),
    T=st.sampled_from([1, C - 1, C, C + 1, 2 * C]) | st.integers(1, 4 * C),
    H=st.integers(1, 4),
    dtype=st.sampled_from([FP32, FP64, BF16]),
    slope=st.sampled_from([None, 0.5, 30.0]),
    state=st.booleans(),
    scale=st.sampled_from([1.0, 0.37]),
)


@pytest.mark.usefixtures("threads")
@settings(max_examples=25, deadline=None)
@given(x=problems, data=st.data())
def test_pieces_have_the_bits_of_one_forward_pass(x, data):
    B, T = x.q.shape[:2]
    o, final_state = x.forward()
    slots = torch.tensor(data.draw(st.permutations(range(B + 2)))[:B])
    pool = make_pool(x, B + 2)
    before, has_state, done = pool.clone(), begin(x, pool, slots), [0] * B
    most = data.draw(st.sampled_from([1, 4, 3 * C]), label="tokens of a piece")
    while rows := [row for row in range(B) if done[row] < T]:
        rows = data.draw(st.permutations(rows))[: data.draw(st.integers(1, len(rows)))]
        lengths = [data.draw(st.integers(0 if len(rows) > 1 else 1, min(T - done[row], most))) for row in rows]
        if not any(lengths):
            continue
        pieces = [cut(x, row, slice(done[row], done[row] + n)) for row, n in zip(rows, lengths, strict=True)]
        options: dict[str, Any] = {"has_state": None if has_state is None else has_state[rows]}
        if data.draw(st.booleans(), label="packed"):
            qkv = [torch.cat(y)[None] for y in list(zip(*pieces, strict=True))[:3]]
            options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
        else:
            qkv = [torch.full((len(rows), max(lengths), *y.shape[2:]), torch.nan, dtype=y.dtype) for y in x[:3]]
            for n, (piece, length) in enumerate(zip(pieces, lengths, strict=True)):
                for y, part in zip(qkv, piece[:3], strict=True):
                    y[n, :length] = part
            options["lengths"] = torch.tensor(lengths)
        tokens = x._replace(q=qkv[0], k=qkv[1], v=qkv[2])
        held = pool.clone()
        drafts = append(tokens, pool, slots[rows], update=False, **options)
        assert pool.equals(held)
        found = append(tokens, pool, slots[rows], **options)
        assert torch.equal(drafts, found)
        bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        for n, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            of_row = found[0, bounds[n] : bounds[n + 1]] if "cu_seqlens" in options else found[n, :length]
            assert torch.equal(of_row, o[row, done[row] : done[row] + length])
            assert "cu_seqlens" in options or not found[n, length:].any()
            done[row] += length
            if has_state is not None:
                has_state[row] = True
    assert (pool.count[slots] == T % C).all()
    indices = torch.cat([slots, torch.tensor([-1])])
    chunked.fold(FoldInputs(pool.keys, pool.values, pool.state, pool.count, x.log_decay, indices))
    assert torch.equal(pool.state[slots], final_state)
    assert not pool.count[slots].any()
    others = [slot for slot in range(B + 2) if slot not in slots.tolist()]
    assert pool.equals(before, others)


@pytest.mark.usefixtures("threads")
@settings(max_examples=25, deadline=None)
@given(x=problems, data=st.data())
def test_results_do_not_depend_on_the_other_sequences(x, data):
    """Outputs, states and gradients alone, as batch rows, and packed in another order behind others."""
    B, T = x.q.shape[:2]
    do, d_final = torch.randn_like(x.v), torch.randn(B, *x.q.shape[2:], x.v.shape[3], dtype=state_dtype(x.q.dtype))
    together = results(x, do, d_final, None)
    for row in range(B):
        at = slice(row, row + 1)
        state = None if x.initial_state is None else x.initial_state[at]
        alone = results(cut(x, at)._replace(initial_state=state), do[at], d_final[at], None)
        for y, z in zip(alone, together, strict=True):
            assert torch.equal(y, z[at])
    order = data.draw(st.permutations(range(B)))
    lengths = [data.draw(st.integers(0, T), label="another's") for _ in order]
    bounds = torch.tensor([0, *[n for length in lengths for n in (length, T)]]).cumsum(0)

    def packed(y: Tensor) -> Tensor:
        parts = [part for n, row in zip(lengths, order, strict=True) for part in (torch.randn_like(y[row, :n]), y[row])]
        return torch.cat(parts)[None]

    def interleaved(states: Tensor) -> Tensor:
        return torch.stack([s for row in order for s in (torch.full_like(states[row], torch.nan), states[row])])

    state = None if x.initial_state is None else interleaved(x.initial_state)
    tokens = Tokens(packed(x.q), packed(x.k), packed(x.v), x.log_decay, state, x.scale)
    found = results(tokens, packed(do), interleaved(d_final), bounds)
    for n, row in enumerate(order):
        at = slice(int(bounds[2 * n + 1]), int(bounds[2 * n + 2]))
        for name, y, z in zip(RESULTS, found, together, strict=False):
            actual = y[2 * n + 1] if "state" in name else y[0, at]
            assert torch.equal(actual, z[row]), name


RESULTS = ("o", "final_state", "dq", "dk", "dv", "d_initial_state")


def results(x: Tokens, do: Tensor, d_final: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    gradients = GradientInputs(*x[:5], cu_seqlens, do, d_final)
    forward = chunked.forward(AttentionInputs(*x[:5], cu_seqlens), x.scale, True)
    return [*forward, *chunked.backward(gradients, x.scale)]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_results_do_not_depend_on_strides(dtype):
    x = make_tokens(2, 2 * C + 5, 3, 32, 32, dtype)
    memory = torch.randn(2, x.q.shape[1], 3, 3 * 32 + 1).to(dtype)
    views = memory[..., 1:].split(32, dim=-1)
    for view, y in zip(views, x[:3], strict=True):
        view.copy_(y)
    q, k, v = views
    heads_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    found = x._replace(q=q, k=heads_first, v=v).forward()
    assert all(torch.equal(y, z) for y, z in zip(found, x.forward(), strict=True))


PIECES = {
    "one by one": [1] * 70,
    "drafts": [4] * 17 + [2],
    "chunk edges": [C - 1, 1, C, 1, 5],
    "at once": [70],
    "nothing between": [20, 0, 50],
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("storage", [FP32, BF16], ids=["float32", "bfloat16"])
def test_follows_the_definition(pieces, storage):
    """States in bfloat16 are rounded at chunk boundaries alone, however the sequence is cut."""
    x = make_tokens(3, 70, 2, 20, 33, scale=0.5)
    slots, starts = torch.tensor([4, 0, 2]), [0, *torch.tensor(pieces).cumsum(0).tolist()]
    pools = {name: make_pool(x, 5, storage) for name in MODULES}
    once = make_pool(x, 5, storage)
    outputs: dict[str, Tensor] = {}
    for name, module in MODULES.items():
        begin(x, pools[name], slots)
        parts = [append(cut(x, slice(None), slice(*at)), pools[name], slots, module=module) for at in pairwise(starts)]
        outputs[name] = torch.cat(parts, dim=1)
    tolerance: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-4} if storage == FP32 else {"rtol": 0.02, "atol": 0.2}
    torch.testing.assert_close(outputs["chunked"], outputs["reference"], **tolerance)
    for ours, exact in zip(pools["chunked"][1:], pools["reference"][1:], strict=True):
        assert torch.equal(ours[slots], exact[slots])
    states = (pools[name].state[slots].float() for name in ("chunked", "reference"))
    torch.testing.assert_close(*states, **tolerance)
    begin(x, once, slots)
    assert torch.equal(append(x, once, slots), outputs["chunked"])
    assert once.equals(pools["chunked"], slots)


@modules
@pytest.mark.parametrize("T", [1, 3, C + 5])
def test_padding_changes_nothing(module, T):
    x = make_tokens(3, T, 2, 16, 16)
    pool = make_pool(x, 4)
    slots = torch.tensor([2, -1, 1])
    has_state = torch.zeros(3, dtype=torch.bool)
    before = pool.clone()
    o = append(x, pool, slots, has_state, module)
    assert not o[1].any()
    assert o[[0, 2]].isfinite().all()
    assert pool.equals(before, [0, 3])
    nothing = append(cut(x, slice(None), slice(0)), pool, slots, module=module)
    assert nothing.shape == (3, 0, 2, 16)
    assert pool.state[slots[[0, 2]]].isfinite().all()


@modules
def test_slots_are_sequences_where_none_are_given(module):
    x = make_tokens(2, C + 3, 2, 16, 16)
    pools = [make_pool(x, 2) for _ in range(2)]
    for pool in pools:
        begin(x, pool, torch.arange(2))
    assert torch.equal(append(x, pools[0], None, module=module), append(x, pools[1], torch.arange(2), module=module))
    assert pools[0].equals(pools[1])
    pool = pools[0]
    module.fold(FoldInputs(pool.keys, pool.values, pool.state, pool.count, x.log_decay, None))
    expected = x.forward()[1]
    torch.testing.assert_close(pools[0].state, expected, rtol=1e-5, atol=1e-5)
    assert not pools[0].count.any()


@modules
def test_several_sequences_may_read_one_slot(module):
    x = make_tokens(1, C + 7, 2, 16, 16)
    pool = make_pool(x, 2)
    begin(x, pool, torch.tensor([1]))
    append(cut(x, slice(None), slice(20)), pool, torch.tensor([1]), module=module)
    drafts = cut(x, [0, 0, 0], slice(20, None))
    o = append(drafts, pool, torch.tensor([1, 1, 1]), module=module, update=False)
    expected = x.forward()[0][:, 20:].expand(3, -1, -1, -1)
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-4)


@modules
def test_a_new_sequence_without_tokens_starts_from_zero(module):
    x = make_tokens(2, 1, 2, 16, 16)
    pool = make_pool(x, 2)
    options: dict[str, Any] = {"lengths": torch.tensor([0, 1])}
    append(x, pool, torch.tensor([0, 1]), torch.tensor([False, False]), module, **options)
    assert pool.count.tolist() == [[0, 0], [1, 1]]
    assert not pool.state.any()


def test_nan_stays_in_its_sequence_and_leaves_with_it():
    x = make_tokens(2, 5, 2, 16, 16)
    pool, slots = make_pool(x, 2), torch.tensor([0, 1])
    begin(x, pool, slots)
    x.k[0, 2] = torch.nan
    o = append(x, pool, slots)
    assert o[1].isfinite().all()
    assert o[0].isnan().any()
    fresh = make_tokens(1, 3, 2, 16, 16, state=False)
    found = append(fresh, pool, slots[:1], torch.tensor([False]))
    assert torch.equal(found, fresh.forward()[0])


def test_chunk_sizes_are_those_of_the_rings():
    problem = Problem(1, 1, 2, 16, 16, 1, FP32, torch.device("cpu"))
    assert chunked.chunk_size(problem) == C
    assert reference.chunk_size(problem) > 0
