import json

import pytest
import torch
from tiny_model import make_config

from lightning_attention.inference import Engine, SamplingOptions
from lightning_attention.inference.batch import answer_lines
from lightning_attention.models import LightningForCausalLM
from lightning_attention.training import byte_tokenizer

GREEDY = SamplingOptions(max_new_tokens=12, temperature=0)
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> LightningForCausalLM:
    torch.manual_seed(1)
    ids = {"bos_token_id": 256, "eos_token_id": None, "pad_token_id": 258}
    return LightningForCausalLM(make_config(vocab_size=len(TOKENIZER), **ids)).double().eval()


def answers(model, *lines: str | dict, options: SamplingOptions = GREEDY) -> list[dict]:
    """In the order of the lines."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    engine = Engine(model, max_requests=2)
    found = list(answer_lines(engine, TOKENIZER, iter(texts), options))
    assert engine.pool.num_free == 2
    return sorted(found, key=lambda answer: answer["index"])


def written(model, prompt: str, count: int) -> str:
    ids = model.generate(torch.tensor([[256, *prompt.encode()]]), max_new_tokens=count, do_sample=False)
    return TOKENIZER.decode(ids[0, 1 + len(prompt.encode()) :], skip_special_tokens=True)


def test_answers_are_what_the_model_writes(model):
    prompts = ["to be", "", "or not to be, that is", "the question", "é"]
    found = answers(model, *({"prompt": prompt, "id": i} for i, prompt in enumerate(prompts)))
    expected = [
        {"prompt": prompt, "id": i, "index": i, "text": written(model, prompt, 12)} for i, prompt in enumerate(prompts)
    ]
    assert found == [answer | {"tokens": 12, "finish_reason": "length"} for answer in expected]


def test_a_line_has_options_of_its_own(model):
    short, sampled, again = answers(
        model,
        {"prompt": "a", "max_new_tokens": 3},
        {"prompt": "a", "temperature": 1, "seed": 5},
        {"prompt": "a", "temperature": 1.0, "seed": 5, "top_k": 0},
    )
    assert short["text"] == written(model, "a", 3)
    assert sampled["text"] == again["text"] != written(model, "a", 12)


def test_an_answer_ends_before_the_text_that_stops_it(model):
    whole = written(model, "a", 12)
    stop = whole[4:6]
    one, several, none = answers(
        model,
        {"prompt": "a", "stop": stop},
        {"prompt": "a", "stop": ["not there", whole[7:], stop]},
        {"prompt": "a", "stop": []},
    )
    assert one["text"] == several["text"] == whole[: whole.index(stop)]
    assert one["finish_reason"] == "stop"
    assert one["tokens"] < 12
    assert none["text"] == whole


BAD = {
    "not JSON": ("{", "Expecting property name"),
    "no object": ("[1]", "a line must be a JSON object with a text prompt"),
    "no prompt": ({"text": "a"}, "a line must be a JSON object with a text prompt"),
    "temperature": ({"prompt": "a", "temperature": -1}, "temperature must be at least 0, got -1"),
    "text for a number": ({"prompt": "a", "top_p": "all"}, "top_p must be a number, got 'all'"),
    "part of a token": ({"prompt": "a", "max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5"),
    "stop": ({"prompt": "a", "stop": [""]}, "stop must be a text or a list of texts, got ['']"),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_line_does_not_touch_the_others(model, line, message):
    good, bad, also_good = answers(model, {"prompt": "a"}, line, "\n", {"prompt": "b"})
    assert bad["error"].startswith(message)
    assert bad["index"] == 1
    assert also_good["index"] == 3
    assert [good["text"], also_good["text"]] == [written(model, "a", 12), written(model, "b", 12)]


def test_lines_are_read_as_they_are_needed(model):
    read = []

    def lines():
        for i in range(50):
            read.append(i)
            yield json.dumps({"prompt": "a"})

    found = answer_lines(Engine(model, max_requests=2), TOKENIZER, lines(), GREEDY)
    next(found)
    assert len(read) < 10
    assert len(list(found)) == 49
