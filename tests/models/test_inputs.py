"""Arguments of the forward pass: masks, positions, bounds of packed sequences, caches, and refused arguments."""

import copy
import math
from typing import Any

import pytest
import torch
from tiny_model import make_config, make_model, tokens
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache

from lightning_attention.models import (
    LightningCache,
    LightningForCausalLM,
    LightningForQuestionAnswering,
    LightningForSequenceClassification,
    LightningForTokenClassification,
    LightningModel,
)

HEADS = [
    LightningModel,
    LightningForCausalLM,
    LightningForSequenceClassification,
    LightningForTokenClassification,
    LightningForQuestionAnswering,
]


@pytest.fixture
def model() -> LightningForCausalLM:
    return make_model(torch.float32, positions="lrpe-d").eval()


def numbered(lengths: list[list[int]], width: int) -> torch.Tensor:
    """`[B, width]` numbers of sequences, from 1 in each batch row; a negative length is padding, numbered 0."""
    batch = []
    for batch_row in lengths:
        number, columns = 0, []
        for n in batch_row:
            number += n > 0
            columns += [number if n > 0 else 0] * abs(n)
        batch.append(columns + [0] * (width - len(columns)))
    return torch.tensor(batch)


def positions_of(numbers: torch.Tensor, *, padding: int = 0) -> torch.Tensor:
    """Positions that start at 0 with every sequence."""
    positions = torch.full_like(numbers, padding)
    for b in range(numbers.shape[0]):
        for number in numbers[b].unique():
            if number > 0:
                at = numbers[b] == number
                positions[b, at] = torch.arange(int(at.sum()))
    return positions


DESCRIPTIONS = {
    "position_ids and a mask": lambda n: {"position_ids": positions_of(n), "attention_mask": (n > 0).long()},
    "position_ids and a bool mask": lambda n: {"position_ids": positions_of(n, padding=1), "attention_mask": n > 0},
    "int32 position_ids": lambda n: {"position_ids": positions_of(n).int(), "attention_mask": (n > 0).int()},
    "uint8 position_ids": lambda n: {"position_ids": positions_of(n).byte(), "attention_mask": (n > 0).byte()},
    "seq_idx and a mask": lambda n: {"seq_idx": n, "attention_mask": (n > 0).long()},
    "int32 seq_idx": lambda n: {"seq_idx": n.int(), "attention_mask": n > 0},
    "a mask of numbers": lambda n: {"attention_mask": n},
    "a mask of numbers and position_ids": lambda n: {"attention_mask": n, "position_ids": positions_of(n)},
    "all of them": lambda n: {"attention_mask": n, "position_ids": positions_of(n), "seq_idx": n},
}
LAYOUTS = {
    "right padding": [[5, 4], [7, -2]],
    "left padding": [[-3, 6], [4, 5]],
    "padding between sequences": [[3, -2, 4], [1, 1, -1, 6]],
    "a batch row of padding": [[4, 5], [-9]],
    "padding everywhere": [[-1, 3, -1, 3, -1], [2, 2, 2, 2, -1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", DESCRIPTIONS)
def test_packed_and_padded_equals_separate(model, how, layout):
    numbers = numbered(LAYOUTS[layout], 9)
    ids = torch.where(numbers > 0, tokens(2, 9), 0)
    with torch.no_grad():
        output = model(ids, **DESCRIPTIONS[how](numbers))
        for b in range(2):
            for number in range(1, int(numbers[b].max()) + 1):
                at = numbers[b] == number
                alone = model(ids[b, at][None], use_cache=False).logits[0]
                torch.testing.assert_close(output.logits[b, at], alone, rtol=1e-4, atol=1e-4)
    assert output.cache is None


@pytest.mark.parametrize("counted", ["tokens", "columns"])
def test_padding_does_not_split_a_sequence(counted):
    """Positions may count tokens or columns. This model has no LRPE-d, so its logits do not depend on positions."""
    model = make_model(torch.float32, positions="decay").eval()
    ids, mask = tokens(2, 7), torch.tensor([[1, 1, 0, 0, 1, 1, 1], [0, 1, 0, 1, 1, 0, 1]])
    positions = {"tokens": (mask.cumsum(1) - 1).clamp_min(0), "columns": torch.arange(7).expand(2, -1)}[counted]
    with torch.no_grad():
        output = model(ids, attention_mask=mask, position_ids=positions)
        for b in range(2):
            at = mask[b] == 1
            torch.testing.assert_close(output.logits[b, at], model(ids[b, at][None]).logits[0], rtol=1e-4, atol=1e-4)
    assert output.cache is not None


def flattened(**options):
    collator = DataCollatorWithFlattening(return_tensors="pt", **options)
    sequences = [tokens(n, seed=n).tolist() for n in (5, 9, 1, 6)]
    return collator([{"input_ids": sequence, "labels": sequence} for sequence in sequences])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_flash_attn_kwargs": True},
        {"return_seq_idx": True},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True},
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
        {"return_seq_idx": True, "return_position_ids": False},
    ],
    ids=str,
)
def test_batches_of_the_flattening_collator_equal_separate(model, options):
    batch = flattened(**options)
    logits = model(**batch).logits[0].split([5, 9, 1, 6])
    for n, found in zip((5, 9, 1, 6), logits, strict=True):
        torch.testing.assert_close(found, model(tokens(1, n, seed=n)).logits[0], rtol=1e-4, atol=1e-4)


