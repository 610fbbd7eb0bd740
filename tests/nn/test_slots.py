"""Layers update the slots of state pools, and change no other slot."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attention import decay
from lightning_attention.nn import EluFeatures, GatedLightningAttention, NormalizedLinearAttention, Slots, TokenMixer

W, H, NUM_SLOTS = 24, 3, 5
LAYERS: dict[str, TokenMixer] = {
    "lightning": GatedLightningAttention(W, H, decay.log_decay(H, preset="alibi")),
    "normalized": NormalizedLinearAttention(W, H, EluFeatures(W // H)),
}
BY_LAYER = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def make_pool(layer: TokenMixer) -> Tensor:
    return torch.rand(NUM_SLOTS, *layer.state_shape)


def run(layer: TokenMixer, pool: Tensor | None, slots: Slots, *, shape: tuple[int, int] = (1, 7), **inputs: Any):
    return layer(torch.randn(*shape, W), torch.arange(shape[1])[None], state=pool, slots=slots, **inputs)


@BY_LAYER
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "frozen"])
def test_padding_of_single_tokens_changes_no_slot(layer, grad):
    pool = make_pool(layer)
    before = pool.clone()
    layer.requires_grad_(False)
    with torch.set_grad_enabled(grad):
        y, after = run(layer, pool, Slots(torch.tensor([2, -1])), shape=(2, 1))
    layer.requires_grad_(True)
    assert after is pool
    assert [slot for slot in range(NUM_SLOTS) if not torch.equal(pool[slot], before[slot])] == [2]
    assert y[1].eq(0).all()


@BY_LAYER
@pytest.mark.parametrize("needed_by", ["layer", "pool"])
@pytest.mark.parametrize("length", [1, 7])
def test_slots_are_refused_where_gradients_are_needed(layer, needed_by, length):
    pool = make_pool(layer).requires_grad_(needed_by == "pool")
    before = pool.detach().clone()
    layer.requires_grad_(needed_by == "layer")
    with pytest.raises(ValueError, match=r"slots update state in place .*: call the layer under torch.no_grad\(\)"):
        run(layer, pool, Slots(torch.tensor([0])), shape=(1, length))
    layer.requires_grad_(True)
    assert torch.equal(pool, before)
    assert pool.requires_grad == (needed_by == "pool")


@BY_LAYER
@pytest.mark.parametrize(
    ("saved_after", "bounds"), [([1], None), ([2, 7], None), ([2, 5], [0, 5, 7])], ids=["single token", "one", "packed"]
)
@torch.no_grad()
def test_saved_states_equal_those_of_shorter_inputs(layer, saved_after, bounds):
    length = saved_after[-1] if bounds is None else bounds[-1]
    x, positions = torch.randn(1, length, W), torch.arange(length)[None]
    pool, saved = make_pool(layer), torch.tensor([3, 4][: len(saved_after)])
    before = pool.clone()
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    of_sequences = torch.arange(1 if bounds is None else len(bounds) - 1)
    layer(x, positions, cu_seqlens, pool, Slots(of_sequences, saved, torch.tensor(saved_after)))
    for slot, count in zip(saved, saved_after, strict=True):
        _, expected = layer(x[:, :count], positions[:, :count], state=before[:1].clone())
        torch.testing.assert_close(pool[slot][None], expected, rtol=1e-4, atol=1e-5)


TWO, ONE = torch.tensor([0, 1]), torch.tensor([0])
BAD: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({"of_sequences": [0]}, {}, TypeError, "of_sequences must be a dense tensor, got list"),
    ({"of_sequences": torch.tensor([True])}, {}, TypeError, "of_sequences must be int32 or int64, got torch.bool"),
    ({"of_sequences": ONE[0]}, {}, ValueError, r"of_sequences must have one dimension, got shape \(\)"),
    ({"saved": ONE}, {}, ValueError, "saved and saved_after go together"),
    ({"saved_after": ONE + 1}, {}, ValueError, "saved and saved_after go together"),
    (
        {"saved": TWO, "saved_after": ONE + 1},
        {},
        ValueError,
        r"saved and saved_after must both be \[M\], got shapes \(2,\) and \(1,\)",
    ),
    ({}, {"pool": None}, ValueError, "slots are indices into a pool of states: give the pool as state"),
    ({"of_sequences": TWO}, {}, ValueError, r"slots.of_sequences must be \[N\] = \[1\], got shape \(2,\)"),
    ({}, {"cu_seqlens": torch.tensor([0, 3, 7])}, ValueError, r"slots.of_sequences must be \[N\] = \[2\]"),
    (
        {"of_sequences": TWO, "saved": ONE, "saved_after": ONE + 1},
        {"shape": (2, 7)},
        ValueError,
        "slots.saved needs B = 1, got 2: pack the sequences, with cu_seqlens",
    ),
    ({"of_sequences": ONE - 1}, {}, ValueError, r"slots.of_sequences must be in \[0, num_slots = 5\), got -1"),
    ({"of_sequences": ONE + 5}, {}, ValueError, r"slots.of_sequences must be in \[0, num_slots = 5\), got 5"),
    ({"of_sequences": ONE + 5}, {"shape": (1, 1)}, ValueError, r"must be -1 or in \[0, 5\), got 5 to 5"),
    (
        {"of_sequences": TWO * 0 + 3},
        {"cu_seqlens": torch.tensor([0, 3, 7])},
        ValueError,
        r"a slot is given for several states, in slots.of_sequences and saved: \[3, 3\]",
    ),
    (
        {"saved": ONE, "saved_after": ONE + 1},
        {},
        ValueError,
        r"a slot is given for several states, in slots.of_sequences and saved: \[0, 0\]",
    ),
    (
        {"saved": ONE - 1, "saved_after": ONE + 1},
        {},
        ValueError,
        r"slots.saved must be in \[0, num_slots = 5\), got -1",
    ),
]


@pytest.mark.parametrize(("slots", "inputs", "kind", "message"), BAD)
@torch.no_grad()
def test_bad_slots_are_refused(slots, inputs, kind, message):
    layer = LAYERS["lightning"]
    pool = make_pool(layer)
    before = pool.clone()
    with pytest.raises(kind, match=message):
        run(layer, **{"pool": pool, "slots": Slots(**{"of_sequences": ONE} | slots)} | inputs)
    assert torch.equal(pool, before)


@torch.no_grad()
def test_slots_may_be_int32():
    layer, x, positions = LAYERS["lightning"], torch.randn(1, 7, W), torch.arange(7)[None]
    pool = make_pool(layer)
    other = pool.clone()
    for states, dtype in ((pool, torch.int32), (other, torch.int64)):
        layer(x, positions, state=states, slots=Slots(*torch.tensor([[1], [2], [4]], dtype=dtype)))
    assert torch.equal(pool, other)
