"""Answers to lines of prompts."""

import json
from copy import deepcopy

import pytest
import torch
from tiny_model import make_config

from lightning_attention.inference import Engine, SamplingOptions
from lightning_attention.inference.batch import answer_lines, to_json
from lightning_attention.models import LightningForCausalLM
from lightning_attention.training import byte_tokenizer

GREEDY = SamplingOptions(max_new_tokens=12, temperature=0)
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> LightningForCausalLM:
    torch.manual_seed(1)
    ids = {"bos_token_id": 256, "eos_token_id": None, "pad_token_id": 258}
    return LightningForCausalLM(make_config(vocab_size=len(TOKENIZER), **ids)).double().eval()


def answers(model, *lines: str | bytes | dict, options: SamplingOptions = GREEDY) -> list[dict]:
    """Answers in the order of the lines."""
    texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    engine = Engine(model, max_requests=2)
    found = list(answer_lines(engine, TOKENIZER, iter(texts), options))
    assert engine.pool.num_free == 2
    return sorted(found, key=lambda answer: answer["index"])


def generated(model, prompt: str, count: int) -> str:
    ids = model.generate(torch.tensor([[256, *prompt.encode()]]), max_new_tokens=count, do_sample=False)
    return str(TOKENIZER.decode(ids[0, 1 + len(prompt.encode()) :], skip_special_tokens=True))


def test_answers_equal_generate(model):
    prompts = ["to be", "", "or not to be, that is", "the question", "é"]
    found = answers(model, *({"prompt": prompt, "id": i} for i, prompt in enumerate(prompts)))
    expected = [
        {"prompt": prompt, "id": i, "index": i, "text": generated(model, prompt, 12)}
        for i, prompt in enumerate(prompts)
    ]
    assert found == [answer | {"tokens": 12, "finish_reason": "length"} for answer in expected]


def test_options_of_a_line_replace_the_defaults(model):
    short, sampled, again = answers(
        model,
        {"prompt": "a", "max_new_tokens": 3},
        {"prompt": "a", "temperature": 1, "seed": 5},
        {"prompt": "a", "temperature": 1.0, "seed": 5, "top_k": 0},
    )
    assert short["text"] == generated(model, "a", 3)
    assert sampled["text"] == again["text"] != generated(model, "a", 12)


def test_an_answer_ends_before_a_stop_text(model):
    text = generated(model, "a", 12)
    stop = text[4:6]
    one, several, none = answers(
        model,
        {"prompt": "a", "stop": stop},
        {"prompt": "a", "stop": ["not there", text[7:], stop]},
        {"prompt": "a", "stop": []},
    )
    assert one["text"] == several["text"] == text[: text.index(stop)]
    assert one["finish_reason"] == "stop"
    assert one["tokens"] < 12
    assert none["text"] == text


def nested(depth: int) -> str:
    return '{"prompt": "a", "x": ' + "[" * depth + "]" * depth + "}"