def test_flash_attention_names_equal_cu_seqlens(model):
    ids, bounds = tokens(1, 9), torch.tensor([0, 5, 9], dtype=torch.int32)
    flash = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds.clone(), "max_length_q": 5, "max_length_k": 5}
    torch.testing.assert_close(model(ids, **flash).logits, model(ids, cu_seqlens=bounds).logits)


PACKED = {"input_ids": tokens(1, 6), "cu_seqlens": torch.tensor([0, 2, 6])}
BAD_INPUTS = {
    "additive mask": ({"attention_mask": torch.zeros(2, 6)}, TypeError, "attention_mask must be bool, or integers"),
    "half additive mask": (
        {"attention_mask": torch.tensor([[-math.inf, 0, 0, 0, 0, 0]] * 2).half()},
        TypeError,
        "attention_mask must be bool, or integers",
    ),
    "weights for a mask": (
        {"attention_mask": torch.tensor([[1, 0.5] * 3] * 2)},
        TypeError,
        "attention_mask must be bo",
    ),
    "negative mask": ({"attention_mask": torch.tensor([[0, -1] * 3] * 2)}, ValueError, "must be 0 in the padding"),
    "4D mask": ({"attention_mask": torch.ones(2, 1, 6, 6).bool()}, ValueError, r"must be \[B, T\] = \[2, 6\]"),
    "mask of a list": ({"attention_mask": [[1] * 6] * 2}, TypeError, "attention_mask must be a tensor, got list"),
    "mask of a dict": ({"attention_mask": {}}, TypeError, "attention_mask must be a tensor, got dict"),
    "mask of other batch rows": ({"attention_mask": torch.ones(1, 6).long()}, ValueError, r"must be \[B, T\]"),
    "long mask": ({"attention_mask": torch.ones(2, 7).long()}, ValueError, r"must be \[B, T\]"),
    "float positions": ({"position_ids": torch.arange(6.0).expand(2, -1)}, TypeError, "position_ids must be integers"),
    "bool seq_idx": ({"seq_idx": torch.ones(2, 6).bool()}, TypeError, "seq_idx must be integers"),
    "short seq_idx": ({"seq_idx": torch.ones(2, 5).long()}, ValueError, r"seq_idx must be \[B, T\] = \[2, 6\]"),
    "list of positions": ({"position_ids": list(range(6))}, TypeError, "position_ids must be a tensor, got list"),
    "cu_seqlens of two batch rows": ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "one batch row"),
    "attentions": ({"output_attentions": True}, ValueError, "output_attentions must be False"),
    "several sequences, use_cache": (
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2), "use_cache": True},
        ValueError,
        "which a cache cannot hold",
    ),
    "numbers, cache": (
        {"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2]] * 2), "cache": LightningCache(3)},
        ValueError,
        "which a cache cannot hold",
    ),
    "restarting positions, cache": (
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2), "cache": LightningCache(3)},
        ValueError,
        "which a cache cannot hold",
    ),
    "ids and embeddings": (
        {"inputs_embeds": torch.zeros(2, 6, 24)},
        ValueError,
        "exactly one of input_ids and inputs_embeds",
    ),
    "neither ids nor embeddings": ({"input_ids": None}, ValueError, "exactly one of input_ids and inputs_embeds"),
    "cu_seqlens and padding": (
        PACKED | {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])},
        ValueError,
        "cu_seqlens goes with no padding",
    ),
    "cu_seqlens and cache": (PACKED | {"cache": LightningCache(3)}, ValueError, "cu_seqlens goes with no cache"),
    "only cu_seq_lens_q": ({"cu_seq_lens_q": torch.tensor([0, 6])}, ValueError, "go together"),
    "cu_seq_lens that differ": (
        {"cu_seq_lens_q": torch.tensor([0, 3, 6]), "cu_seq_lens_k": torch.tensor([0, 2, 6])},
        ValueError,
        "must be equal",
    ),
    "bounds by two names": (
        {n: torch.tensor([0, 6]) for n in ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")},
        ValueError,
        "names of one argument",
    ),
    "two caches": ({"cache": LightningCache(3), "past_key_values": LightningCache(3)}, ValueError, "two names"),
    "max_length alone": ({"max_length_q": 6, "max_length_k": 6}, ValueError, "go with cu_seq_lens_q"),
    "states and use_cache": (
        {"states": [torch.zeros(2, 3, 16, 8)] * 3, "position_ids": torch.arange(6)[None], "use_cache": True},
        ValueError,
        "states go with no use_cache=True",
    ),
    "a cache of other layers": ({"cache": LightningCache(2)}, ValueError, "the cache has 2 layers, the model 3"),
    "a tuple for a cache": ({"cache": ((torch.ones(2), torch.ones(2)),)}, TypeError, "cache must be a LightningCache"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs_are_refused(model, case):
    options, kind, message = BAD_INPUTS[case]
    with pytest.raises(kind, match=message):
        model(**{"input_ids": tokens(2, 6)} | options)


OTHER_SEQUENCES = {
    "numbers of a longer mask": ({"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2]])}, "which a cache cannot hold"),
    "numbers of a mask": (
        {"attention_mask": torch.tensor([[2, 2, 2]])},
        "attention_mask needs the columns in the cache",
    ),
    "padding in the cache": (
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])},
        "attention_mask marks other columns as padding than those that the cache has read",
    ),
    "positions that restart": ({"position_ids": torch.tensor([[0, 1, 2]])}, "which a cache cannot hold"),
    "positions that restart after padding": (
        {"position_ids": torch.tensor([[0, 0, 1]]), "attention_mask": torch.tensor([[0, 1, 1]])},
        "which a cache cannot hold",
    ),
    "seq_idx": ({"seq_idx": torch.tensor([[1, 1, 1]])}, "seq_idx goes with no earlier tokens in the cache"),
}


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("case", OTHER_SEQUENCES)
@torch.no_grad()
def test_a_sequence_does_not_go_on_from_another_in_the_cache(model, case, length):
    options, message = OTHER_SEQUENCES[case]
    options = {name: x[:, : x.shape[1] - 3 + length] for name, x in options.items()}
    if case == "positions that restart after padding" and length == 1:
        return  # padding alone starts nothing
    ids = tokens(1, 3 + length)
    cache = model(ids[:, :3], use_cache=True).cache
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=message):
        model(ids[:, 3:], cache=cache, **options)
    found, expected = model(ids[:, 3:], cache=cache).logits, model(ids[:, 3:], cache=before).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_mask": torch.tensor([[2, 2, 2, 2, 2, 2], [0, 2, 2, 2, 2, 2]])},
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1]])},
        {"attention_mask": torch.ones(2, 3), "position_ids": torch.tensor([[3, 4, 5], [2, 3, 4]])},
        {"position_ids": torch.tensor([[3, 4, 5], [3, 4, 5]])},  # positions that count columns
    ],
    ids=["numbered", "padded", "float", "positions"],
)
@torch.no_grad()
def test_a_sequence_goes_on_from_the_cache(model, options):
    ids, mask = tokens(2, 6), torch.tensor([[1, 1, 1], [0, 1, 1]])
    cache = model(ids[:, :3], attention_mask=mask, use_cache=True).cache
    logits = model(ids[:, 3:], cache=cache, **options).logits
    expected = model(ids[:1]).logits[:, 3:]
    torch.testing.assert_close(logits[:1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [{}, {"layer_pattern": "1:1"}, {"layer_pattern": "0:1"}], ids=str)
@torch.no_grad()
def test_positions_of_the_caller_are_continued(kind):
    model = LightningForCausalLM(make_config(**kind)).eval().double()
    ids, at = tokens(2, 9), torch.arange(20, 29)[None]
    expected = model(ids, position_ids=at, use_cache=False).logits[:, 5:]
    cache = model(ids[:, :5], position_ids=at[:, :5], use_cache=True).cache
    assert cache.positions.tolist() == [25, 25]
    found = [model(ids[:, t : t + 2], cache=cache).logits for t in (5, 7)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected)


@torch.no_grad()
def test_positions_that_count_padding_are_continued():
    model = LightningForCausalLM(make_config(layer_pattern="1:1")).eval().double()
    ids, mask, at = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64), torch.arange(9)[None]
    mask[1, :3] = 0
    expected = model(ids, attention_mask=mask, position_ids=at, use_cache=False).logits[:, 6:]
    cache = model(ids[:, :6], attention_mask=mask[:, :6], position_ids=at[:, :6], use_cache=True).cache
    torch.testing.assert_close(model(ids[:, 6:], attention_mask=mask, cache=cache).logits, expected)


