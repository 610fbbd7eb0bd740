"""A small model and tokenizer for other libraries, without downloads."""

from pathlib import Path

import pytest
from tiny_model import make_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_attention.models import LightningForCausalLM

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
WORDS = ["red", "green", "blue", "one", "two", "three", "is", "not", "a", "the", "number", "color"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture
def model() -> LightningForCausalLM:
    return LightningForCausalLM(make_config())


@pytest.fixture
def checkpoint(model: LightningForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    """Folder of a saved model and its tokenizer."""
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


# Warnings from code of these libraries.
THEIR_WARNINGS = (
    "ignore:.*is deprecated and will be removed in v6:FutureWarning",  # PEFT and TRL use transformers' old names
    # PEFT, when a head is trained apart from its embedding, as one test does
    "ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning",
    "ignore:Input and output embeddings are no longer tied after merging:UserWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("clients"):
            for warning in THEIR_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))
