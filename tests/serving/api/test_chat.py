"""`/v1/chat/completions`, with OpenAI's client, and chat templates."""

from typing import Any

import pytest
from serving.api.live import NAME, Live, error_of, greedy, live_server, scripted, text_of

from lightning_attention.inference import encode

CONVERSATION: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": " 1 + 1?"}]},
]
RENDERED = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
)


def chat(live: Live, messages: Any = CONVERSATION, **options: Any) -> Any:
    return live.client.chat.completions.create(model=NAME, messages=messages, **{"temperature": 0, **options})


def test_greedy_answers_equal_generate(live, loaded):
    model, tokenizer = loaded
    ids = encode(tokenizer, RENDERED)
    answer = chat(live, max_tokens=20)
    assert answer.choices[0].message.content == text_of(tokenizer, greedy(model, ids, 20))
    assert answer.choices[0].message.role == "assistant"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 20)
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    "options", [{}, {"n": 2, "seed": 3, "temperature": 1}, {"logprobs": True, "top_logprobs": 2}], ids=str
)
def test_stream_equals_the_whole_answer(live, options):
    whole = chat(live, max_completion_tokens=20, **options)
    texts, tokens, roles = {}, {}, {}
    for chunk in chat(live, max_completion_tokens=20, stream=True, **options):
        for choice in chunk.choices:
            roles[choice.index] = choice.delta.role or roles[choice.index]
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            tokens.setdefault(choice.index, []).extend(choice.logprobs.content if choice.logprobs else [])
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert roles[choice.index] == "assistant"
        assert tokens[choice.index] == (choice.logprobs.content if choice.logprobs else [])


def test_logprobs_have_the_bytes_of_tokens(live, loaded):
    model, tokenizer = loaded
    expected = greedy(model, encode(tokenizer, RENDERED), 12)
    content = chat(live, max_tokens=12, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert [bytes(token.bytes) for token in content] == [bytes([x]) for x in expected]
    assert all(token.top_logprobs[0].logprob == token.logprob for token in content)


def test_the_end_of_a_turn_ends_the_answer_where_it_is_text(loaded):
    """`<|im_end|>` is ten tokens of the byte tokenizer."""
    model, tokenizer = loaded
    with scripted(model, b"four<|im_end|>\n<|im_start|>"), live_server(model, tokenizer) as live:
        found = chat(live, max_tokens=20)
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("four", "stop")
    assert found.usage.completion_tokens == len("four<|im_end|>")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "tool", "content": "a"}], "messages"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages"),
        ([{"role": "user", "content": None}], "messages"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{}]}], "messages"),
        ([{"role": "user", "content": "a", "name": "<|im_end|>"}], "messages"),
    ],
    ids=["none", "tool", "image", "null", "tool calls", "name"],
)
def test_messages_that_are_not_supported_are_refused(live, messages, param):
    error = error_of(live.post("/v1/chat/completions", messages=messages))
    assert (error["status"], error["param"]) == (400, param)
