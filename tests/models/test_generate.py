"""`generate()` with a cache writes the text that the model gives without one."""

import pytest
import torch
from tiny_model import make_config, tokens

from lightning_attention.models import LightningCache, LightningForCausalLM


@pytest.fixture
def model() -> LightningForCausalLM:
    torch.manual_seed(1)
    return LightningForCausalLM(make_config(eos_token_id=None)).eval()


def greedy(model, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy text without a cache: the model reads the complete text for every token."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids


def test_greedy_equals_no_cache(model):
    ids = tokens(2, 9)
    assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False), greedy(model, ids, 30))


LENGTHS = [3, 9, 6]


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """`[3, 9]` ids and mask; batch row b has the tokens of seed b."""
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for b, n in enumerate(LENGTHS):
        ids[b, 9 - n :], mask[b, 9 - n :] = tokens(n, seed=b), 1
    return ids, mask


def test_left_padded_equals_unpadded(model):
    ids, mask = left_padded()
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    for b, n in enumerate(LENGTHS):
        assert torch.equal(batch[b, 9 - n :], greedy(model, tokens(1, n, seed=b), 20)[0])


def test_sampling_depends_on_the_seed_alone(model):
    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(tokens(1, 5), max_new_tokens=30, do_sample=True, num_return_sequences=2)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    assert not torch.equal(*sample(0))


@pytest.mark.parametrize("num_beams", [2, 4])
def test_beam_search_equals_no_cache(model, num_beams):
    """States and positions follow their beam when beams are reordered."""
    options = {"max_new_tokens": 15, "num_beams": num_beams, "do_sample": False}
    ids, mask = tokens(2, 7), torch.tensor([[1] * 7, [0, 0] + [1] * 5])
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))


def test_cache_continues_a_conversation(model):
    cache, ids = LightningCache(3), tokens(1, 8)
    first = model.generate(ids, max_new_tokens=10, do_sample=False, past_key_values=cache)
    text = torch.cat([first, tokens(1, 5, seed=3)], dim=1)
    second = model.generate(text, max_new_tokens=10, do_sample=False, past_key_values=cache)
    assert torch.equal(second, greedy(model, text, 10))


def test_cache_repeats_selects_and_resets_batch_rows(model):
    ids = tokens(3, 10)
    with torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).past_key_values
        expected = model(ids, use_cache=False).logits[:, -1:]
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([4, 0]))
        logits = model(ids[[2, 0], 9:], past_key_values=cache).logits
        torch.testing.assert_close(logits, expected[[2, 0]], rtol=1e-4, atol=1e-4)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model(ids[[2, 0]], past_key_values=cache).logits[:, -1:]
        torch.testing.assert_close(again, expected[[2, 0]], rtol=1e-4, atol=1e-4)


def test_repeated_batch_rows_keep_states_and_positions(model):
    """Batch rows of different lengths, each repeated for its beams."""
    beams, following = 2, tokens(6, 1, seed=9)
    ids, mask = left_padded()
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).cache
        cache.batch_repeat_interleave(beams)
        logits = model(following, cache=cache).logits
        for i in range(6):
            b = i // beams
            text = torch.cat([tokens(1, LENGTHS[b], seed=b), following[i : i + 1]], dim=1)
            expected = model(text, use_cache=False).logits[:, -1:]
            torch.testing.assert_close(logits[i : i + 1], expected, rtol=1e-4, atol=1e-4)


def test_assisted_generation_and_static_caches_are_refused(model):
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(tokens(1, 5), max_new_tokens=5, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="cache_implementation must be None"):
        model.generate(tokens(1, 5), max_new_tokens=5, cache_implementation="static")


@pytest.mark.parametrize("name", ["input_ids", "inputs", None])
def test_text_that_the_cache_has_read_is_refused(model, name):
    ids = tokens(1, 8)
    cache = model(ids, use_cache=True).cache
    text, given = ((ids,), {}) if name is None else ((), {name: ids})
    with pytest.raises(ValueError, match="the text has 8 columns, and the cache has read 8"):
        model.generate(*text, **given, cache=cache, max_new_tokens=3)
    assert cache.length == 8


def test_a_cache_without_use_cache_is_refused(model):
    with pytest.raises(ValueError, match="use_cache=False contradicts a cache"):
        model.generate(tokens(1, 8), cache=LightningCache(3), use_cache=False, max_new_tokens=3)


def test_a_conversation_whose_padding_was_read_is_refused(model):
    """generate() pads a batch row that ends early, and the model reads the padding."""
    ids = tokens(2, 7)
    stop = int(greedy(model, ids, 1)[0, -1])
    cache = LightningCache(3)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": stop, "pad_token_id": 0}
    first = model.generate(ids, cache=cache, **options)
    assert (first[0] == 0).any()
    text = torch.cat([first, tokens(2, 3, seed=1)], dim=1)
    with pytest.raises(ValueError, match="marks other columns as padding than those that the cache has read"):
        model.generate(text, attention_mask=(text != 0).long(), cache=cache, **options)


def test_padding_on_the_right_is_refused(model):
    """The next token follows the last column, which is padding."""
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[1, 6:] = 0
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="marks the last column as padding: pad texts to continue on the left"):
            model.generate(ids, attention_mask=mask, max_new_tokens=2, use_cache=use_cache)


def test_beams_with_a_cache_are_refused(model):
    """It would go on from the beam that was extended last, which need not be the one returned."""
    with pytest.raises(ValueError, match="beams go with no cache of yours"):
        model.generate(tokens(1, 8), cache=LightningCache(3), num_beams=3, max_new_tokens=3)


def test_padding_takes_no_positions():
    options = {"linear_attention": "elu", "max_position_embeddings": 10}
    model = LightningForCausalLM(make_config(**options)).eval()
    ids, mask = tokens(1, 7), torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False)
    assert torch.equal(padded[:, 7:], greedy(model, ids[:, 4:], 7)[:, 3:])
    with pytest.raises(ValueError, match="11 tokens exceed the 10 positions"):
        model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
