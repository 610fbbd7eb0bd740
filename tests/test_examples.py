"""Recipes run, with few steps."""

from importlib import import_module
from pathlib import Path

import pytest

from lightning_attention.models.checkpoint import last_checkpoint
from lightning_attention.training import Corpus

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def path_of_examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


def test_a_model_is_fine_tuned_on_conversations(tmp_path):
    found = import_module("finetune_chat").main(tmp_path / "chat", base_steps=2, steps=2)
    assert len(found) == 3
    assert Corpus.open(tmp_path / "chat" / "tuned" / "corpus").num_context_ranges > 0


def test_adapters_are_trained_and_merged(tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    found = import_module("lora").main(tmp_path / "lora", base_steps=2, steps=2)
    assert len(found) == 3
    assert last_checkpoint(tmp_path / "lora" / "merged") == tmp_path / "lora" / "merged"


def test_a_bpe_is_made_and_trained_with(tmp_path):
    import_module("tokenizer").main(tmp_path / "bpe", vocab_size=300, steps=2)
    assert Corpus.open(tmp_path / "bpe" / "bpe" / "corpus").vocab_size == 300
    assert (tmp_path / "bpe" / "losses.png").stat().st_size > 0


@pytest.mark.parametrize("recipe", ["finetune_chat", "lora", "tokenizer"])
def test_a_recipe_fits_a_screen(recipe):
    assert len((EXAMPLES / f"{recipe}.py").read_text().splitlines()) <= 95
