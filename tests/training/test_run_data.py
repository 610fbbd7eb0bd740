"""Runs on text files with various tokenizers."""

import io
import json
import os
import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from training.runs import MODEL, command, error_lines, start
from transformers import PreTrainedTokenizerFast

from lightning_attention.inference import encode, load
from lightning_attention.training import Corpus, TrainingOptions, train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SMALL = {"steps": 2, "sequence_length": 32, "batch_size": 2, "eval_tokens": 256, "learning_rate": 1e-2}
END = "<|endoftext|>"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    write_documents(tmp_path / "data.jsonl")
    return tmp_path


def write_documents(path: Path) -> None:
    """Write documents that begin with q, followed by random letters."""
    rng = random.Random(0)
    texts = ["q" + "".join(rng.choices("abcdefgh", k=rng.randint(3, 12))) for _ in range(600)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))


def run(home: Path, **changes: Any) -> tuple[Path, str]:
    """Train; return the checkpoint and the printed text."""
    printed = io.StringIO()
    options: dict[str, Any] = {"output": home / "run", "data": home / "data.jsonl", "config": home / "model.json"}
    checkpoint = train(TrainingOptions(**options | SMALL | changes), console=Console(file=printed, width=200))
    return checkpoint, printed.getvalue()


def gpt2(folder: Path, special_tokens: dict[str, str] | None, *vocabulary: str) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, *vocabulary])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    if special_tokens is not None:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens).save_pretrained(folder)
    return folder


def test_the_first_token_of_a_document_is_learned_if_bos_is_eos(home):
    tokens = {"bos_token": END, "eos_token": END, "unk_token": END}
    tokenizer_folder = gpt2(home / "tokenizer", tokens, END)
    run(home, tokenizer=tokenizer_folder, steps=150, batch_size=8)
    model, tokenizer = load(home / "run")
    assert encode(tokenizer, "") == tokenizer("").input_ids == [256]
    assert encode(tokenizer, "qa") == tokenizer("qa").input_ids
    with torch.no_grad():
        logits = model(torch.tensor([encode(tokenizer, "")], device=model.device)).logits
    assert logits[0, -1].softmax(-1)[encode(tokenizer, "q")[-1]] > 0.9
    corpus = Corpus.open(home / "run" / "corpus")
    assert corpus.num_documents == 600
    assert corpus.num_train in corpus.document_starts()
    assert corpus.held_out_tokens()[0] == corpus.train_tokens()[-1] == 256
    labels = [corpus.training_set(32)[i]["labels"] for i in range(40)]
    assert all((item[1:] == 256).any() for item in labels)  # EOS tokens are labels


@pytest.mark.parametrize(
    ("eos_token", "expected"),
    [(None, END), ("<|im_end|>", "<|im_end|>")],
    ids=["found", "--eos-token"],
)
def test_a_run_reports_the_tokens_it_adds(home, eos_token, expected):
    tokenizer_folder = gpt2(home / "tokenizer", None, "<|im_end|>", END)
    _, printed = run(home, tokenizer=tokenizer_folder, eos_token=eos_token)
    assert ("names no EOS token: <|endoftext|> found in the vocabulary\n" in printed) == (eos_token is None)
    assert "the tokenizer names no padding token: <|pad|> added to the vocabulary\n" in printed
    model, tokenizer = load(home / "run")
    assert tokenizer.eos_token == expected
    assert model.config.vocab_size == len(tokenizer) == 256 + 2 + 1
    corpus = Corpus.open(home / "run" / "corpus")
    assert corpus.train_tokens()[-1] == tokenizer.eos_token_id
    _, printed = resumed(home)
    assert "vocabulary" not in printed


def resumed(home: Path) -> tuple[Path, str]:
    printed = io.StringIO()
    options = TrainingOptions.load(home / "run")
    return train(options, resume=True, console=Console(file=printed, width=200)), printed.getvalue()


def test_the_embedding_has_room_for_the_largest_token_id(home):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: 3 * i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(home / "tokenizer.json"))
    run(home, tokenizer=home / "tokenizer.json")
    model, tokenizer = load(home / "run")
    assert model.config.vocab_size == max(tokenizer.get_vocab().values()) + 1 > len(tokenizer)


