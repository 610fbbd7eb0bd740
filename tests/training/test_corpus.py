"""Corpora of tokens, and packed sequences."""

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_attention.training import Corpus, PackedDataset, byte_tokenizer, encoding
from lightning_attention.training.documents import Sources

BOS, EOS = 256, 257
FORMAT_2 = {  # fields of a corpus
    "fingerprint", "vocab_size", "eos_token_id", "num_documents", "num_train", "num_held_out", "skipped_files",
}  # fmt: skip


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_bytes(text.encode())
    return folder


def documents(corpus: Corpus) -> list[bytes]:
    """Text of each document, by the stored document starts."""
    tokens = [*corpus.train_tokens()[:].tolist(), *corpus.held_out_tokens()[:].tolist()]
    bounds = [*corpus.document_starts().tolist(), len(tokens)]
    framed = [tokens[start:stop] for start, stop in pairwise(bounds)]
    assert all(document[0] == BOS and document[-1] == EOS for document in framed)
    return [bytes(document[1:-1]) for document in framed]


@pytest.mark.parametrize("batch", [1, 10, 1 << 22])
def test_a_corpus_holds_the_documents(tmp_path, monkeypatch, batch):
    """Documents do not depend on batches; names of special tokens are text."""
    monkeypatch.setattr(encoding, "BYTES_BATCH", batch)
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


def test_a_single_document_is_cut_at_the_held_out_part(tmp_path):
    (tmp_path / "data.txt").write_text("x" * 1000)
    corpus = Corpus.prepare(tmp_path / "corpus", Sources.find([tmp_path / "data.txt"]), byte_tokenizer(), 0.25)
    assert corpus.num_held_out == 251
    assert documents(corpus) == [b"x" * 1000]


def test_a_corpus_is_kept_until_its_files_change(tmp_path):
    folder = write(tmp_path / "data", a_txt="some text")
    read: list[tuple[int, int]] = []

    def prepare() -> Corpus:
        sources = Sources.find([folder])
        progress = lambda *numbers: read.append(numbers)  # noqa: E731
        return Corpus.prepare(tmp_path / "corpus", sources, byte_tokenizer(), 0.5, progress=progress)

    first = prepare()
    assert prepare() == first == Corpus.open(tmp_path / "corpus")
    assert read == [(0, len("some text")), (len("some text"), len("some text"))]
    (folder / "a.txt").write_text("other text")
    assert documents(prepare()) == [b"other text"]
    assert len(read) == 4


def test_an_unfinished_corpus_is_not_used(tmp_path):
    folder = write(tmp_path / "data", a_txt="some text", b_txt="more")
    (tmp_path / "corpus").mkdir()
    for name in ("tokens.bin", "tokens.bin.123.unfinished"):  # as a kill may leave
        (tmp_path / "corpus" / name).write_bytes(b"12345678")
    with pytest.raises(ValueError, match="no tokenized corpus"):
        Corpus.open(tmp_path / "corpus")
    corpus = Corpus.prepare(tmp_path / "corpus", Sources.find([folder]), byte_tokenizer(), 0.5)
    assert sorted(documents(corpus)) == [b"more", b"some text"]
    assert sorted(os.listdir(tmp_path / "corpus")) == ["corpus.json", "documents.bin", "tokens.bin"]


