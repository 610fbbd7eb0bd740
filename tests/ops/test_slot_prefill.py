"""Prefill in a pool of states against prefill on copies of its slots."""

from typing import Any

import pytest
import torch
from oracle import BACKENDS, INTERPRETED, Case, Inputs, device_of, dtype_of, error, make_inputs
from torch import Tensor

from lightning_attention import lightning_attention_prefill, lightning_attention_prefill_
from lightning_attention.ops.gpu.segments import Segments, ceil_div
from lightning_attention.ops.triton import config

NUM_SLOTS = 9
PACKED = Case(lengths=(0, 7, 0, 140, 1, 20, 0))
# A case, slots of sequences, whether they have a state, positions, and the slots for the states there.
CASES: dict[str, tuple[Case, list[int] | None, list[bool] | None, list[int] | None, list[list[int]] | None]] = {
    "packed": (PACKED, [3, 8, 0, 1, 7, 2, 5], None, None, None),
    "new sequences": (PACKED, [3, 8, 0, 1, 7, 2, 5], [False, True, True, False, False, True, False], None, None),
    "nobody's": (PACKED, [3, -1, 0, -1, 7, 2, -1], [True] * 7, [7, 80, 148, 168], [[1, 5, 6, 8]]),
    "positions": (PACKED, [3, 8, 0, 1, 7, 2, 5], [False] * 7, [3, 7, 8, 100, 148, 168], [[-1, 4, -1, 6, -1, -1]]),
    "batch": (Case(B=3, T=37), [4, 0, 6], [True, False, True], [16, 36], [[1, -1], [2, 3], [-1, 8]]),
    "one": (Case(B=1, T=300, H=1, slope=None, scale=0.5), [4], None, [128, 200], [[1, 2]]),
    "all slots": (Case(B=3, T=20, K=5, V=7), None, [True, False, True], None, None),
    "no tokens": (Case(B=2, T=0), [1, 4], [True, False], None, None),
    "no sequences": (Case(lengths=()), [], [], None, None),
}


def expected_of(inputs: Inputs, pool: Tensor, slots, exists, positions, saved) -> tuple[Tensor, Tensor]:
    """The output, and the pool afterwards, in float64."""
    exact, after = inputs.to(torch.float64), pool.to(torch.float64, copy=True)
    slots = list(range(len(pool))) if slots is None else slots
    exists = [True] * len(slots) if exists is None else exists
    initial = [after[slot] if slot >= 0 and e else after[0] * 0 for slot, e in zip(slots, exists, strict=True)]
    options: dict[str, Any] = exact.options()
    options |= {"initial_state": torch.stack(initial) if initial else after[:0]}
    o, final_state, states = lightning_attention_prefill(
        *exact.qkv, exact.log_decay, state_positions=positions or [], backend="chunked", **options
    )
    for row, of_row in enumerate(saved or []):
        for i, slot in enumerate(of_row):
            if slot >= 0:
                after[slot] = states[row, i]
    for state, slot in zip(final_state, slots, strict=True):
        if slot >= 0:
            after[slot] = state
    return o, after


def options_of(inputs, slots, exists, positions, saved) -> dict[str, Any]:
    def tensor(values, dtype=torch.int32):
        return None if values is None else torch.tensor(values, dtype=dtype, device=inputs.q.device)

    return {
        "state_indices": tensor(slots),
        "has_initial_state": tensor(exists, torch.bool),
        "state_positions": positions,
        "saved_indices": tensor(saved),
        "cu_seqlens": inputs.cu_seqlens,
        "scale": inputs.scale,
    }


