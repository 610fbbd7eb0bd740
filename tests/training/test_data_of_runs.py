"""From a user's files to a trained model."""

import gzip
import io
import json
import os
import random
import re
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
    """Documents that all begin with q, and are otherwise letters by chance."""
    rng = random.Random(0)
    texts = ["q" + "".join(rng.choices("abcdefgh", k=rng.randint(3, 12))) for _ in range(600)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))


def run(home: Path, **changes) -> tuple[Path, str]:
    """The checkpoint, and what was printed."""
    printed = io.StringIO()
    options = {"output": home / "run", "data": home / "data.jsonl", "config": home / "model.json"}
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


def test_the_first_token_after_bos_is_learned_if_bos_is_eos(home):
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
    assert all((item[1:] == 256).any() for item in labels)  # ends are learned too


@pytest.mark.parametrize(
    ("asked", "added", "end"),
    [(None, ["<|pad|>"], END), ("<|im_end|>", ["<|pad|>"], "<|im_end|>")],
    ids=["found", "--eos-token"],
)
def test_a_run_says_which_tokens_it_adds(home, asked, added, end):
    tokenizer_folder = gpt2(home / "tokenizer", None, "<|im_end|>", END)
    _, printed = run(home, tokenizer=tokenizer_folder, eos_token=asked)
    assert ("names no EOS token: <|endoftext|> found in the vocabulary\n" in printed) == (asked is None)
    assert "the tokenizer names no padding token: <|pad|> added to the vocabulary\n" in printed
    model, tokenizer = load(home / "run")
    assert tokenizer.eos_token == end
    assert model.config.vocab_size == len(tokenizer) == 256 + 2 + len(added)
    corpus = Corpus.open(home / "run" / "corpus")
    assert corpus.train_tokens()[-1] == tokenizer.eos_token_id
    _, printed = resumed(home)
    assert "vocabulary" not in printed


def resumed(home: Path) -> tuple[Path, str]:
    printed = io.StringIO()
    options = TrainingOptions.load(home / "run")
    return train(options, resume=True, console=Console(file=printed, width=200)), printed.getvalue()


def test_an_embedding_has_room_for_ids_with_holes(home):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: 3 * i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(home / "tokenizer.json"))
    run(home, tokenizer=home / "tokenizer.json")
    model, tokenizer = load(home / "run")
    assert model.config.vocab_size == max(tokenizer.get_vocab().values()) + 1 > len(tokenizer)


def test_a_run_says_what_it_skips(home):
    (home / "data").mkdir()
    write_documents(home / "data" / "a.JSONL")
    (home / "data" / "binary").write_bytes(b"\0")
    (home / "data" / "dangling").symlink_to("nowhere")
    (home / "data" / "again").symlink_to(".")
    _, printed = run(home, data=[home / "data", home / "data" / "a.JSONL"])
    assert "skipped files and folders: 1 dangling links, 2 found twice, 1 not UTF-8 text\n" in printed
    assert Corpus.open(home / "run" / "corpus").num_documents == 600


@pytest.mark.parametrize("is_there", [True, False], ids=["the user's folder", "no folder"])
def test_data_of_no_use_leaves_nothing_behind(home, is_there):
    (home / "data").mkdir()
    os.mkfifo(home / "data" / "fifo")
    if is_there:
        (home / "run").mkdir()
    with pytest.raises(ValueError, match="fifo is no regular file"):
        run(home, data=home / "data")
    assert (home / "run").exists() == is_there
    assert not is_there or not os.listdir(home / "run")


def test_the_page_about_data_runs_as_printed(home, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    [block] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(home)
    (home / "texts").mkdir()
    (home / "texts" / "a.txt").write_text("some text " * 500)
    (home / "more.jsonl.gz").write_bytes(gzip.compress((home / "data.jsonl").read_bytes()))
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["corpus"].num_documents == 601
    assert len(names["sequences"]) > 5


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
def test_a_run_with_a_damaged_corpus_is_not_resumed(home, damage, message):
    """One line, code 2, and the checkpoint stays."""
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
    assert error_lines(result.stderr)[0].endswith("FIFO, socket or device: copy what it gives to a file")
    assert not (home / "run").exists()


@pytest.mark.slow
def test_a_run_starts_anew_after_a_kill_that_left_half_a_corpus(home):
    """Whatever was written is written again, and nothing of it stays beside the corpus."""
    text = "".join(random.Random(0).choices("abc \n", k=1000)) * 20_000
    (home / "large.txt").write_text(text)
    arguments = "train", "--output", home / "run", "--config", home / "model.json", "--steps", 1
    process = start(*arguments, "--data", home / "large.txt")
    corpus, deadline = home / "run" / "corpus", time.monotonic() + 120
    while not any(file.stat().st_size for file in corpus.glob("tokens.bin.*.unfinished")):
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
@pytest.mark.parametrize("is_there", [True, False], ids=["the user's folder", "no folder"])
def test_a_full_disk_while_tokenizing_leaves_nothing_behind(home, is_there):
    """No file may grow past 4 KB."""
    if is_there:
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
    assert f"File too large: '{home / 'run' / 'corpus' / 'tokens.bin'}'" in error_lines(result.stderr)[0]
    assert (home / "run").exists() == is_there
    assert not is_there or not os.listdir(home / "run")