@pytest.mark.parametrize("exists", ["nothing", "folder", "parent", "corpus"])
def test_a_failed_preparation_leaves_the_folder_unchanged(tmp_path, exists):
    data = write(tmp_path / "data", a_txt="some text")
    folder = tmp_path / "run" / "corpus"
    if exists != "nothing":
        (folder.parent if exists == "parent" else folder).mkdir(parents=True)
    if exists == "corpus":
        Corpus.prepare(folder, Sources.find([data]), byte_tokenizer(), 0.5)

    def everything() -> dict[Path, bytes]:
        return {path: path.read_bytes() if path.is_file() else b"" for path in tmp_path.rglob("*") if path != bad}

    bad = write(tmp_path / "data", b_jsonl='{"text": "fine"}\nnot JSON') / "b.jsonl"
    before = everything()
    with pytest.raises(ValueError, match="line 2"):
        Corpus.prepare(folder, Sources.find([data]), byte_tokenizer(), 0.5)
    assert everything() == before

    def stop(num_read: int, num_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Corpus.prepare(folder, Sources.find([data / "a.txt"]), byte_tokenizer(), 0.4, progress=stop)
    assert everything() == before


def overwrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def edited(content: bytes) -> bytes:
    changed = json.loads(content)
    changed["corpus"]["num_train"] -= 1
    return json.dumps(changed).encode()


def flipped(content: bytes) -> bytes:
    return bytes([*content[:-5], content[-5] ^ 1, *content[-4:]])


def older(folder: Path) -> None:
    """Rewrite the description in format 1."""
    about = json.loads((folder / "corpus.json").read_text())["corpus"]
    (folder / "corpus.json").write_text(json.dumps(about, indent=1))


# Damage to a corpus, and the error.
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokens missing": (lambda folder: (folder / "tokens.bin").unlink(), "tokens.bin is missing: restore it"),
    "tokens truncated": (overwrite("tokens.bin", lambda x: x[:-2]), r"tokens.bin has 11 bytes, 13 were written: rest"),
    "tokens empty": (overwrite("tokens.bin", lambda x: b""), "tokens.bin has 0 bytes, 13 were written: restore it"),
    "tokens longer": (overwrite("tokens.bin", lambda x: x + x), "tokens.bin has 26 bytes, 13 were written"),
    "tokens zero": (overwrite("tokens.bin", lambda x: bytes(len(x))), "tokens.bin is damaged near byte 0: restore it"),
    "tokens flipped": (overwrite("tokens.bin", flipped), "tokens.bin is damaged near byte 0: restore it"),
    "ids out of vocabulary": (overwrite("tokens.bin", lambda x: b"\xff" * len(x)), "tokens.bin is damaged near byte 0"),
    "another dtype": (
        overwrite("tokens.bin", lambda x: np.frombuffer(x, "u1").astype("<u2").tobytes()),
        "tokens.bin has 26 bytes, 13 were written",
    ),
    "bounds missing": (lambda folder: (folder / "documents.bin").unlink(), "documents.bin is missing: restore it"),
    "bounds truncated": (overwrite("documents.bin", lambda x: x[:8]), "documents.bin has 8 bytes, 16 were written"),
    "bounds flipped": (overwrite("documents.bin", flipped), "documents.bin is damaged near byte 0: restore it"),
    "description missing": (lambda folder: (folder / "corpus.json").unlink(), "no tokenized corpus in .*corpus$"),
    "description truncated": (overwrite("corpus.json", lambda x: x[:-9]), "corpus.json is damaged: restore it"),
    "description empty": (overwrite("corpus.json", lambda x: b""), "corpus.json is damaged: restore it"),
    "description zero": (overwrite("corpus.json", lambda x: bytes(len(x))), "corpus.json is damaged: restore it"),
    "description not UTF-8": (overwrite("corpus.json", lambda x: b"\xff" + x), "corpus.json is damaged: restore it"),
    "description a list": (overwrite("corpus.json", lambda x: b"[]"), "corpus.json is damaged: restore it"),
    "description an object": (overwrite("corpus.json", lambda x: b"{}"), "corpus.json is damaged: restore it"),
    "description nested": (overwrite("corpus.json", lambda x: b"[" * 100_000), "corpus.json is damaged: restore it"),
    "description edited": (overwrite("corpus.json", edited), "corpus.json is damaged: restore it"),
    "format 1": (older, r"corpus.json is of another version of this library \(format 1, not 4\): use that version"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_corpus_is_an_error_and_can_be_prepared_again(tmp_path, damage, message):
    sources = Sources.find([write(tmp_path / "data", a_txt="some", b_txt="texts")])
    intact = Corpus.prepare(tmp_path / "corpus", sources, byte_tokenizer(), 0.5)
    damage(tmp_path / "corpus")
    with pytest.raises(ValueError, match=message) as raised:
        Corpus.open(tmp_path / "corpus")
    assert "\n" not in str(raised.value)
    again = Corpus.prepare(tmp_path / "corpus", sources, byte_tokenizer(), 0.5)
    assert again == intact == Corpus.open(tmp_path / "corpus")
    assert sorted(documents(again)) == [b"some", b"texts"]


def test_a_corpus_of_format_2_is_read(tmp_path):
    """Format 2 has two bytes a token, or four for large vocabularies."""
    sources = Sources.find([write(tmp_path / "data", a_txt="some", b_txt="texts")])
    corpus = Corpus.prepare(tmp_path / "corpus", sources, byte_tokenizer(), 0.5)
    file = tmp_path / "corpus" / "corpus.json"
    content = json.loads(file.read_text())
    content |= {"format": 2, "corpus": {k: v for k, v in content["corpus"].items() if k in FORMAT_2}}
    del content["checksum"]
    tokens = np.concatenate([corpus.train_tokens()[:], corpus.held_out_tokens()[:]])
    for dtype, vocab_size in ((np.uint16, 259), (np.uint32, 70_000)):
        stored = tokens.astype(dtype)
        stored.tofile(tmp_path / "corpus" / "tokens.bin")
        content["corpus"]["vocab_size"] = vocab_size
        content["checksums"]["tokens.bin"] = [zlib.crc32(stored.tobytes())]
        checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        file.write_text(json.dumps(content | {"checksum": checksum}))
        older = Corpus.open(tmp_path / "corpus")
        assert older.vocab_size == vocab_size
        assert older.train_tokens()[:].dtype == dtype
        assert sorted(documents(older)) == [b"some", b"texts"]


# Tokens beside EOS, and bytes of a token.
WIDTHS = {"256 tokens": (255, 1), "257 tokens": (256, 2), "65,536 tokens": (65_535, 2), "65,537 tokens": (65_536, 4)}


@pytest.mark.parametrize(("num_words", "token_bytes"), WIDTHS.values(), ids=WIDTHS)
def test_tokens_are_stored_in_as_few_bytes_as_their_ids_need(tmp_path, num_words, token_bytes):
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(num_words)} | {"</s>": num_words}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    (tmp_path / "data.txt").write_text(f"w0 w{num_words - 1} w1")
    corpus = Corpus.prepare(tmp_path / "corpus", Sources.find([tmp_path / "data.txt"]), tokenizer, 0.5)
    tokens = [*corpus.train_tokens()[:].tolist(), *corpus.held_out_tokens()[:].tolist()]
    assert tokens == [0, num_words - 1, 1, num_words]
    assert (tmp_path / "corpus" / "tokens.bin").stat().st_size == 4 * token_bytes


def test_large_files_are_verified_in_evenly_spaced_blocks(tmp_path, monkeypatch):
    (tmp_path / "data.txt").write_text("x" * 2002)
    monkeypatch.setattr("lightning_attention.training.blocks.BLOCK", 100)
    Corpus.prepare(tmp_path / "intact", Sources.find([tmp_path / "data.txt"]), byte_tokenizer(), 0.5)
    for limit, verified in ((21, set(range(21))), (3, {0, 10, 20})):
        monkeypatch.setattr("lightning_attention.training.blocks.VERIFIED_BLOCKS", limit)
        missed = set()
        for block in range(21):
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(tmp_path / "intact", tmp_path / "copy")
            with (tmp_path / "copy" / "tokens.bin").open("r+b") as file:
                file.seek(100 * block + 3)
                file.write(b"\x55")
            with suppress(ValueError):
                Corpus.open(tmp_path / "copy")
                missed.add(block)
        assert missed == set(range(21)) - verified


def test_documents_without_text_are_refused(tmp_path):
    folder = write(tmp_path / "data", a_txt="")
    with pytest.raises(ValueError, match="the data holds no text"):
        Corpus.prepare(tmp_path / "corpus", Sources.find([folder]), byte_tokenizer())
    assert not (tmp_path / "corpus").exists()


def test_unigram_counts_training_tokens(tmp_path):
    folder = write(tmp_path / "data", a_txt="aaab" * 10)
    corpus = Corpus.prepare(tmp_path / "corpus", Sources.find([folder]), byte_tokenizer(), 0.5)
    frequencies = corpus.unigram().exp()
    counts = np.bincount(corpus.train_tokens()[:], minlength=259) + 1
    np.testing.assert_allclose(frequencies.numpy(), counts / counts.sum())
    assert frequencies.sum().item() == pytest.approx(1)
    sequences = corpus.held_out_set(5)
    expected = -np.mean([math.log(frequencies[token]) for token in corpus.held_out_tokens()])
    assert sequences.loss_of(corpus.unigram()) == pytest.approx(expected)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(2, 20))
