"""Tokenization goes on after a kill."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from training.test_corpus import documents, write
from training.test_encoding import gpt2
from transformers import PreTrainedTokenizerFast

from lightning_attention.training import Corpus, byte_tokenizer, encoding, writer
from lightning_attention.training.documents import Sources

FILES = ["corpus.json", "documents.bin", "tokens.bin"]
TEXTS = [f"text {i} " * (1 + 37 * i % 50) for i in range(40)]


def bpe() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=gpt2(), bos_token="<s>", eos_token="</s>")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Batches end within documents; every document that ends a batch is recorded."""
    monkeypatch.setattr(encoding, "BYTES_BATCH", 100)
    monkeypatch.setattr(encoding, "BATCH", 300)
    monkeypatch.setattr(encoding, "WINDOW", 150)
    monkeypatch.setattr(encoding, "OVERLAP", 40)
    monkeypatch.setattr(writer, "JOURNAL_SECONDS", 0)
    monkeypatch.setattr("lightning_attention.training.blocks.BLOCK", 64)
    monkeypatch.setattr("lightning_attention.training.formats.BLOCK", 50)


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    """Text files, files of lines, and files without text."""
    data = write(tmp_path / "data", **{f"f{i}_txt": text for i, text in enumerate(TEXTS[:10])}, empty_txt="")
    for i in range(3):
        lines = ['{"text": ""}', *(json.dumps({"text": text}) for text in TEXTS[10 + 10 * i : 20 + 10 * i])]
        (data / f"lines{i}.jsonl").write_text("\n".join(lines))
    (data / "empty.jsonl").write_text('{"text": ""}\n' * 3)
    return Sources.find(data)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


class Read:
    """Record of progress: bytes read, and bytes of all files."""

    def __init__(self):
        self.counts: list[int] = []
        self.totals: set[int] = set()

    def __call__(self, num_read: int, num_bytes: int) -> None:
        self.counts.append(num_read)
        self.totals.add(num_bytes)


def killed(folder: Path, sources: Sources, tokenizer: PreTrainedTokenizerFast) -> list[Path]:
    """Copies of the folder at every moment between two batches, as a kill would leave it."""
    copies: list[Path] = []

    def copy(*progress: int) -> None:
        copies.append(folder.with_name(f"killed-{len(copies)}"))
        shutil.copytree(folder, copies[-1])

    Corpus.prepare(folder, sources, tokenizer, 0.2, copy)
    return copies


@pytest.mark.parametrize("make", [byte_tokenizer, bpe], ids=["bytes", "GPT-2"])
def test_a_killed_tokenization_goes_on(tmp_path, sources, make):
    tokenizer = make()
    copies = killed(tmp_path / "undisturbed", sources, tokenizer)
    num_bytes = sum(file.stat().st_size for file in sources.files)
    first_read = []
    for copy in copies[::3]:
        read = Read()
        Corpus.prepare(copy, sources, tokenizer, 0.2, read)
        assert content(copy) == content(tmp_path / "undisturbed")
        assert read.totals == {num_bytes}
        first_read.append(read.counts[0])
    assert len(copies) > 10
    assert first_read == sorted(first_read)
    assert first_read[0] == 0 < first_read[-1]
    assert sorted(content(tmp_path / "undisturbed")) == FILES
    assert make is bpe or sorted(map(bytes.decode, documents(Corpus.open(copies[0])))) == sorted(TEXTS)


def flip(file: Path) -> None:
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))


# Changes of what a kill has left.
DAMAGE: dict[str, Callable[[Path], object]] = {
    "tokens missing": lambda folder: (folder / "tokens.bin.unfinished").unlink(),
    "tokens too short": lambda folder: os.truncate(folder / "tokens.bin.unfinished", 100),
    "tokens flipped": lambda folder: flip(folder / "tokens.bin.unfinished"),
    "bounds missing": lambda folder: (folder / "documents.bin.unfinished").unlink(),
    "bounds flipped": lambda folder: flip(folder / "documents.bin.unfinished"),
    "journal missing": lambda folder: (folder / "journal.json.unfinished").unlink(),
    "journal cut off": lambda folder: os.truncate(folder / "journal.json.unfinished", 100),
    "journal empty": lambda folder: (folder / "journal.json.unfinished").write_text(""),
    "journal a list": lambda folder: (folder / "journal.json.unfinished").write_text("[]"),
    "journal flipped": lambda folder: flip(folder / "journal.json.unfinished"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_leftovers_are_not_used(tmp_path, sources, damage):
    *_, copy = killed(tmp_path / "undisturbed", sources, byte_tokenizer())
    damage(copy)
    read = Read()
    Corpus.prepare(copy, sources, byte_tokenizer(), 0.2, read)
    assert read.counts[0] == 0
    assert content(copy) == content(tmp_path / "undisturbed")


def test_leftovers_of_other_sources_are_not_used(tmp_path, sources):
    *_, copy = killed(tmp_path / "undisturbed", sources, byte_tokenizer())
    sources.files[0].write_text("another text")
    corpus = Corpus.prepare(copy, sources, byte_tokenizer(), 0.2)
    assert documents(corpus)[0] == b"another text"
    assert sorted(content(copy)) == FILES


def test_an_error_after_a_kill_removes_the_leftovers(tmp_path, sources):
    *_, copy = killed(tmp_path / "undisturbed", sources, byte_tokenizer())

    def stop(*progress: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Corpus.prepare(copy, sources, byte_tokenizer(), 0.2, stop)
    assert content(copy) == {}


@pytest.mark.parametrize("make", [byte_tokenizer, bpe], ids=["bytes", "GPT-2"])
@pytest.mark.parametrize("seed", range(3))
def test_a_file_that_is_not_text_after_all_is_skipped(tmp_path, sources, make, seed):
    """Wherever it is in the order of files, after a kill too."""
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS[:9])
    bad = {
        "bad.txt": b"x" * 700 + b"\xff",
        "late.jsonl": lines + b"\xff",
        "nul.jsonl": lines + b"\0",
        "z": b"y" * 150 + b"\0",
    }
    for name, data in bad.items():
        (tmp_path / "data" / name).write_bytes(data)
    found = Sources.find(tmp_path / "data", seed=seed)
    assert len(found.files) == len(sources.files) + len(bad)
    paths = {tmp_path / "data" / name for name in bad}
    in_order = Sources(tuple(file for file in found.files if file not in paths))
    Corpus.prepare(tmp_path / "expected", in_order, make(), 0.2)
    copies = killed(tmp_path / "corpus", found, make())
    for folder in [tmp_path / "corpus", *copies[::5]]:
        corpus = Corpus.prepare(folder, found, make(), 0.2)
        assert corpus.skipped_files == len(bad)
        for name in ("tokens.bin", "documents.bin"):
            assert (folder / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    assert found.describe_skipped(len(bad)) == "skipped files and folders: 4 not UTF-8 text"


def test_a_given_file_that_is_not_text_after_all_is_an_error(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"x" * 700 + b"\xff")
    with pytest.raises(ValueError, match=r"bad.txt is not UTF-8 text"):
        Corpus.prepare(tmp_path / "corpus", Sources.find(tmp_path / "bad.txt"), byte_tokenizer())
    assert not (tmp_path / "corpus").exists()
