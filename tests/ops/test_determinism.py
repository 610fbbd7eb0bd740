"""Which results are equal to the last bit, on every backend: docs/determinism.md has a line for each test."""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import HAS_GPU, INTERPRETED
from torch import Tensor

from lightning_attention import (
    DecodingState,
    decay,
    lightning_attention,
    lightning_attention_commit,
    lightning_attention_prefill_,
    lightning_attention_step,
    lightning_attention_verify,
)
from lightning_attention.ops import hopper, triton
from lightning_attention.ops.problem import Problem


class Setting(NamedTuple):
    """A backend with inputs that it takes."""

    backend: str
    dtype: torch.dtype
    K: int
    V: int
    H: int = 2

    def __str__(self) -> str:
        return f"{self.backend}-{str(self.dtype)[6:]}-{self.K}x{self.V}"

    @property
    def device(self) -> str:
        return "cuda" if HAS_GPU and self.backend in ("triton", "hopper") else "cpu"

    def log_decay(self) -> Tensor:
        return decay.log_decay(self.H, preset="alibi").to(self.device)

    def tokens(self, B: int, T: int, seed: int = 0) -> Any:
        """q, k and v `[B, T, H, D]`."""
        generator = torch.Generator().manual_seed(seed)
        sizes = (self.K, self.K, self.V)
        return [torch.randn(B, T, self.H, D, generator=generator).to(self.device, self.dtype) for D in sizes]

    def attend(self, qkv: Any, **options: Any) -> Tensor:
        options = {"backend": self.backend, "invariant": True} | options
        return lightning_attention(*qkv, log_decay=self.log_decay(), **options).output

    def new_state(self, num_states: int) -> DecodingState:
        """States of slots that were used before, by sequences with NaN."""
        state = DecodingState.zeros(
            num_states, self.H, self.K, self.V, dtype=self.dtype, device=self.device, backend=self.backend
        )
        for part in state[:3]:
            part.fill_(float("nan"))
        return state._replace(count=torch.full_like(state.count, 3))

    def read(self, state: DecodingState, qkv: Any, bounds: list[int], **options: Any) -> Tensor:
        """Read tokens piece by piece, from `bounds[0]`; steps read single ones."""
        q, k, v = qkv
        outputs = []
        for start, stop in pairwise(bounds):
            piece: Any = [x[:, start:stop] for x in (q, k, v)]
            if start == 0:
                new = torch.zeros(len(q), dtype=torch.bool, device=self.device)
                outputs.append(self.prefill(state, piece, has_initial_state=new, **options))
            elif stop - start == 1:
                outputs.append(self.step(state, [x.squeeze(1) for x in piece], **options).unsqueeze(1))
            else:
                outputs.append(self.prefill(state, piece, **options))
        return torch.cat(outputs, dim=1)

    def prefill(self, state: DecodingState, qkv: Any, **options: Any) -> Tensor:
        options = {"backend": self.backend, "invariant": True} | options
        return lightning_attention_prefill_(*qkv, log_decay=self.log_decay(), state=state, **options)

    def step(self, state: DecodingState, qkv: Any, **options: Any) -> Tensor:
        return lightning_attention_step(*qkv, log_decay=self.log_decay(), state=state, backend=self.backend, **options)


FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SETTINGS = [
    *(Setting("chunked", dtype, K, V) for dtype in (FLOAT32, FLOAT64) for K, V in ((16, 16), (20, 33), (64, 48))),
    Setting("chunked", BFLOAT16, 32, 32),
    *(
        pytest.param(Setting("triton", dtype, K, V), marks=pytest.mark.triton)
        # NumPy's products of float32 have other bits for other shapes, if they are long.
        for dtype, K, V in ((FLOAT32, 16, 16), (FLOAT16, 16, 16), (FLOAT16, 20, 33))
    ),
    *(
        pytest.param(Setting("triton", dtype, K, V), marks=pytest.mark.gpu)
        for dtype, K, V in (
            (BFLOAT16, 128, 128),
            (BFLOAT16, 80, 48),
            (BFLOAT16, 256, 256),
            (FLOAT16, 64, 128),
            (FLOAT16, 256, 64),
            (FLOAT32, 64, 64),
            (FLOAT32, 128, 96),
        )
    ),
    *(pytest.param(Setting("hopper", BFLOAT16, K, V), marks=pytest.mark.gpu) for K in (64, 128) for V in (64, 128)),
]
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)
EXAMPLES = 1 if INTERPRETED else 6
few = settings(max_examples=EXAMPLES, deadline=None)
lengths = st.lists(st.integers(0, 150), min_size=1, max_size=5).filter(any)


