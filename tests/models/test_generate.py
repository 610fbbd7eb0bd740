import pytest
import torch
from tiny_model import make_config, tokens

from lightning_attention.models import LightningCache, LightningForCausalLM


@pytest.fixture
def model() -> LightningForCausalLM:
    torch.manual_seed(1)
    return LightningForCausalLM(make_config(eos_token_id=None)).eval()


def greedy(model, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Without a cache: the whole text through the model for every token."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids


def test_greedy(model):
    ids = tokens(2, 9)
    assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False), greedy(model, ids, 30))


def test_left_padding(model):
    lengths = [3, 9, 6]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, 9 - n :], mask[row, 9 - n :] = tokens(n, seed=row), 1
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    for row, n in enumerate(lengths):
        assert torch.equal(batch[row, 9 - n :], greedy(model, tokens(1, n, seed=row), 20)[0])


def test_sampling_follows_the_seed(model):
    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(tokens(1, 5), max_new_tokens=30, do_sample=True, num_return_sequences=2)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    assert not torch.equal(*sample(0))


@pytest.mark.parametrize("num_beams", [2, 4])
def test_beams_are_those_without_a_cache(model, num_beams):
    """So states and positions follow their beam when beams are reordered."""
    options = {"max_new_tokens": 15, "num_beams": num_beams, "do_sample": False}
    ids, mask = tokens(2, 7), torch.tensor([[1] * 7, [0, 0] + [1] * 5])
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))


def test_a_conversation_goes_on(model):
    """generate() again, with the state of the last one and the text so far, as chat loops do."""
    cache, ids = LightningCache(3), tokens(1, 8)
    first = model.generate(ids, max_new_tokens=10, do_sample=False, past_key_values=cache)
    text = torch.cat([first, tokens(1, 5, seed=3)], dim=1)
    second = model.generate(text, max_new_tokens=10, do_sample=False, past_key_values=cache)
    assert torch.equal(second, greedy(model, text, 10))


def test_the_cache_follows_its_rows(model):
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


def test_repeated_rows_go_on_where_they_were(model):
    """Rows of unequal lengths, each as several beams in a row: a beam has the state and the position of its text."""
    lengths, beams, following = [3, 9, 6], 2, tokens(6, 1, seed=9)
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, 9 - n :], mask[row, 9 - n :] = tokens(n, seed=row), 1
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        cache.batch_repeat_interleave(beams)
        logits = model(following, past_key_values=cache).logits
        for beam in range(3 * beams):
            row = beam // beams
            text = torch.cat([tokens(1, lengths[row], seed=row), following[beam : beam + 1]], dim=1)
            expected = model(text, use_cache=False).logits[:, -1:]
            torch.testing.assert_close(logits[beam : beam + 1], expected, rtol=1e-4, atol=1e-4)


def test_what_the_state_cannot_do_is_refused(model):
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(tokens(1, 5), max_new_tokens=5, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="cache_implementation must be None"):
        model.generate(tokens(1, 5), max_new_tokens=5, cache_implementation="static")
