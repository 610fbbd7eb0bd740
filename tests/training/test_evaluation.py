"""Held-out text of a run, losses in bits per byte, and the best checkpoint."""

import io
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from training.runs import TEXT, options, quiet
from transformers import PreTrainedTokenizerFast

from lightning_attention.inference import load
from lightning_attention.models.checkpoint import load_model
from lightning_attention.models.tokenization import encode_texts
from lightning_attention.training import Corpus, TrainingOptions, byte_tokenizer, evaluate, load_tokenizer, train
from lightning_attention.training.documents import Sources
from lightning_attention.training.metrics import read_metrics
from lightning_attention.training.text_bytes import token_bytes

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TEXTS = ["héllo  wörld\n", "1234 times €", "", " <|endoftext|> is text\t", "日本語 日本語"]


def bpe(folder: Path, add_prefix_space: bool = False, normalizer: Any = None, alphabet: bool = True) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
    )
    tokenizer.train_from_iterator([TEXT, *TEXTS], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def printed(options: TrainingOptions, **how: Any) -> str:
    output = io.StringIO()
    train(options, console=Console(file=output, width=200), **how)
    return output.getvalue()


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run / "metrics.jsonl") if "eval_loss" in record]


def test_validation_text_is_evaluated_and_nothing_is_held_out(files):
    (files / "other.txt").write_text("zebra " * 60)
    text = printed(options(files, steps=10, validation=files / "other.txt"))
    assert "validation: 362 tokens of 1 documents" in text
    corpus, validation = (Corpus.open(files / "run" / name) for name in ("corpus", "validation"))
    assert (corpus.num_held_out, corpus.num_train) == (0, len(TEXT) + 2)
    assert (validation.num_train, validation.num_held_out) == (0, 362)
    [record] = evaluations(files / "run")
    model = load_model(files / "run" / "checkpoint-10")
    expected = evaluate(model, validation.held_out_set(64), corpus.unigram(), num_symbols=258)
    assert record["eval_loss"] == pytest.approx(expected.loss, rel=1e-4)
    assert "the run trains on files" not in text
    # A resumed run reads the tokens in its folder.
    (files / "other.txt").unlink()
    resumed = TrainingOptions.load(files / "run")
    assert resumed.validation == (files / "other.txt",)
    train(resumed, resume=True, console=quiet())


def test_a_changed_validation_file_is_read_again_before_the_first_step(files):
    """A run that was killed before its first step leaves its tokens."""
    other = files / "other.txt"
    other.write_text("zebra " * 60)
    Corpus.prepare(files / "run" / "validation", Sources.find(other), byte_tokenizer(), 1.0)
    other.write_text("koala " * 70)
    train(options(files, steps=1, validation=other), console=quiet())
    assert Corpus.open(files / "run" / "validation").num_held_out == 6 * 70 + 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 0.1}, "validation and held_out 0.1 name two texts"),
        ({"sequence_length": 512}, "the validation has 362 tokens, fewer than one sequence of 512"),
        ({"validation": "nowhere"}, "there is no file or folder nowhere"),
        ({"validation": "empty.txt"}, "validation: the data holds no text"),
    ],
    ids=["two texts", "too short", "missing", "empty"],
)
def test_unusable_validation_is_refused_and_leaves_nothing_behind(files, monkeypatch, changes, message):
    monkeypatch.chdir(files)
    (files / "other.txt").write_text("zebra " * 60)
    (files / "empty.txt").touch()
    with pytest.raises(ValueError, match=message):
        train(options(files, **{"validation": files / "other.txt"} | changes), console=quiet())
    assert not (files / "run").exists()


def test_validation_on_training_text_is_reported(files):
    text = printed(options(files, steps=1, validation=files / "data.txt"))
    assert "the run trains on files that it is validated on: 1\n" in text


