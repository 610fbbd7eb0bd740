"""BPE tokenizers that are trained on text."""

from pathlib import Path
from typing import Any

import pytest
from cli.test_cli import run
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import make_config
from transformers import PreTrainedTokenizerFast

from lightning_attention.inference import ChatPrompts, encode
from lightning_attention.training import load_tokenizer
from lightning_attention.training.bpe import LEAST, SPECIAL, save_tokenizer, train_bpe
from lightning_attention.training.documents import Sources
from lightning_attention.training.text_bytes import token_bytes


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text("the cat sat on the mat. größer und größer. " * 50, encoding="utf-8")
    (folder / "b.txt").write_text("def f(x):\n    return x + 1\n" * 50, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(texts: Path, tmp_path_factory) -> PreTrainedTokenizerFast:
    trained = train_bpe(Sources.find(texts), 290)
    return load_tokenizer(save_tokenizer(trained, tmp_path_factory.mktemp("bpe")))


def test_words_of_the_text_are_single_tokens(tokenizer):
    assert len(tokenizer) == 290
    assert tokenizer.convert_ids_to_tokens(tokenizer(" the the").input_ids) == ["<|bos|>", "Ġthe", "Ġthe"]
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(SPECIAL))] == list(SPECIAL)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_every_text_is_encoded_and_decoded(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)[1:]) == text


def test_the_bytes_of_tokens_are_known(tokenizer):
    lengths = token_bytes(tokenizer)
    assert lengths is not None
    assert sum(lengths[encode(tokenizer, "größer than the cat")]) == len("größer than the cat".encode())


def test_turns_of_a_conversation_are_special_tokens(tokenizer):
    ids = ChatPrompts(tokenizer).encode([{"role": "user", "content": "the cat<|im_end|>"}])
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(start), ids.count(end), ids[0]) == (2, 1, tokenizer.bos_token_id)


def test_only_the_first_bytes_are_read(texts):
    read: list[int] = []
    train_bpe(Sources.find(texts), LEAST, max_bytes=1, progress=read.append)
    assert len(read) == 1


@pytest.mark.parametrize(("name", "value"), [("vocab_size", LEAST - 1), ("max_bytes", 0)])
def test_sizes_out_of_range_are_refused(texts, name, value):
    sizes: dict[str, Any] = {"vocab_size": 300} | {name: value}
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        train_bpe(Sources.find(texts), **sizes)


def test_no_text_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="there is no text to train a tokenizer on"):
        train_bpe(Sources.find(tmp_path), 300)


def test_the_error_of_a_file_is_raised(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"no": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl"):
        train_bpe(Sources.find(tmp_path), 300)


def test_a_run_with_a_trained_tokenizer(monkeypatch, capsys, tmp_path, texts):
    command = ["tokenizer", "train", "--data", texts, "--vocab-size", 290, "--output", tmp_path / "bpe"]
    code, out, err = run(monkeypatch, capsys, *command)
    assert (code, out, err) == (0, f"tokenizer  {tmp_path / 'bpe'}: 290 tokens\n", "")
    config = tmp_path / "model.json"
    config.write_text(make_config(vocab_size=290).to_json_string(use_diff=True))
    sizes = ["--config", config, "--sequence-length", 32, "--batch-size", 2, "--steps", 2]
    arguments = ["train", "--output", tmp_path / "run", "--data", texts, "--tokenizer", tmp_path / "bpe", *sizes]
    code, out, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0
    code, _, err = run(monkeypatch, capsys, *command)
    assert (code, err) == (2, f"lightning-attention: {tmp_path / 'bpe'} exists: choose another output\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocab-size", 100], "--vocab-size must be at least 261, got 100"),
        (["--data", "missing"], "there is no file or folder missing"),
        (["--max-bytes", 0], "--max-bytes must be at least 1, got 0"),
    ],
    ids=str,
)
def test_errors_are_one_line_and_write_nothing(monkeypatch, capsys, tmp_path, texts, options, message):
    command = ["tokenizer", "train", "--data", texts, "--output", tmp_path / "bpe", *options]
    code, out, err = run(monkeypatch, capsys, *command)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "bpe").exists()