@torch.no_grad()
def test_positions_that_leave_a_gap_after_the_cache_are_refused(model):
    ids = tokens(1, 8)
    cache = model(ids[:, :5], use_cache=True).cache
    with pytest.raises(ValueError, match="which a cache cannot hold"):
        model(ids[:, 5:], position_ids=torch.tensor([[6, 7, 8]]), cache=cache)


@torch.no_grad()
def test_as_many_other_columns_of_padding_are_refused(model):
    ids = tokens(1, 8)
    cache = model(ids[:, :6], attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1]]), use_cache=True).cache
    with pytest.raises(ValueError, match="marks other columns as padding than those that the cache has read"):
        model(ids[:, 6:], attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]]), cache=cache)
    model(ids[:, 6:], attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]]), cache=cache)


@pytest.mark.parametrize("kind", [{}, {"layer_pattern": "0:1"}], ids=["linear", "softmax"])
@torch.no_grad()
def test_a_cache_of_an_interrupted_call_is_refused(kind):
    def interrupt(*_):
        raise KeyboardInterrupt

    model, ids = LightningForCausalLM(make_config(**kind)).eval(), tokens(1, 8)
    cache = model(ids[:, :7], use_cache=True).cache
    last: Any = model.model.layers[-1]
    handle = last.mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, 7:], cache=cache)
    handle.remove()
    with pytest.raises(ValueError, match="an earlier call with this cache was interrupted"):
        model(ids[:, 7:], cache=cache)
    cache.reset()
    torch.testing.assert_close(model(ids, cache=cache).logits, model(ids).logits)


