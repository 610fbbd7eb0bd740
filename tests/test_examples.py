"""Recipes run, with few steps."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tiny_model import save_checkpoint
from training.runs import ON_CPU

from lightning_attention.models.checkpoint import last_checkpoint
from lightning_attention.training import Corpus
from lightning_attention.training.metrics import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
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


def test_a_long_sequence_is_trained_by_segments_and_shows_losses_by_position(tmp_path: Path) -> None:
    words = ["--sequence-length", "512", "--segment-length", "64", "--size", "demo", "--steps", "3"]
    command = [sys.executable, str(EXAMPLES / "long_sequence.py"), *words]
    result = subprocess.run(command, cwd=tmp_path, env=ON_CPU, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    records = read_metrics(tmp_path / "long" / "metrics.jsonl")
    assert [record["tokens"] for record in records if "loss" in record] == [512, 1024, 1536]
    found = re.findall(r"from ([\d,]+) +(\d\.\d{4})", result.stdout)
    assert [position for position, _ in found] == ["0", "64", "128", "256"]
    held_out = next(record["eval_loss"] for record in records if "eval_loss" in record)
    weights = (1, 1, 2, 4)
    mean = sum(weight * float(loss) for weight, (_, loss) in zip(weights, found, strict=True)) / 8
    assert abs(mean - held_out) < 0.1  # the first token of a segment is not predicted


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")
@pytest.mark.parametrize("checkpoint", [False, True], ids=["new model", "checkpoint"])
def test_log_probabilities_are_equal_in_sampling_and_training(checkpoint, tmp_path, monkeypatch, capsys):
    example = import_module("rl_logprobs")
    monkeypatch.setattr(example, "DEVICE", "cpu")  # where there is a GPU, only attention is equal
    monkeypatch.setattr(example, "DTYPE", torch.float32)
    folder = save_checkpoint(tmp_path / "run") if checkpoint else None
    shares = example.main(folder, requests=3, new_tokens=40)
    assert shares == {"attention": 1, "log-probabilities": 1, "importance ratios and 1": 1}
    printed = capsys.readouterr().out
    usual, invariant = (re.findall(rf"^ {mode} .*?([\d.]+) %", printed, re.M) for mode in (False, True))
    assert invariant == ["100.0"] * 3
    assert len(usual) == 3
    assert float(usual[0]) < 100
    assert "all equal to the last bit" in printed
