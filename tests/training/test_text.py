"""From files to rows of tokens."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_attention.training import Corpus, PackedDataset, byte_tokenizer
from lightning_attention.training import corpus as corpus_module
from lightning_attention.training.documents import Sources, standard_library

BOS, EOS = 256, 257


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_bytes(text.encode())
    return folder


def documents(corpus: Corpus) -> list[bytes]:
    tokens = [*corpus.train_tokens().tolist(), *corpus.held_out_tokens().tolist()]
    found, current = [], None
    for token in tokens:
        if token == BOS:
            assert current is None
            current = []
        elif token == EOS:
            found.append(bytes(current))
            current = None
        else:
            current.append(token)
    assert current is None
    return found


def test_files_and_folders(tmp_path):
    folder = write(tmp_path / "data", a_txt="one", b_py="two", c_jsonl='{"text": "three"}\n\n{"text": "four"}\n')
    (folder / "binary").write_bytes(b"\x00\x01")
    (folder / "latin").write_bytes("é".encode("latin-1"))
    write(folder / "tests", test_py="six")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("no text of the user's")
    alone = write(tmp_path / "more", d_txt="five") / "d.txt"
    sources = Sources.find([folder, alone])
    assert sorted("".join(pieces) for pieces in sources.documents()) == ["five", "four", "one", "six", "three", "two"]
    assert sources.skipped == 2
    assert len(Sources.find([folder, alone], without=["tests"]).files) == len(sources.files) - 1
    assert Sources.find([folder, alone], seed=1).files != sources.files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "there is no file or folder"),
        ("latin.txt", "é".encode("latin-1"), "is not UTF-8 text"),
        ("zero.txt", b"a\x00b", "is not UTF-8 text"),
        ("folder", "folder", "no text files found"),
    ],
)
def test_paths_of_no_use(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Sources.find([path])


@pytest.mark.parametrize("line", ["not json", '{"body": "x"}', '{"text": 3}', '["text"]', "3"])
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "data.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    sources = Sources.find([tmp_path / "data.jsonl"])
    with pytest.raises(ValueError, match=r"data.jsonl, line 2: not a JSON object with a text in 'text'"):
        [list(pieces) for pieces in sources.documents()]


def test_another_field_and_broken_surrogates(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"body": "a\ud800b"}) + "\n")
    sources = Sources.find([tmp_path / "data.jsonl"], text_field="body")
    assert ["".join(pieces) for pieces in sources.documents()] == ["a\ufffdb"]


def test_the_standard_library_is_text():
    assert len(Sources.find([standard_library()]).files) > 100


@pytest.mark.parametrize("batch", [1, 10, 1 << 22])
def test_the_corpus_is_the_documents(tmp_path, monkeypatch, batch):
    """However they are cut into pieces and batches; what looks like a special token is text."""
    monkeypatch.setattr("lightning_attention.training.documents.PIECE", 7)
    monkeypatch.setattr(corpus_module, "BATCH", batch)
    texts = ["a" * 50, "héllo wörld <|eos|> ", "x", "\r\n\n", "€" * 30]
    folder = write(tmp_path / "data", **{f"f{i}_txt": text for i, text in enumerate(texts)}, empty_txt="")
    corpus = Corpus.prepare(tmp_path / "corpus", Sources.find([folder]), byte_tokenizer(), 0.3)
    assert sorted(documents(corpus)) == sorted(text.encode() for text in texts)
    assert corpus.num_documents == 5


def test_the_held_out_part_starts_with_a_document(tmp_path):
    lines = "\n".join(json.dumps({"text": f"document {i}"}) for i in range(100))
    (tmp_path / "data.jsonl").write_text(lines)
    corpus = Corpus.prepare(tmp_path / "corpus", Sources.find([tmp_path / "data.jsonl"]), byte_tokenizer(), 0.1)
    assert corpus.held_out_tokens()[0] == BOS
    assert 0.1 <= corpus.num_held_out / (corpus.num_train + corpus.num_held_out) < 0.12
    assert documents(corpus) == [f"document {i}".encode() for i in range(100)]


def test_one_long_document_is_cut(tmp_path):
    (tmp_path / "data.txt").write_text("x" * 1000)
    corpus = Corpus.prepare(tmp_path / "corpus", Sources.find([tmp_path / "data.txt"]), byte_tokenizer(), 0.25)
    assert corpus.num_held_out == 251
    assert documents(corpus) == [b"x" * 1000]


def test_tokens_are_kept_until_the_files_change(tmp_path, monkeypatch):
    folder = write(tmp_path / "data", a_txt="some text")
    arguments = tmp_path / "corpus", byte_tokenizer(), 0.5

    def prepare(**options):
        where, tokenizer, held_out = arguments
        return Corpus.prepare(where, Sources.find([folder], **options), tokenizer, held_out)

    calls = []
    tokenize = corpus_module._tokenize
    monkeypatch.setattr(corpus_module, "_tokenize", lambda *args: calls.append(1) or tokenize(*args))
    first = prepare()
    assert prepare() == first
    assert Corpus.open(tmp_path / "corpus") == first
    assert len(calls) == 1
    (folder / "a.txt").write_text("other text")
    assert documents(prepare()) == [b"other text"]
    assert len(calls) == 2


def test_an_unfinished_corpus_is_not_used(tmp_path, monkeypatch):
    folder = write(tmp_path / "data", a_txt="some text", b_txt="more")

    def stop(*args):
        yield [1, 2, 3], 0
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "_tokenize", stop)
        with pytest.raises(KeyboardInterrupt):
            Corpus.prepare(tmp_path / "corpus", Sources.find([folder]), byte_tokenizer(), 0.5)
    assert not (tmp_path / "corpus").exists()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "tokens.bin").write_bytes(b"12345678")  # what a kill may leave
    with pytest.raises(ValueError, match="no tokenized corpus"):
        Corpus.open(tmp_path / "corpus")
    corpus = Corpus.prepare(tmp_path / "corpus", Sources.find([folder]), byte_tokenizer(), 0.5)
    assert sorted(documents(corpus)) == [b"more", b"some text"]


def test_no_text(tmp_path):
    folder = write(tmp_path / "data", a_txt="")
    with pytest.raises(ValueError, match="the data holds no text"):
        Corpus.prepare(tmp_path / "corpus", Sources.find([folder]), byte_tokenizer())
    assert not (tmp_path / "corpus").exists()


def test_unigram(tmp_path):
    folder = write(tmp_path / "data", a_txt="aaab" * 10)
    corpus = Corpus.prepare(tmp_path / "corpus", Sources.find([folder]), byte_tokenizer(), 0.5)
    frequencies = corpus.unigram().exp()
    counts = np.bincount(corpus.train_tokens(), minlength=259) + 1
    np.testing.assert_allclose(frequencies.numpy(), counts / counts.sum())
    assert frequencies.sum().item() == pytest.approx(1)
    rows = PackedDataset(corpus.held_out_tokens(), 5, EOS)
    expected = -np.mean([math.log(frequencies[token]) for token in corpus.held_out_tokens()])
    assert rows.loss_of(corpus.unigram()) == pytest.approx(expected)


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(lengths, st.integers(2, 20))
def test_rows_hold_every_token_and_positions_restart(lengths, sequence_length):
    stream = np.concatenate([np.array([1] * (n - 1) + [EOS], dtype=np.uint16) for n in lengths])
    stream = np.concatenate([stream, np.ones(sequence_length, dtype=np.uint16)])
    rows = PackedDataset(stream, sequence_length, EOS)
    position = 0
    for index in range(len(rows)):
        row = rows[index]
        assert row["input_ids"].tolist() == stream[index * sequence_length :][:sequence_length].tolist()
        position = 0
        for t in range(sequence_length):
            assert row["position_ids"][t] == position
            assert row["labels"][t] == (-100 if position == 0 else row["input_ids"][t])
            position = 0 if row["input_ids"][t] == EOS else position + 1
    assert len(rows) == len(stream) // sequence_length


def test_rows_that_cannot_be():
    tokens = np.zeros(10, dtype=np.uint16)
    with pytest.raises(ValueError, match="sequence_length must be at least 2, got 1"):
        PackedDataset(tokens, 1, EOS)
    with pytest.raises(ValueError, match="there are 10 tokens, fewer than one sequence of 11"):
        PackedDataset(tokens, 11, EOS)
    rows = PackedDataset(tokens, 4, EOS, max_tokens=6)
    assert len(rows) == 1
    with pytest.raises(IndexError):
        rows[1]
    assert rows[0]["input_ids"].dtype == torch.int64