def test_sequences_hold_every_token_and_positions_restart_with_documents(lengths, sequence_length):
    starts = np.cumsum([0, *lengths])
    stream = np.arange(sum(lengths) + sequence_length, dtype=np.uint16) % 7
    sequences = PackedDataset(stream, sequence_length, starts)
    for index in range(len(sequences)):
        item = sequences[index]
        first = index * sequence_length
        assert item["input_ids"].tolist() == stream[first : first + sequence_length].tolist()
        for t in range(sequence_length):
            begin = max(first, *(int(start) for start in starts if start <= first + t))
            assert item["position_ids"][t] == first + t - begin
            assert item["labels"][t] == (-100 if first + t == begin else item["input_ids"][t])
    assert len(sequences) == len(stream) // sequence_length


def test_training_and_held_out_sequences_hold_their_tokens_in_order(tmp_path):
    lines = "\n".join(json.dumps({"text": "x" * (1 + i % 5)}) for i in range(200))
    (tmp_path / "data.jsonl").write_text(lines)
    corpus = Corpus.prepare(tmp_path / "corpus", Sources.find([tmp_path / "data.jsonl"]), byte_tokenizer(), 0.3)
    for sequences, tokens in (
        (corpus.training_set(16), corpus.train_tokens()),
        (corpus.held_out_set(16), corpus.held_out_tokens()),
        (corpus.held_out_set(16, max_tokens=70), corpus.held_out_tokens()[:64]),
    ):
        items = [sequences[i] for i in range(len(sequences))]
        ids = torch.cat([item["input_ids"] for item in items])
        assert ids.tolist() == tokens[: len(tokens) // 16 * 16].tolist()
        for item in items:
            begins = (item["input_ids"] == BOS) | (torch.arange(16) == 0)
            assert torch.equal(item["position_ids"] == 0, begins)


def test_invalid_sequences_are_refused():
    tokens, starts = np.zeros(10, dtype=np.uint16), np.array([0])
    with pytest.raises(ValueError, match="sequence_length must be at least 2, got 1"):
        PackedDataset(tokens, 1, starts)
    with pytest.raises(ValueError, match="there are 10 tokens, fewer than one sequence of 11"):
        PackedDataset(tokens, 11, starts)
    for wrong in (EOS, starts.astype(np.uint64), [0]):  # in 0.1.0 this was a token id
        with pytest.raises(TypeError, match="document_starts must be a NumPy array of int64, got"):
            PackedDataset(tokens, 4, wrong)  # pyright: ignore[reportArgumentType]
    sequences = PackedDataset(tokens, 4, starts, max_tokens=6)
    assert len(sequences) == 1
    with pytest.raises(IndexError):
        sequences[1]
    assert sequences[0]["input_ids"].dtype == torch.int64
