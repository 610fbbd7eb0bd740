"""`/v1/completions`, with OpenAI's client."""

from typing import Any

import pytest
import torch
from serving.api.live import NAME, Live, events_of, greedy, live_server, scripted, text_of

from lightning_attention.inference import Engine, SamplingOptions, encode
from lightning_attention.serving.service import choice_seed


def complete(live: Live, prompt: Any = "to be", **options: Any) -> Any:
    return live.client.completions.create(model=NAME, prompt=prompt, **{"temperature": 0, **options})


@pytest.mark.parametrize(
    "prompt",
    ["to be", "", "größe 漢字", "<|eos|>a", [256, 104, 105], ["to be", "or not"], [[256, 1], [256, 2, 3]]],
    ids=["text", "empty", "unicode", "name of a token", "tokens", "texts", "lists of tokens"],
)
def test_greedy_answers_equal_generate(live, loaded, prompt):
    model, tokenizer = loaded
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    ids = [encode(tokenizer, each) if isinstance(each, str) else each for each in prompts]
    expected = [greedy(model, each, 20) for each in ids]
    answer = complete(live, prompt, max_tokens=20)
    assert [choice.text for choice in answer.choices] == [text_of(tokenizer, tokens) for tokens in expected]
    assert [choice.index for choice in answer.choices] == list(range(len(prompts)))
    assert answer.object == "text_completion"
    num_tokens = sum(map(len, expected))
    assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": sum(map(len, ids)),
        "completion_tokens": num_tokens,
        "total_tokens": sum(map(len, ids)) + num_tokens,
    }


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 30},
        {"max_tokens": 30, "temperature": 1, "seed": 3, "n": 3},
        {"max_tokens": 30, "logprobs": 2},
        {"max_tokens": 30, "echo": True, "n": 2, "temperature": 1, "seed": 5},
        {"max_tokens": 40, "temperature": 1, "seed": 4, "stop": ["e", "a", "~~"]},
    ],
    ids=["greedy", "choices", "logprobs", "echo", "stop"],
)
def test_stream_equals_the_whole_answer(live, options):
    whole = complete(live, **options)
    texts: dict[int, str] = {}
    tokens: dict[int, list[Any]] = {}
    reasons, usages = {}, []
    for chunk in complete(live, stream=True, stream_options={"include_usage": True}, **options):
        usages += [chunk.usage] if chunk.usage else []
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens if choice.logprobs else [])
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    assert [texts[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]
    assert [reasons[choice.index] for choice in whole.choices] == [choice.finish_reason for choice in whole.choices]
    assert usages == [whole.usage]
    if "logprobs" in options:
        assert tokens[0] == whole.choices[0].logprobs.tokens


def test_a_stream_has_the_form_of_server_sent_events(live):
    response = live.post("/v1/completions", prompt="a", max_tokens=3, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events_of(response)
    assert last == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_the_defaults_are_those_of_openai(live, loaded):
    model, tokenizer = loaded
    answer = live.client.completions.create(model=NAME, prompt="to be", seed=7)
    options = SamplingOptions(max_new_tokens=16, temperature=1.0, seed=7)
    (expected,) = Engine(model).run([encode(tokenizer, "to be")], options)
    assert answer.choices[0].text == text_of(tokenizer, expected.tokens)


def test_choices_with_a_seed_differ_and_repeat(live):
    first, second = (complete(live, temperature=1, seed=11, n=4, max_tokens=12) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 4
    assert texts == [choice.text for choice in second.choices]
    assert texts[0] == complete(live, temperature=1, seed=11, max_tokens=12).choices[0].text
    assert first.usage.completion_tokens == 48
    assert first.usage.prompt_tokens == 6


@pytest.mark.parametrize("seed", [-(1 << 63), 0, (1 << 63) - 1])
def test_derived_seeds_are_valid(seed):
    for i in range(3):
        SamplingOptions(seed=choice_seed(seed, i))


@pytest.mark.parametrize(
    ("answer", "stop", "text", "reason"),
    [
        ("one né two", ["é tw"], "one n", "stop"),
        ("one two", ["two", "e t"], "on", "stop"),
        ("one two", ["one"], "", "stop"),
        ("one tw", ["two"], "one tw", "length"),
        ("aaab", ["aab"], "a", "stop"),
    ],
    ids=["within a character", "the first of two", "at the start", "only begun", "overlapping"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_stop_text_over_several_tokens_ends_the_answer(loaded, answer, stop, text, reason, stream):
    script = answer.encode()
    with scripted(loaded[0], script), live_server(*loaded) as live:
        found = complete(live, max_tokens=len(script), stop=stop, stream=stream)
        choices = [chunk.choices[0] for chunk in found] if stream else found.choices
    assert "".join(choice.text for choice in choices) == text
    assert choices[-1].finish_reason == reason


def test_a_stop_token_ends_the_answer(live, loaded, monkeypatch):
    model, tokenizer = loaded
    tokens = greedy(model, encode(tokenizer, "to be"), 10)
    monkeypatch.setattr(model.generation_config, "eos_token_id", tokens[6])
    end = tokens.index(tokens[6]) + 1
    answer = complete(live, max_tokens=10)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == end


@pytest.mark.parametrize("count", [0, 3])
def test_logprobs_are_those_of_the_model(live, loaded, count):
    model, tokenizer = loaded
    # Temperature and top p change the choice, not the log-probabilities.
    answer = complete(live, max_tokens=8, logprobs=count, temperature=0.7, top_p=0.9, seed=2)
    found = answer.choices[0].logprobs
    ids = encode(tokenizer, "to be")
    options = SamplingOptions(max_new_tokens=8, temperature=0.7, top_p=0.9, seed=2)
    (completion,) = Engine(model).run([ids], options)
    with torch.no_grad():
        logits = model(torch.tensor([ids + completion.tokens])).logits[0, len(ids) - 1 : -1]
    expected = logits.log_softmax(-1)
    chosen = expected[range(8), completion.tokens]
    assert found.token_logprobs == pytest.approx(chosen.tolist(), abs=1e-5)
    top = expected.topk(count, dim=-1).values if count else expected[:, :0]
    for i, each in enumerate(found.top_logprobs):
        values = sorted({*top[i].tolist(), chosen[i].item()}, reverse=True)
        assert sorted(each.values(), reverse=True) == pytest.approx(values, abs=1e-5)
    assert found.text_offset[0] == 0
    assert found.text_offset == sorted(found.text_offset)


def test_echo_puts_the_prompt_before_the_answer(live):
    alone, echoed = (complete(live, max_tokens=5, echo=echo) for echo in (False, True))
    assert echoed.choices[0].text == "to be" + alone.choices[0].text
    tokens = complete(live, [256, 104, 105], max_tokens=5, echo=True)
    assert tokens.choices[0].text.startswith("hi")


def test_fields_that_change_nothing_are_accepted(live):
    plain = live.post("/v1/completions", prompt="a", temperature=0).json()["choices"]
    neutral = {"best_of": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "suffix": None}
    others = {"user": "me", "metadata": {"a": "b"}, "n": None, "stop": None, "stream": False, "top_k": 0, "min_p": 0}
    found = live.post("/v1/completions", prompt="a", temperature=0, **neutral, **others)
    assert found.json()["choices"] == plain


def test_models_describe_the_model(live, loaded):
    (model,) = live.client.models.list().data
    assert model.id == NAME
    assert live.client.models.retrieve(NAME) == model
    extra = model.model_extra or {}
    assert extra["parameters"] == sum(x.numel() for x in loaded[0].parameters())
    assert extra["state_bytes"] * live.service.engine.pool.num_slots == live.service.engine.pool.nbytes
    assert extra["max_length"] is None