@st.composite
def cuts(draw: st.DrawFn) -> list[int]:
    """Bounds of pieces of a sequence, many of them of one token or at the edge of a chunk."""
    sizes = draw(st.lists(st.sampled_from([1, 1, 1, 2, 5, 16, 31, 32, 33, 63, 64, 65]), min_size=1, max_size=9))
    return [0, *torch.tensor(sizes).cumsum(0).tolist()]


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal to the last bit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_setting
@few
@given(batch_size=st.integers(1, 9), length=st.integers(1, 150))
def test_batch_rows_equal_a_batch_of_one(setting, batch_size, length):
    qkv = setting.tokens(batch_size, length)
    together = setting.attend(qkv)
    for b in range(batch_size):
        assert_same(together[b : b + 1], setting.attend([x[b : b + 1] for x in qkv]))


@every_setting
@few
@given(lengths)
def test_packed_sequences_equal_each_alone(setting, lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    qkv = [x.requires_grad_() for x in setting.tokens(1, sum(lengths))]
    do = setting.tokens(1, sum(lengths), seed=1)[2]
    packed = setting.attend(qkv, cu_seqlens=bounds.to(setting.device))
    gradients = torch.autograd.grad(packed, qkv, do)
    for start, stop in pairwise(bounds.tolist()):
        alone = [x[:, start:stop].detach().clone().requires_grad_() for x in qkv]
        o = setting.attend(alone)
        assert_same(packed[:, start:stop], o)
        for found, expected in zip(gradients, torch.autograd.grad(o, alone, do[:, start:stop]), strict=True):
            assert_same(found[:, start:stop], expected)


@every_setting
@few
@given(batch_size=st.integers(2, 5), length=st.integers(1, 150))
def test_gradients_of_batch_rows_equal_those_of_a_batch_of_one(setting, batch_size, length):
    qkv = [x.requires_grad_() for x in setting.tokens(batch_size, length)]
    do = setting.tokens(batch_size, length, seed=1)[2]
    together = torch.autograd.grad(setting.attend(qkv), qkv, do)
    alone = [x[1:2].detach().requires_grad_() for x in qkv]
    for found, expected in zip(together, torch.autograd.grad(setting.attend(alone), alone, do[1:2]), strict=True):
        assert_same(found[1:2], expected)


@every_setting
@few
@given(bounds=cuts(), batch_size=st.integers(1, 3))
def test_pieces_and_steps_equal_one_pass(setting, bounds, batch_size):
    qkv, state = setting.tokens(batch_size, bounds[-1]), setting.new_state(batch_size)
    assert_same(setting.read(state, qkv, bounds), setting.attend(qkv))
    whole = bounds[-1] // state.chunk_size * state.chunk_size
    assert (state.count == bounds[-1] - whole).all()
    expected = lightning_attention(
        *(x[:, :whole] for x in qkv),
        log_decay=setting.log_decay(),
        backend=setting.backend,
        invariant=True,
        output_final_state=True,
    )
    assert expected.final_state is not None
    assert_same(state.state, expected.final_state)
    for ring, x in ((state.keys, qkv[1]), (state.values, qkv[2])):
        assert_same(ring[:, :, : bounds[-1] - whole], x[:, whole:].transpose(1, 2))


@every_setting
@few
@given(bounds=cuts())
def test_pieces_in_bfloat16_states_equal_steps(setting, bounds):
    """Both round a state once a chunk."""
    if setting.dtype == FLOAT64:
        pytest.skip("states of float64 inputs are float64")
    qkv, sizes = setting.tokens(1, bounds[-1]), (1, setting.H, setting.K, setting.V)
    options: Any = {"dtype": setting.dtype, "device": setting.device, "backend": setting.backend}
    states = [DecodingState.zeros(*sizes, **options, storage_dtype=BFLOAT16) for _ in range(2)]
    pieces = setting.read(states[0], qkv, bounds)
    assert_same(setting.read(states[1], qkv, [0, *range(1, bounds[-1] + 1)]), pieces)
    assert_equal_states(*states)


@every_setting
def test_steps_alone_equal_one_pass(setting):
    qkv, state = setting.tokens(2, 70), setting.new_state(2).zero_()
    steps = [
        lightning_attention_step(q, k, v, log_decay=setting.log_decay(), state=state, backend=setting.backend)
        for q, k, v in zip(*(x.unbind(1) for x in qkv), strict=True)
    ]
    assert_same(torch.stack(steps, dim=1), setting.attend(qkv))


@every_setting
@few
@given(first=lengths, data=st.data())
def test_packed_prompts_in_slots_equal_each_alone(setting, first, data):
    """Prompts in two packed pieces, in slots of a pool in any order, some of which others use."""
    then = data.draw(st.lists(st.integers(0, 70), min_size=len(first), max_size=len(first)))
    slots = data.draw(st.permutations(range(len(first) + 2)))
    used, others = slots[: len(first)], slots[len(first) :]
    state = setting.new_state(len(slots))
    before = state.select(torch.tensor(others))
    qkv = [setting.tokens(1, a + b, seed=i) for i, (a, b) in enumerate(zip(first, then, strict=True))]
    outputs: list[list[Tensor]] = [[] for _ in first]
    for begin, sizes in (([0] * len(first), first), (first, then)):
        packed = [
            torch.cat([x[i][:, a : a + b] for x, a, b in zip(qkv, begin, sizes, strict=True)], 1) for i in (0, 1, 2)
        ]
        bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        o = setting.prefill(
            state,
            packed,
            state_indices=torch.tensor(used, device=setting.device),
            has_initial_state=torch.tensor([begin is first] * len(first), device=setting.device),
            cu_seqlens=torch.tensor(bounds, device=setting.device),
        )
        for found, start, stop in zip(outputs, bounds, bounds[1:], strict=False):
            found.append(o[:, start:stop])
    for x, found in zip(qkv, outputs, strict=True):
        if x[0].shape[1]:
            assert_same(torch.cat(found, dim=1), setting.attend(x))
    for part, kept in zip(state.select(torch.tensor(others)), before, strict=True):
        torch.testing.assert_close(part, kept, rtol=0, atol=0, equal_nan=True)


@every_setting
@few
@given(start=st.integers(1, 70), num_drafts=st.integers(1, 9), accepted=st.integers(-1, 8))
def test_a_chain_of_drafts_equals_steps(setting, start, num_drafts, accepted):
    last = min(accepted, num_drafts - 1)
    qkv = setting.tokens(2, start + num_drafts)
    state = setting.new_state(2)
    setting.read(state, qkv, [0, start])
    before = [part.clone() for part in state]
    drafts: Any = [x[:, start:] for x in qkv]
    options: Any = {"state": state, "backend": setting.backend}
    o = lightning_attention_verify(*drafts, log_decay=setting.log_decay(), **options)
    assert_same(o, setting.attend(qkv)[:, start:])
    for part, kept in zip(state, before, strict=True):
        torch.testing.assert_close(part, kept, rtol=0, atol=0, equal_nan=True)
    lightning_attention_commit(
        *drafts[1:], log_decay=setting.log_decay(), last=torch.full((2,), last, device=setting.device), **options
    )
    expected = setting.new_state(2)
    bounds = [0, start, *range(start + 1, start + last + 2)]
    setting.read(expected, qkv, bounds)
    assert_equal_states(state, expected)


@every_setting
@few
@given(start=st.integers(1, 70), data=st.data())
def test_a_tree_of_drafts_equals_steps_along_each_path(setting, start, data):
    num_drafts = data.draw(st.integers(1, 7))
    parents = [data.draw(st.integers(-1, i - 1)) for i in range(num_drafts)]
    last = data.draw(st.integers(-1, num_drafts - 1))
    prompt, drafts = setting.tokens(1, start), setting.tokens(1, num_drafts, seed=1)
    state = setting.new_state(3)
    slot = torch.tensor([2], device=setting.device)
    setting.read(state, prompt, [0, start], state_indices=slot)
    options: Any = {"state": state, "backend": setting.backend, "state_indices": slot}
    options["parents"] = torch.tensor([parents], device=setting.device)
    o = lightning_attention_verify(*drafts, log_decay=setting.log_decay(), **options)

    def path_of(draft: int) -> list[int]:
        return [*path_of(parents[draft]), draft] if draft >= 0 else []

    for draft in range(num_drafts):
        path = [torch.cat([x, y[:, path_of(draft)]], dim=1) for x, y in zip(prompt, drafts, strict=True)]
        assert_same(o[:, draft], setting.attend(path)[:, -1])
    lightning_attention_commit(
        *drafts[1:], log_decay=setting.log_decay(), last=torch.tensor([last], device=setting.device), **options
    )
    expected = setting.new_state(3)
    path = [torch.cat([x, y[:, path_of(last)]], dim=1) for x, y in zip(prompt, drafts, strict=True)]
    setting.read(expected, path, [0, start, *range(start + 1, path[0].shape[1] + 1)], state_indices=slot)
    assert_equal_states(state.select(slot), expected.select(slot))


@pytest.mark.gpu
@pytest.mark.parametrize("setting", SETTINGS[-4:], ids=str)
@pytest.mark.parametrize("batch_size", [4, 40])
def test_steps_of_many_sequences_equal_each_alone(setting, batch_size):
    """A kernel with other numbers of warps and of tokens at a time, by the number of programs."""
    setting = setting._replace(H=64)
    qkv, together = setting.tokens(batch_size, 70), setting.new_state(batch_size)
    o = setting.read(together, qkv, [0, 50, *range(51, 71)])
    for row in (0, batch_size - 1):
        alone = setting.new_state(1)
        assert_same(o[row : row + 1], setting.read(alone, [x[row : row + 1] for x in qkv], [0, 50, *range(51, 71)]))
        assert_equal_states(together.select(torch.tensor([row])), alone)


@every_setting
def test_slots_with_padding_equal_states_in_order(setting):
    qkv, state = setting.tokens(3, 40), setting.new_state(3)
    setting.read(state, qkv, [0, 40])
    pool = setting.new_state(5)
    slots = torch.tensor([4, 0, 2], device=setting.device)
    for part, found in zip(pool, state, strict=True):
        part[slots] = found
    new = setting.tokens(4, 1, seed=1)
    indices = torch.tensor([4, -1, 0, 2], device=setting.device)
    o = lightning_attention_step(
        *new, log_decay=setting.log_decay(), state=pool, state_indices=indices, backend=setting.backend
    )
    rows = [0, 2, 3]
    expected = lightning_attention_step(
        *(x[rows] for x in new), log_decay=setting.log_decay(), state=state, backend=setting.backend
    )
    assert_same(o[rows], expected)
    assert (o[1] == 0).all()
    assert_equal_states(pool.select(slots), state)


@every_setting
@few
@given(batch_size=st.integers(1, 5), length=st.integers(1, 150))
def test_repeated_calls_are_equal(setting, batch_size, length):
    """Without `invariant` too."""
    qkv = [x.requires_grad_() for x in setting.tokens(batch_size, length)]
    do = setting.tokens(batch_size, length, seed=1)[2]
    for invariant in (True, False):
        first, second = (setting.attend(qkv, invariant=invariant) for _ in range(2))
        assert_same(first, second)
        gradients = (torch.autograd.grad(o, qkv, do) for o in (first, second))
        for found, expected in zip(*gradients, strict=True):
            assert_same(found, expected)


@every_setting
@few
@given(num_chunks=st.integers(1, 3), length=st.integers(1, 70))
def test_parts_of_whole_chunks_equal_one_pass(setting, num_chunks, length):
    cut = num_chunks * setting.new_state(1).chunk_size
    qkv = setting.tokens(2, cut + length)
    options: Any = {"backend": setting.backend, "invariant": True, "output_final_state": True}
    expected, last = lightning_attention(*qkv, log_decay=setting.log_decay(), **options)
    first, state = lightning_attention(*(x[:, :cut] for x in qkv), log_decay=setting.log_decay(), **options)
    then = lightning_attention(
        *(x[:, cut:] for x in qkv), log_decay=setting.log_decay(), initial_state=state, **options
    )
    assert_same(torch.cat([first, then.output], dim=1), expected)
    assert last is not None
    assert then.final_state is not None
    assert_same(then.final_state, last)


@every_setting
def test_the_place_in_memory_does_not_matter(setting):
    qkv = setting.tokens(2, 90)
    expected = setting.attend(qkv)
    joined = torch.cat([x.new_zeros(2, 7, *x.shape[2:]) for x in qkv[:1]] + [qkv[0]], dim=1)
    wide = torch.cat([*qkv, qkv[2]], dim=3)  # strides of a fused projection
    K, V = setting.K, setting.V
    views = [joined[:, 7:], wide[..., K : 2 * K], wide[..., 2 * K : 2 * K + V]]
    assert_same(setting.attend(views), expected)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64, BFLOAT16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 4, 8, 16], ids="{}_threads".format)