def test_a_run_without_held_out_text_has_no_held_out_losses(files):
    text = printed(options(files, steps=10, held_out=0))
    assert text.count("no held-out losses: the run trains on all of its text") == 1
    assert "held-out loss " not in text
    assert "held out " not in text
    assert evaluations(files / "run") == []
    assert Corpus.open(files / "run" / "corpus").num_held_out == 0
    assert (files / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


# Bits per byte


@pytest.mark.parametrize("make", [bpe, lambda folder: "bytes"], ids=["bpe", "bytes"])
def test_tokens_stand_for_the_bytes_of_a_text(tmp_path, make):
    tokenizer = load_tokenizer(make(tmp_path))
    lengths = token_bytes(tokenizer)
    assert lengths is not None
    for text, encoding in zip(TEXTS, encode_texts(tokenizer, TEXTS), strict=True):
        assert lengths[np.array(encoding.ids, np.int64)].sum() == len(text.encode())
    assert lengths[tokenizer.eos_token_id] == 0


@pytest.mark.parametrize(
    "how",
    [{"add_prefix_space": True}, {"normalizer": normalizers.NFC()}, {"alphabet": False}],
    ids=["a space before a text", "normalized", "without some bytes"],
)
def test_other_tokenizers_have_no_bytes(tmp_path, how):
    assert token_bytes(load_tokenizer(bpe(tmp_path, **how))) is None


def test_a_special_token_that_is_a_character_leaves_bytes_unknown():
    backend = byte_tokenizer().backend_tokenizer
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="a")) is None


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_bits_per_byte_are_those_of_the_predicted_text(files, tokenizer):
    name = "bytes" if tokenizer == "bytes" else str(bpe(files))
    text = printed(options(files, steps=10, tokenizer=name, sequence_length=32))
    [record] = evaluations(files / "run")
    held_out = Corpus.open(files / "run" / "corpus").held_out_set(32, 512)
    loaded = load_tokenizer(name)
    labels = [item["labels"][1:] for item in map(held_out.__getitem__, range(len(held_out)))]
    ids = [int(x) for item in labels for x in item if x >= 0]
    size = sum(len(str(loaded.decode([x], skip_special_tokens=True)).encode()) for x in ids)  # the text is ASCII
    expected = record["eval_loss"] * len(ids) / math.log(2) / size
    assert record["eval_bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    assert f"({expected:.4f} bits/byte)" in text
    assert f"held out    {record['eval_loss']:.4f} nats per token, {expected:.4f} bits per byte" in text
    for logged in read_metrics(files / "run" / "metrics.jsonl"):
        if "loss" in logged:
            assert 0 < logged["bits_per_byte"] < logged["loss"] / math.log(2) * 1.01


def test_bits_per_byte_of_an_unknown_number_of_bytes_are_left_out(files):
    text = printed(options(files, steps=10, tokenizer=str(bpe(files, add_prefix_space=True)), sequence_length=32))
    assert "no bits per byte: the tokens of this tokenizer are not bytes of the text" in text
    assert not any(
        "bits_per_byte" in name for record in read_metrics(files / "run" / "metrics.jsonl") for name in record
    )


# The best checkpoint

OVERFITTING = {"learning_rate": 3e-2, "steps": 24, "eval_every": 2, "save_every": 100, "keep_best": True, "warmup": 0.0}


def best_step(run: Path) -> int:
    return min(evaluations(run), key=lambda record: record["eval_loss"])["step"]


def named(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint-*"))


@pytest.fixture
def other(files: Path) -> Path:
    """Text that a run on multiplications learns at first, and then no more."""
    (files / "other.txt").write_text("".join(f"{i} plus {j} is {i + j}\n" for i in range(9) for j in range(4)))
    return files / "other.txt"


def test_the_best_checkpoint_survives_and_loads(files, other):
    text = printed(options(files, validation=other, **OVERFITTING))
    run, best = files / "run", best_step(files / "run")
    assert 2 < best < 24 - 4  # the next two checkpoints would have replaced it
    assert os.readlink(run / "best") == f"checkpoint-{best}"
    lowest = min(record["eval_loss"] for record in evaluations(run))
    assert f"best        {run / 'best'}: checkpoint-{best}, held-out loss {lowest:.4f}\n" in text
    assert f"checkpoint-{best}" in named(run)
    assert len(named(run)) <= 3
    validation = Corpus.open(run / "validation").held_out_set(64, 512)
    model, _ = load(run / "best")
    assert evaluate(model, validation, torch.zeros(259), 258).loss == pytest.approx(lowest, rel=1e-4)
    # A resumed run replaces it by a better one only; without the option it stays.
    train(replace(TrainingOptions.load(run), steps=28), resume=True, console=quiet())
    link = os.readlink(run / "best")
    assert link == f"checkpoint-{best_step(run)}"
    train(replace(TrainingOptions.load(run), steps=32, keep_best=False, save_every=1), resume=True, console=quiet())
    assert os.readlink(run / "best") == link
    assert (run / "best" / "config.json").is_file()


@pytest.mark.parametrize("link", ["lost", "of a lost checkpoint", "of a worse one", "of a damaged one"])
def test_a_resumed_run_finds_the_best_checkpoint_again(files, other, link):
    """As a kill or a damaged checkpoint may leave it."""
    run, changes = files / "run", OVERFITTING | {"steps": 8, "learning_rate": 1e-3}
    train(options(files, validation=other, **changes), console=quiet())
    assert os.readlink(run / "best") == "checkpoint-8"
    (run / "best").unlink()
    if link != "lost":
        (run / "best").symlink_to("checkpoint-7" if link == "of a lost checkpoint" else "checkpoint-6")
    if link == "of a damaged one":
        (run / "checkpoint-6" / "trainer_state.json").write_text("{")
    train(replace(TrainingOptions.load(run), steps=9, learning_rate=10.0), resume=True, console=quiet())
    assert os.readlink(run / "best") == "checkpoint-8"


def test_the_best_checkpoint_needs_held_out_losses(files):
    with pytest.raises(ValueError, match="keep_best needs held-out losses: give validation, or a held_out above 0"):
        options(files, keep_best=True, held_out=0)
