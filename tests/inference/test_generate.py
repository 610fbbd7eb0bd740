"""From a checkpoint to text."""

import json
from pathlib import Path

import pytest
from tiny_model import save_checkpoint
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_attention.inference import encode, load

BOS = 256


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path)


def test_a_prompt_is_what_the_tokenizer_gives(checkpoint):
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
def test_a_checkpoint_of_an_older_version_is_read_as_it_was_trained(checkpoint, post_processor):
    """Its tokenizer.json does not begin documents as training did."""
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