@pytest.mark.parametrize("padded", [False, True])
def test_a_float_mask_of_zeros_and_ones_is_a_mask(model, padded):
    """PEFT prepends such a mask for virtual tokens."""
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0 if padded else 1
    ids = tokens(2, 6)
    assert torch.equal(model(ids, attention_mask=mask.float()).logits, model(ids, attention_mask=mask).logits)


def test_cache_of_another_batch_size_is_refused(model):
    with torch.no_grad():
        cache = model(tokens(2, 6), use_cache=True).cache
    with pytest.raises(ValueError, match=r"the cache holds states of shape \(2, 3, 16, 8\)"):
        model(tokens(1, 6), cache=cache)


@pytest.mark.parametrize("ids", [tokens(6), tokens(1, 2, 6)], ids=["one dimension", "three dimensions"])
def test_ids_of_other_dimensions_are_refused(model, ids):
    with pytest.raises(ValueError, match=r"input_ids must be \[B, T\]"):
        model(ids)


@pytest.mark.parametrize(
    ("bounds", "kind", "message"),
    [
        (torch.tensor([0, 7]), ValueError, "must run from 0 to T = 6"),
        (torch.tensor([0, 4, 2, 6]), ValueError, "must not decrease"),
        (torch.tensor([[0, 6]]), ValueError, r"must be \[N \+ 1\]"),
        (torch.tensor([0.0, 6.0]), TypeError, "must be int32 or int64"),
        ([0, 6], TypeError, "must be a tensor"),
    ],
    ids=str,
)
def test_bad_cu_seqlens_are_refused(model, bounds, kind, message):
    with pytest.raises(kind, match=message):
        model(tokens(1, 6), cu_seqlens=bounds)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["token_type_ids", "head_mask", "cache_position", "labls", "use_cach"])