def test_threads_keep_the_promise(threads, dtype):
    """Any number of heads; in float64 as many as there are threads, or MKL divides sums among threads."""
    setting = Setting("chunked", dtype, 128, 64, H=threads if dtype == FLOAT64 else 1)
    qkv = setting.tokens(3, 70)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = setting.attend(qkv)
        assert_same(setting.attend([x[1:2] for x in qkv]), expected[1:2])
        assert_same(setting.read(setting.new_state(3), qkv, [0, 37, *range(38, 71)]), expected)
    finally:
        torch.set_num_threads(before)


@every_setting
def test_a_scale_and_no_decay_keep_the_promise(setting):
    qkv, state = setting.tokens(2, 80), setting.new_state(2).zero_()
    options: Any = {"scale": 0.3, "backend": setting.backend}
    expected = lightning_attention(*qkv, invariant=True, **options).output
    found = [lightning_attention_prefill_(*(x[:, :50] for x in qkv), state=state, invariant=True, **options)]
    found += [lightning_attention_step(*(x[:, 50:53] for x in qkv), state=state, **options)]
    found += [
        lightning_attention_step(*(x[:, t] for x in qkv), state=state, **options).unsqueeze(1) for t in range(53, 80)
    ]
    assert_same(torch.cat(found, dim=1), expected)