def test_a_run_reports_skipped_files(home):
    (home / "data").mkdir()
    write_documents(home / "data" / "a.JSONL")
    (home / "data" / "binary").write_bytes(b"\0")
    (home / "data" / "dangling").symlink_to("nowhere")
    (home / "data" / "again").symlink_to(".")
    _, printed = run(home, data=[home / "data", home / "data" / "a.JSONL"])
    assert "skipped files and folders: 1 dangling links, 2 found twice, 1 not UTF-8 text\n" in printed
    assert Corpus.open(home / "run" / "corpus").num_documents == 600


@pytest.mark.parametrize("exists", [True, False], ids=["folder of the user", "no folder"])
def test_unreadable_data_leaves_nothing_behind(home, exists):
    (home / "data").mkdir()
    os.mkfifo(home / "data" / "fifo")
    if exists:
        (home / "run").mkdir()
    with pytest.raises(ValueError, match="fifo is not a regular file"):
        run(home, data=home / "data")
    assert (home / "run").exists() == exists
    assert not exists or not os.listdir(home / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda corpus: (corpus / "tokens.bin").write_bytes(bytes((corpus / "tokens.bin").stat().st_size)), "damaged"),
        (lambda corpus: os.truncate(corpus / "tokens.bin", 100), "has 100 bytes"),
        (lambda corpus: (corpus / "documents.bin").unlink(), "is missing"),
        (lambda corpus: os.truncate(corpus / "corpus.json", 20), "is damaged"),
    ],
    ids=["zeros", "truncated", "missing", "description"],
)
def test_a_run_with_a_damaged_corpus_is_not_resumed_and_keeps_its_checkpoint(home, damage, message):
    run(home)
    damage(home / "run" / "corpus")
    result = command("train", "--resume", "--output", home / "run")
    assert result.returncode == 2
    [line] = error_lines(result.stderr)
    assert str(home / "run" / "corpus") in line
    assert message in line
    load(home / "run")


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False], ids=["named", "in a folder"])
def test_a_fifo_does_not_hang_a_run(home, named):
    (home / "data").mkdir()
    os.mkfifo(home / "data" / "fifo")
    write_documents(home / "data" / "a.jsonl")
    data = home / "data" / "fifo" if named else home / "data"
    result = command("train", "--data", data, "--output", home / "run")
    assert result.returncode == 2
    assert error_lines(result.stderr)[0].endswith("FIFO, socket or device: copy its content to a file")
    assert not (home / "run").exists()


@pytest.mark.slow
def test_a_run_replaces_the_unfinished_corpus_of_a_killed_run(home):
    text = "".join(random.Random(0).choices("abc \n", k=1000)) * 20_000
    (home / "large.txt").write_text(text)
    arguments = "train", "--output", home / "run", "--config", home / "model.json", "--steps", 1
    process = start(*arguments, "--data", home / "large.txt")
    corpus, deadline = home / "run" / "corpus", time.monotonic() + 120
    while not any(file.stat().st_size for file in corpus.glob("tokens.bin.unfinished")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (corpus / "tokens.bin").exists()
    assert list(corpus.glob("*.unfinished"))
    result = command(*arguments, "--data", home / "data.jsonl", "--sequence-length", 32)
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(corpus)) == ["corpus.json", "documents.bin", "tokens.bin"]


@pytest.mark.slow
@pytest.mark.parametrize("exists", [True, False], ids=["folder of the user", "no folder"])
def test_a_full_disk_while_tokenizing_leaves_nothing_behind(home, exists):
    """Files are limited to 4 KB."""
    if exists:
        (home / "run").mkdir()
    limit = (4096, 4096)
    result = command(
        "train",
        "--output",
        home / "run",
        "--data",
        home / "data.jsonl",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert result.returncode == 2
    [line] = error_lines(result.stderr)
    files = [home / "run" / "corpus" / name for name in ("tokens.bin", "documents.bin")]
    assert any(line.endswith(f"File too large: '{file}'") for file in files)
    assert (home / "run").exists() == exists
    assert not exists or not os.listdir(home / "run")