def test_unknown_arguments_are_refused_by_name(head, name):
    with pytest.raises(TypeError, match=name):
        head(make_config()).eval()(tokens(1, 4), **{name: None})


@pytest.mark.parametrize("make", [DynamicCache, StaticCache], ids=["dynamic", "static"])
def test_other_caches_are_refused(model, make):
    options: dict[str, Any] = {"max_cache_len": 9} if make is StaticCache else {}
    with pytest.raises(TypeError, match="must be a LightningCache"):
        model.generate(tokens(1, 4), past_key_values=make(config=model.config, **options), max_new_tokens=3)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_has_both_names(model, name):
    ids, cache = tokens(2, 9), LightningCache(3)
    with torch.no_grad():
        expected = model(ids).logits[:, 5:]
        output = model(ids[:, :5], **{name: cache})
        assert output.cache is output.past_key_values is cache
        torch.testing.assert_close(model(ids[:, 5:], **{name: cache}).logits, expected, rtol=1e-4, atol=1e-4)
        base = model.model(ids[:, :5], use_cache=True)
        assert base.cache is base.past_key_values is not None
    first = model.generate(ids[:, :4], max_new_tokens=4, do_sample=False, **{name: (again := LightningCache(3))})
    assert again.get_seq_length() == 7
    longer = torch.cat([first, ids[:, :3]], dim=1)
    second = model.generate(longer, max_new_tokens=4, do_sample=False, **{name: again})
    assert torch.equal(second, model.generate(longer, max_new_tokens=4, do_sample=False))


def test_loss_arguments_reach_the_loss(model):
    ids = tokens(2, 8)
    mean = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=7).loss, mean * 14 / 7)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, mean)
    with pytest.raises(ValueError, match="labels need all logits"):
        model(ids, labels=ids, logits_to_keep=1)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_generate_works_with_gradient_checkpointing(model):
    """TRL's GRPO generates between two training steps."""
    ids = tokens(2, 6)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.train().generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_cache_of_inference_mode_continues_outside(model):
    ids = tokens(2, 9)
    with torch.inference_mode():
        cache = model(ids[:, :4], use_cache=True).cache
    with torch.no_grad():
        step = model(ids[:, 4:5], cache=cache).logits
        rest = model(ids[:, 5:], cache=cache).logits
        expected = model(ids).logits[:, 4:]
    torch.testing.assert_close(torch.cat([step, rest], dim=1), expected, rtol=1e-4, atol=1e-4)


def test_crop_is_refused():
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        LightningCache(2).crop(-1)