@every_setting
@pytest.mark.parametrize("decays", [True, False], ids=["decay", "no decay"])
def test_a_folded_ring_is_the_state_after_all_tokens(setting, decays):
    """To rounding: the last chunk of a forward pass is ragged."""
    qkv, state = setting.tokens(2, 75), setting.new_state(2).zero_()
    log_decay = setting.log_decay() if decays else None
    options: Any = {"backend": setting.backend, "invariant": True}
    lightning_attention_prefill_(*qkv, log_decay=log_decay, state=state, **options)
    expected = lightning_attention(*qkv, log_decay=log_decay, output_final_state=True, **options).final_state
    folded = state.fold_(log_decay, torch.tensor([1, -1], device=setting.device), setting.backend)
    assert expected is not None
    rounding = 1e-5 if setting.dtype in (FLOAT32, FLOAT64) else 2e-2
    torch.testing.assert_close(folded[1], expected[1], atol=rounding * expected.abs().max().item(), rtol=0)
    assert state.count[:, 0].tolist() == [75 % state.chunk_size, 0]


def assert_equal_states(found: DecodingState, expected: DecodingState) -> None:
    """Equal to the last bit, the unused parts of rings aside."""
    assert_same(found.state, expected.state)
    assert_same(found.count, expected.count)
    is_used = torch.arange(found.chunk_size, device=found.count.device) < found.count[..., None]
    for ring, other in ((found.keys, expected.keys), (found.values, expected.values)):
        assert_same(ring[is_used], other[is_used])


def test_auto_chooses_by_dtype_and_head_sizes_alone():
    """However few tokens there are, where a choice for speed would look at them."""
    backends = {"hopper": hopper, "triton": triton}
    device = torch.device("cuda" if HAS_GPU else "cpu")
    problems = [Problem(B, T, 8, 128, 128, B, torch.bfloat16, device) for B, T in ((1, 1), (64, 4096))]
    sizes = {name: {backend.chunk_size(problem) for problem in problems} for name, backend in backends.items()}
    assert sizes == {"hopper": {64}, "triton": {32}}
