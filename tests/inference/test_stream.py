"""Text stream of one prompt."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import save_checkpoint

from lightning_attention.inference import Engine, SamplingOptions, encode, load, stream

PAD = 258
GREEDY = SamplingOptions(max_new_tokens=40, temperature=0)
SAMPLED = {
    "sampled": SamplingOptions(max_new_tokens=40, seed=3),
    "all options": SamplingOptions(40, temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.2, seed=4),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Any:
    model, tokenizer = load(save_checkpoint(tmp_path_factory.mktemp("run")))
    return model.double(), tokenizer


def count_calls(model, monkeypatch) -> list[int]:
    """List to which every call of the model appends its number of tokens."""
    calls, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **others: calls.append(ids.numel()) or forward(ids, **others))
    return calls


def text_of(loaded: Any, prompt: str, options: SamplingOptions) -> str:
    return "".join(stream(loaded[0], loaded[1], prompt, options))


@pytest.mark.parametrize(
    "prompt", ["to be", "", "<|pad|>a<|pad|>", "banana"], ids=["text", "empty", "padding's name", "padding tokens"]
)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_text_equals_generate(loaded: Any, monkeypatch, prompt, penalty):
    model, tokenizer = loaded
    if prompt == "banana":
        for config in (model.config, model.generation_config):
            monkeypatch.setattr(config, "pad_token_id", ord("a"))
    ids = torch.tensor([encode(tokenizer, prompt)])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, repetition_penalty=penalty
    )[0, ids.shape[1] :]
    options = SamplingOptions(max_new_tokens=40, temperature=0, repetition_penalty=penalty)
    assert text_of(loaded, prompt, options) == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("options", SAMPLED.values(), ids=SAMPLED)
def test_sampled_text_equals_the_engine(loaded: Any, options):
    model, tokenizer = loaded
    (completion,) = Engine(model).run([tokenizer("to be").input_ids], options)
    assert text_of(loaded, "to be", options) == tokenizer.decode(completion.tokens, skip_special_tokens=True)


@pytest.mark.parametrize("options", [GREEDY, *SAMPLED.values()], ids=["greedy", *SAMPLED])
def test_the_global_random_state_is_unchanged(loaded: Any, options):
    before = torch.random.get_rng_state()
    text_of(loaded, "a", options)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("leave", [lambda texts: texts.close(), lambda _: None], ids=["closed", "forgotten"])
def test_generation_stops_with_its_reader(loaded: Any, monkeypatch, leave):
    calls = count_calls(loaded[0], monkeypatch)
    texts = stream(loaded[0], loaded[1], "a", SamplingOptions(max_new_tokens=10_000, temperature=0))
    while not next(texts):
        pass
    before = len(calls)
    assert before <= 5
    leave(texts)
    del texts
    gc.collect()
    assert len(calls) == before


def test_each_token_is_one_call_of_the_model(loaded: Any, monkeypatch):
    calls = count_calls(loaded[0], monkeypatch)
    text_of(loaded, "to be", SamplingOptions(max_new_tokens=9, temperature=0))
    assert calls == [6] + [1] * 8


@pytest.mark.parametrize("eos", ["generation_config", "config"])
@pytest.mark.parametrize("as_list", [False, True], ids=["one", "list"])
def test_a_stop_token_of_the_model_ends_the_text(loaded: Any, monkeypatch, eos, as_list):
    model, tokenizer = loaded
    (completion,) = Engine(model).run([tokenizer("a").input_ids], GREEDY)
    token = completion.tokens[5]
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(getattr(model, eos), "eos_token_id", [7, token] if as_list else token)
    expected = completion.tokens[: completion.tokens.index(token) + 1]
    assert text_of(loaded, "a", GREEDY) == tokenizer.decode(expected, skip_special_tokens=True)
    assert Engine(model).run([tokenizer("a").input_ids], GREEDY)[0].tokens == expected


def test_stop_tokens_of_the_generation_config_come_first(loaded: Any, monkeypatch):
    model, tokenizer = loaded
    (completion,) = Engine(model).run([tokenizer("a").input_ids], GREEDY)
    monkeypatch.setattr(model.config, "eos_token_id", completion.tokens[0])
    monkeypatch.setattr(model.generation_config, "eos_token_id", completion.tokens[3])
    expected = completion.tokens[: completion.tokens.index(completion.tokens[3]) + 1]
    ids = torch.tensor([tokenizer("a").input_ids])
    assert model.generate(ids, max_new_tokens=40, do_sample=False)[0, 2:].tolist() == expected
    assert Engine(model).run([tokenizer("a").input_ids], GREEDY)[0].tokens == expected


def test_ignored_options_of_the_generation_config_are_logged(loaded: Any, monkeypatch, caplog):
    model, _ = loaded
    monkeypatch.setattr(model.generation_config, "suppress_tokens", [3])
    monkeypatch.setattr(model.generation_config, "temperature", 0.5)  # set by the caller's options
    Engine(model)
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == ["suppress_tokens"]


def test_an_invalid_prompt_is_refused_before_generation(loaded: Any):
    with pytest.raises(TypeError, match="prompt must be a string"):
        stream(loaded[0], loaded[1], 3, GREEDY)  # pyright: ignore


@pytest.mark.parametrize("options", [GREEDY, *SAMPLED.values()], ids=["greedy", *SAMPLED])
def test_nonfinite_weights_are_an_error(tmp_path: Path, options):
    model, tokenizer = load(save_checkpoint(tmp_path))
    model.lm_head.weight.data[5, 0] = float("nan")
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        text_of((model, tokenizer), "a", options)