def make_pool(inputs, slots, layout: str) -> Tensor:
    H, (K, V) = inputs.q.shape[2], (inputs.q.shape[3], inputs.v.shape[3])
    size = len(inputs.d_final_state) if slots is None else NUM_SLOTS
    pool = torch.randn(size, 2, H, K, V, dtype=inputs.d_final_state.dtype, device=inputs.q.device)[:, 1]
    if layout == "transposed":
        return pool.mT.contiguous().mT
    return pool.bfloat16() if layout == "bfloat16" and pool.dtype != torch.float64 else pool


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["apart", "transposed", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_prefill_in_a_pool_equals_prefill_on_copies(backend, case, layout):
    case, *slots = case
    inputs = make_inputs(case, dtype_of(backend)).on(device_of(backend))
    pool = make_pool(inputs, slots[0], layout)
    expected_o, expected_pool = expected_of(inputs, pool, *slots)
    options = options_of(inputs, *slots)
    o = lightning_attention_prefill_(*inputs.qkv, inputs.log_decay, state=pool, backend=backend, **options)
    rounding = 16 * torch.finfo(o.dtype).eps
    assert error(o, expected_o) < rounding
    assert error(pool, expected_pool) < max(rounding, torch.finfo(pool.dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_slots_and_the_memory_around_do_not_change(backend):
    inputs = make_inputs(PACKED, dtype_of(backend)).on(device_of(backend))
    shape = inputs.d_final_state.shape[1:]
    memory = torch.randn(NUM_SLOTS, 3, *shape, dtype=inputs.d_final_state.dtype, device=inputs.q.device)
    before, slots = memory.clone(), [3, -1, 0, -1, 7, 2, -1]
    options = options_of(inputs, slots, [False] * 7, [3, 100], [[-1, 5]])
    lightning_attention_prefill_(*inputs.qkv, state=memory[:, 1], backend=backend, **options)
    assert torch.equal(memory[:, [0, 2]], before[:, [0, 2]])
    unchanged = [1, 4, 6, 8]
    assert torch.equal(memory[unchanged], before[unchanged])
    assert all(not torch.equal(memory[slot, 1], before[slot, 1]) for slot in (3, 0, 7, 2, 5))


@pytest.mark.triton
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_segments_do_not_read_what_others_have_written(monkeypatch, case):
    """A program writes the last state of a sequence where others read the first one."""
    monkeypatch.setattr(config, "segments", lambda T, *_: Segments(64, 64, max(ceil_div(T, 64), 1)))
    case, *slots = case
    inputs = make_inputs(case, torch.float32).on(device_of("triton"))
    pool = make_pool(inputs, slots[0], "apart")
    expected_o, expected_pool = expected_of(inputs, pool, *slots)
    options = options_of(inputs, *slots)
    o = lightning_attention_prefill_(*inputs.qkv, inputs.log_decay, state=pool, backend="triton", **options)
    assert error(o, expected_o) < 4e-6
    assert error(pool, expected_pool) < 4e-6


HOPPER = {
    "packed": (Case(lengths=(0, 7, 0, 140, 1, 20, 0), K=64, V=64), [3, -1, 0, 1, 7, 2, 5], [False] + [True] * 6),
    "batch": (Case(B=3, T=130, K=128, V=128, H=1), [4, 0, -1], [True, False, True]),
    "all slots": (Case(B=2, T=70, K=64, V=128, H=2), None, None),
}


@pytest.mark.triton
@pytest.mark.parametrize("num_segments", [1, 2, 3])
@pytest.mark.parametrize("layout", ["apart", "bfloat16"])
@pytest.mark.parametrize("case", HOPPER.values(), ids=HOPPER)
def test_hopper_kernels_write_to_slots(monkeypatch, case, layout, num_segments):
    pytest.importorskip("triton", "3.6")
    from ops.gluon_emulator import emulated
    from ops.test_hopper import cut

    from lightning_attention.ops.backends import BACKENDS
    from lightning_attention.ops.hopper import kernels, launch, states

    if INTERPRETED:
        monkeypatch.setattr(BACKENDS["hopper"], "unsupported_reasons", lambda problem: [])
        monkeypatch.setattr(launch, "kernels", emulated(kernels))
        monkeypatch.setattr(launch, "states", emulated(states))
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    cut(monkeypatch, num_segments)
    case, slots, exists = case
    inputs = make_inputs(case, torch.bfloat16).on(device_of("triton"))
    pool = make_pool(inputs, slots, layout)
    expected_o, expected_pool = expected_of(inputs, pool, slots, exists, None, None)
    options = options_of(inputs, slots, exists, None, None)
    o = lightning_attention_prefill_(*inputs.qkv, inputs.log_decay, state=pool, backend="hopper", **options)
    assert error(o, expected_o) < 0.01
    assert error(pool, expected_pool) < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore")
def test_prefill_in_a_pool_passes_opcheck(backend):
    case, *slots = CASES["positions"]
    inputs = make_inputs(case, dtype_of(backend)).on(device_of(backend))
    pool = make_pool(inputs, slots[0], "apart").contiguous()
    options = options_of(inputs, *slots)
    positions = torch.tensor(slots[2], device=inputs.q.device)
    indices = (options["state_indices"], options["has_initial_state"])
    for at in ((None, None), (positions, options["saved_indices"])):
        arguments = (*inputs.qkv, inputs.log_decay, pool, inputs.cu_seqlens, *indices, *at, 0.5, backend)
        torch.library.opcheck(torch.ops.lightning_attention.prefill_.default, arguments)


x, pool, one = torch.randn(1, 6, 2, 4), torch.zeros(5, 2, 4, 4), torch.tensor([1])
ARGUMENTS: dict[str, Any] = {"state": pool, "state_indices": one}
POSITIONS = {"state_positions": [2, 4]}
REFUSED = [
    ({"state_indices": torch.tensor([5])}, ValueError, r"state_indices must be -1 or in \[0, 5\), got 5 to 5"),
    ({"state_indices": torch.tensor([1, 2])}, ValueError, r"state_indices must be \[N\] = \[1\], got shape \(2,\)"),
    ({"state_indices": torch.tensor([1.0])}, TypeError, "state_indices must be int32 or int64"),
    ({"state_indices": None}, ValueError, r"state must be \[N, H, K, V\] = \[1, 2, 4, 4\], got shape \(5, 2, 4, 4\)"),
    ({"has_initial_state": torch.tensor([1])}, TypeError, "has_initial_state must be torch.bool, got torch.int64"),
    ({"has_initial_state": torch.tensor([True, False])}, ValueError, r"has_initial_state must be \[N\] = \[1\]"),
    (POSITIONS, ValueError, "state_positions and saved_indices go together: give both or neither"),
    ({"saved_indices": torch.tensor([[2, 3]])}, ValueError, "state_positions and saved_indices go together"),
    (POSITIONS | {"saved_indices": torch.tensor([2, 3])}, ValueError, r"saved_indices must be \[B, M\] = \[1, 2\]"),
    (POSITIONS | {"saved_indices": torch.tensor([[2, 2]])}, ValueError, "state_indices and saved_indices must differ"),
    (POSITIONS | {"saved_indices": torch.tensor([[2, 1]])}, ValueError, "state_indices and saved_indices must differ"),
    (POSITIONS | {"saved_indices": torch.tensor([[2, 7]])}, ValueError, r"saved_indices must be -1 or in \[0, 5\)"),
    ({"state_positions": [4, 2], "saved_indices": torch.tensor([[2, 3]])}, ValueError, "state_positions must rise"),
    ({"state_positions": [2.0], "saved_indices": torch.tensor([[2]])}, TypeError, "state_positions must hold integers"),
    ({"state": pool.double()}, TypeError, "state must be torch.float32 or torch.bfloat16"),
    (
        {"state": pool[:1].expand(5, -1, -1, -1)},
        ValueError,
        "state is updated in place and its elements must not share",
    ),
    ({"cu_seqlens": torch.tensor([0, 2, 6])}, ValueError, r"state_indices must be \[N\] = \[2\]"),
]


@pytest.mark.parametrize(("change", "kind", "message"), REFUSED, ids=[f"{m[:60]}" for _, _, m in REFUSED])
def test_wrong_slots_are_refused_before_anything_is_written(change, kind, message):
    with pytest.raises(kind, match=message):
        lightning_attention_prefill_(x, x, x, **ARGUMENTS | change)
    assert not pool.any()


def test_a_list_of_positions_is_checked_on_every_device():
    """Values of tensors on an accelerator are not read, but those of a list are at hand."""
    y, on_meta = x.to("meta"), {name: value.to("meta") for name, value in ARGUMENTS.items()}
    with pytest.raises(ValueError, match="state_positions must rise from 1 to at most T = 6"):
        lightning_attention_prefill_(y, y, y, **on_meta, state_positions=[7], saved_indices=one[None].to("meta"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("positions", [[2, 4], torch.tensor([2, 4])], ids=["list", "tensor"])
def test_compiled_equals_eager(positions):
    def prefill(q, state, saved):
        options = {"state_indices": one, "state_positions": positions, "saved_indices": saved}
        return lightning_attention_prefill_(q, q, q, state=state, **options) + 1

    saved, pools = torch.tensor([[2, 3]]), [torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))] * 2
    pools = [each.clone() for each in pools]
    compiled = torch.compile(prefill, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, pools[0], saved), prefill(x, pools[1], saved))
    assert torch.equal(*pools)


def test_autocast_casts_q_k_and_v():
    pools = [torch.zeros(5, 2, 4, 4) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        found = lightning_attention_prefill_(x, x, x, state=pools[0], state_indices=one)
    y = x.bfloat16()
    assert torch.equal(found, lightning_attention_prefill_(y, y, y, state=pools[1], state_indices=one))
    assert torch.equal(*pools)


def test_gradients_are_refused():
    y = x.clone().requires_grad_()
    with pytest.raises(ValueError, match="lightning_attention_prefill_ keeps no gradient"):
        lightning_attention_prefill_(y, y, y, **ARGUMENTS)
