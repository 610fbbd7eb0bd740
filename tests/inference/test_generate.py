"""Loading of checkpoints and encoding of prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import save_checkpoint
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_attention.inference import SamplingOptions, encode, load, stream

BOS = 256
GREEDY = SamplingOptions(max_new_tokens=8, temperature=0)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path)


def test_encode_equals_the_tokenizer(checkpoint):
    _, tokenizer = load(checkpoint)
    again = AutoTokenizer.from_pretrained(checkpoint, config=load(checkpoint)[0].config)
    for prompt in ("ab", "", "hé"):
        assert encode(tokenizer, prompt) == again(prompt).input_ids == [BOS, *prompt.encode()]


OLD = {
    "none": None,
    "transformers' own": processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1"),
    "EOS": processors.TemplateProcessing(single="$A <|eos|>", special_tokens=[("<|eos|>", 257)]),
    "two BOS": processors.TemplateProcessing(single="<|bos|> <|bos|> $A", special_tokens=[("<|bos|>", 256)]),
}


@pytest.mark.parametrize("post_processor", OLD.values(), ids=OLD)
def test_tokenizers_of_older_checkpoints_are_loaded_with_bos(checkpoint, post_processor):
    file = checkpoint / "tokenizer.json"
    content = json.loads(file.read_text()) | {"post_processor": None}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    tokenizer.save(str(file))
    assert PreTrainedTokenizerFast.from_pretrained(checkpoint)("ab").input_ids != [BOS, *b"ab"]
    _, loaded = load(checkpoint)
    assert encode(loaded, "ab") == loaded("ab").input_ids == [BOS, *b"ab"]
    loaded.save_pretrained(checkpoint)
    assert PreTrainedTokenizerFast.from_pretrained(checkpoint)("ab").input_ids == [BOS, *b"ab"]


def test_padded_prompts_generate_as_alone(checkpoint):
    model, tokenizer = load(checkpoint)
    prompts = ["a", "longer"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    assert inputs["attention_mask"].tolist() == [[0, 0, 0, 0, 0, 1, 1], [1] * 7]
    together = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    for prompt, expected in zip(prompts, together, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, -5:], expected[-5:])


def test_loading_a_run_folder_takes_its_last_checkpoint(tmp_path):
    for step in (7, 12):
        save_checkpoint(tmp_path / f"checkpoint-{step}")
    assert load(tmp_path)[0].config.name_or_path == str(tmp_path / "checkpoint-12")


def test_sampling_repeats_with_the_seed(checkpoint):
    model, tokenizer = load(checkpoint)

    def sample(**options) -> str:
        return "".join(stream(model, tokenizer, "", SamplingOptions(max_new_tokens=30, **options)))

    assert sample(seed=1) == sample(seed=1)
    assert sample(seed=1) != sample(seed=2)
    assert sample(seed=1, top_k=1) == sample(temperature=0)
    assert sample(seed=1, top_p=1e-6) == sample(temperature=0)


def test_stream_does_not_depend_on_what_the_configuration_returns(checkpoint):
    model, tokenizer = load(checkpoint)
    expected = list(stream(model, tokenizer, "a", GREEDY))
    model.config.return_dict, model.config.output_hidden_states = False, True
    assert list(stream(model, tokenizer, "a", GREEDY)) == expected


def test_stream_refuses_options_in_a_dict(checkpoint):
    options: Any = {"max_new_tokens": 3}
    with pytest.raises(TypeError, match="options must be SamplingOptions, got dict"):
        stream(*load(checkpoint), "a", options)


def test_stream_raises_errors_of_the_model(checkpoint, monkeypatch):
    model, tokenizer = load(checkpoint)

    def fail(*args, **kwargs):
        raise RuntimeError("no more")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="no more"):
        list(stream(model, tokenizer, "a", SamplingOptions()))


def test_a_model_loads_in_bfloat16(checkpoint):
    assert load(checkpoint, bf16=True)[0].dtype == torch.bfloat16