BAD = {
    "not JSON": ("{", "Expecting property name"),
    "no object": ("[1]", "a line must be a JSON object with a text prompt"),
    "no prompt": ({"text": "a"}, "a line must be a JSON object with a text prompt"),
    "temperature": ({"prompt": "a", "temperature": -1}, "temperature must be at least 0, got -1"),
    "text for a number": ({"prompt": "a", "top_p": "all"}, "top_p must be a number, got 'all'"),
    "part of a token": ({"prompt": "a", "max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5"),
    "stop": ({"prompt": "a", "stop": [""]}, "stop must be a text or a list of texts, got ['']"),
    "a lone surrogate in the prompt": ('{"prompt": "a\\ud800"}', "prompt holds a lone surrogate"),
    "a lone surrogate in a stop": ('{"prompt": "a", "stop": ["\\udfff"]}', "stop holds a lone surrogate"),
    "a lone surrogate in a name": ('{"\\udc00": 1, "prompt": 3}', "a line must be a JSON object with a text prompt"),
    "half a pair unescaped": ('{"prompt": "\udc80"}', "prompt holds a lone surrogate"),
    "temperature 10^400": ({"prompt": "a", "temperature": 10**400}, "temperature must be finite"),
    "seed 10^400": ({"prompt": "a", "seed": 10**400}, "seed must be at least"),
    "max_new_tokens 10^400": ({"prompt": "a", "max_new_tokens": 10**400}, "max_new_tokens must be below 2^63"),
    "a number of 5000 digits": ('{"prompt": "a", "x": 1' + "0" * 5000 + "}", "Exceeds the limit"),
    "NaN": ('{"prompt": "a", "x": NaN}', "NaN is not a number of JSON"),
    "infinity": ('{"prompt": "a", "temperature": -Infinity}', "-Infinity is not a number of JSON"),
    "1e999": ('{"prompt": "a", "x": 1e999}', "1e999 is not a number of JSON, or too large"),
    "a name twice": ('{"prompt": "a", "prompt": "b"}', "'prompt' occurs twice"),
    "a nested name twice": ('{"prompt": "a", "x": {"y": 1, "y": 1}}', "'y' occurs twice"),
    "lists 100 deep": (nested(100), "nested more than 100 levels deep"),
    "lists 50,000 deep": (nested(50_000), "nested more than 100 levels deep"),
    "objects 50,000 deep": ('{"a":' * 50_000, "nested more than 100 levels deep"),
    "bytes that are not UTF-8": (b'{"prompt": "a\xff"}', "'utf-8' codec can't decode byte 0xff"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16-le").replace(b"\n", b""), "Expecting"),
    "zeros": (b"\0" * 9, "Expecting value"),
    "two objects": ('{"prompt": "a"}{"prompt": "b"}', "Extra data"),
    "an empty prompt list": ({"prompt": []}, "a line must be a JSON object with a text prompt"),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD.keys())
def test_an_invalid_line_does_not_affect_other_lines(model, line, message):
    good, bad, also_good = answers(model, {"prompt": "a"}, line, "\n", {"prompt": "b"})
    assert bad["error"].startswith(message)
    assert bad["index"] == 1
    assert also_good["index"] == 3
    assert [good["text"], also_good["text"]] == [generated(model, "a", 12), generated(model, "b", 12)]
    assert json.loads(to_json(bad).decode("utf-8")) == bad


GOOD = {
    "a byte order mark": b'\xef\xbb\xbf{"prompt": "a"}\r\n',
    "UTF-8": '{"prompt": "a", "é": "\u2028"}'.encode(),
    "a surrogate pair": '{"prompt": "a", "x": "\\ud83d\\ude00"}',
    "a lone surrogate in an echo": '{"prompt": "a", "x\\ud800": ["\\udfff"]}',
    "large numbers": '{"prompt": "a", "id": 1' + "0" * 400 + ', "top_k": 1' + "0" * 400 + "}",
    "lists 98 deep": nested(98),
    "names of answers": '{"prompt": "a", "index": 7, "text": "b", "tokens": 0, "finish_reason": "c", "error": "d"}',
}


@pytest.mark.parametrize("line", GOOD.values(), ids=GOOD)
def test_an_unusual_line_is_answered(model, line):
    other, answer = answers(model, {"prompt": "b"}, line)
    results = {"index": 1, "text": generated(model, "a", 12), "tokens": 12, "finish_reason": "length"}
    given = json.loads(line if isinstance(line, str) else line.decode("utf-8-sig"))
    given.pop("error", None)
    assert answer == given | results
    assert other["text"] == generated(model, "b", 12)
    encoded = to_json(answer)
    assert json.loads(encoded.decode("utf-8")) == answer
    assert encoded.count(b"\n") == 1


def test_a_line_may_have_megabytes(model):
    prompt = "to be or not " * 100_000
    (answer,) = answers(model, {"prompt": "a", "id": prompt, "max_new_tokens": 2})
    assert answer["id"] == prompt
    (answer,) = answers(model, {"prompt": prompt[:60_000], "max_new_tokens": 2})
    assert answer["text"] == generated(model, prompt[:60_000], 2)


def test_lines_are_read_when_needed(model):
    read = []

    def lines():
        for i in range(50):
            read.append(i)
            yield json.dumps({"prompt": "a"})

    found = answer_lines(Engine(model, max_requests=2), TOKENIZER, lines(), GREEDY)
    next(found)
    assert len(read) < 10
    assert len(list(found)) == 49


def test_an_answer_does_not_wait_for_the_next_line(model):
    """A writer may wait for an answer before it sends the next prompt."""
    engine, arrived = Engine(model), []

    def lines():
        for i in range(3):
            yield json.dumps({"prompt": "ab"[i % 2]})
            while len(arrived) <= i:
                assert engine.has_work
                yield None

    for answer in answer_lines(engine, TOKENIZER, lines(), GREEDY):
        arrived.append(answer)
    assert [answer["text"] for answer in arrived] == [generated(model, prompt, 12) for prompt in "aba"]


def test_a_failed_request_is_the_error_of_its_line(model, monkeypatch):
    forward, calls = model.lm_head.forward, []

    def failing(hidden_states):
        calls.append(0)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of\n memory")
        return forward(hidden_states)

    monkeypatch.setattr(model.lm_head, "forward", failing)
    found = answers(model, *({"prompt": prompt, "id": prompt} for prompt in "abcde"))
    assert [answer.get("error") for answer in found] == ["out of memory"] * 2 + [None] * 3
    assert [answer["id"] for answer in found] == [*"abcde"]
    assert [answer["text"] for answer in found[2:]] == [generated(model, prompt, 12) for prompt in "cde"]


def test_known_answers_are_not_computed_again(model):
    lines = [json.dumps({"prompt": prompt, "id": i}) for i, prompt in enumerate("abc")]
    expected = {answer["index"]: answer for answer in answers(model, *lines)}
    for known in ({}, {1: expected[1]}, {0: expected[0], 2: expected[2]}, expected):
        found = list(answer_lines(Engine(model), TOKENIZER, lines, GREEDY, known))
        assert {answer["index"]: answer for answer in found} | known == expected
        assert len(found) + len(known) == 3


OTHER = {
    "another prompt": ({1: {"index": 1, "prompt": "x", "text": ""}}, "line 2 of the prompts is not the one"),
    "another option": ({0: {"index": 0, "prompt": "a", "seed": 3, "text": ""}}, "line 1 of the prompts is not"),
    "no such line": ({5: {"index": 5, "prompt": "a", "text": ""}}, "there is an answer to line 6, but no such line"),
    "a bad line": ({2: {"index": 2, "prompt": "a", "text": ""}}, "line 3 of the prompts is not the one"),
}


@pytest.mark.parametrize(("known", "message"), OTHER.values(), ids=OTHER)
def test_known_answers_to_other_prompts_are_refused(model, known, message):
    engine = Engine(model)
    with pytest.raises(ValueError, match=message):
        list(answer_lines(engine, TOKENIZER, ['{"prompt": "a"}', '{"prompt": "b"}', "{"], GREEDY, known))
    while engine.has_work:
        engine.step()
    assert engine.pool.num_free == engine.pool.num_slots


def test_closing_the_answers_cancels_their_requests(model):
    engine = Engine(model, max_requests=2)
    found = answer_lines(engine, TOKENIZER, ['{"prompt": "a"}'] * 9, GREEDY)
    next(found)
    found.close()
    while engine.has_work:
        engine.step()
    assert engine.pool.num_free == 2
    assert len(list(answer_lines(engine, TOKENIZER, ['{"prompt": "a"}'] * 3, GREEDY))) == 3


def test_a_stop_text_may_be_a_special_token(model):
    special = deepcopy(model)
    ids = special.generate(torch.tensor([[256, 97]]), max_new_tokens=12, do_sample=False)[0, 2:].tolist()
    head = special.lm_head.weight.data
    head[[258, ids[3]]] = head[[ids[3], 258]]  # generate the special token in place of this one
    at = ids.index(ids[3])
    before = str(TOKENIZER.decode(ids[:at]))
    for stop in ("<|pad|>", before + "<|pad|>"):
        (answer,) = answers(special, {"prompt": "a", "stop": ["not there", stop]})
        assert answer["text"] == (before if stop == "<|pad|>" else "")
        assert (answer["tokens"], answer["finish_reason"]) == (at + 1, "stop")
    assert answers(special, {"prompt": "a"})[0]["tokens"] == 12
