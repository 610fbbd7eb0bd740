"""Runs on conversations."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training.runs import MODEL, arguments, command, error_lines, losses, options, quiet, torchrun
from training.test_conversations import (
    MARKED,
    PLAIN_CHATML,
    bpe,
    chat_lines,
    decoded,
    tokenizer_with,
    turns,
    write_lines,
)
from transformers import AutoTokenizer

from lightning_attention.inference import ChatPrompts, load
from lightning_attention.models import LightningForCausalLM
from lightning_attention.training import Corpus, byte_tokenizer, train
from lightning_attention.training.metrics import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def chat_files(files: Path) -> Path:
    write_lines(files / "chat.jsonl", *chat_lines(300))
    return files


def test_the_loss_of_a_step_is_the_mean_over_tokens_of_answers(chat_files):
    run = options(chat_files, data=chat_files / "chat.jsonl", steps=1, save_every=1, log_every=1, held_out=0.0)
    train(run, console=quiet())
    dataset = Corpus.open(chat_files / "run" / "corpus").training_set(64)
    torch.manual_seed(run.seed)
    model = LightningForCausalLM(load(chat_files / "run")[0].config)
    order = np.random.default_rng([run.seed, 0]).permutation(len(dataset))[: run.batch_size]
    total = count = 0.0
    for item in (dataset[int(i)] for i in order):
        labels = item["labels"][1:]
        logits = model(item["input_ids"][None], position_ids=item["position_ids"][None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += (labels != -100).sum().item()
    assert losses(chat_files / "run")[1] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.slow
def test_processes_segments_and_accumulation_make_the_same_steps(chat_files):
    data = {"data": chat_files / "chat.jsonl", "steps": 12, "log_every": 1, "batch_size": 4}
    train(options(chat_files, **data), console=quiet())
    train(
        options(chat_files, "parts", **data | {"batch_size": 1, "accumulate": 4, "segment_length": 16}), console=quiet()
    )
    process = torchrun(2, *arguments(chat_files, "shared", **data | {"batch_size": 1, "accumulate": 2}))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    expected = [x.get("loss", x.get("eval_loss")) for x in read_metrics(chat_files / "run" / "metrics.jsonl")]
    for name in ("parts", "shared"):
        found = [x.get("loss", x.get("eval_loss")) for x in read_metrics(chat_files / name / "metrics.jsonl")]
        assert found == pytest.approx(expected, rel=1e-3)


def test_questions_that_fill_sequences_leave_the_loss_finite(chat_files):
    lines = [{"messages": turns(f"{i} " * 400, f"{i}")} for i in range(20)]
    write_lines(chat_files / "chat.jsonl", *lines)
    run = options(
        chat_files,
        data=chat_files / "chat.jsonl",
        steps=4,
        held_out=0.3,
        eval_tokens=1 << 14,
        log_every=1,
        eval_every=2,
    )
    train(run, console=quiet())
    records = read_metrics(chat_files / "run" / "metrics.jsonl")
    found = [float(record[name]) for record in records for name in ("loss", "eval_loss") if name in record]
    assert len(found) == 6
    assert all(0 < loss < 10 for loss in found)


def test_data_whose_answers_are_in_no_sequence_is_refused(chat_files):
    for held_out, message in ((0.0, "sequences$"), (0.5, "sequences, of eval_tokens 100 at most$")):
        lines = [{"messages": turns("a " * 100, "b")}] * (4 if held_out else 1)
        write_lines(chat_files / "chat.jsonl", *lines)
        run = options(
            chat_files, data=chat_files / "chat.jsonl", held_out=held_out, sequence_length=200, eval_tokens=100
        )
        with pytest.raises(ValueError, match=f"no token to predict: no answer of a conversation is in its {message}"):
            train(run, console=quiet())
    assert not (chat_files / "run").exists()


def saved_template(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder).chat_template


def test_the_template_of_a_run_is_saved_and_used(chat_files):
    """By a run from a checkpoint too; another template replaces it."""
    (chat_files / "bot.jinja").write_text(MARKED)
    (chat_files / "other.jinja").write_text(PLAIN_CHATML)
    data = {"data": chat_files / "chat.jsonl", "steps": 1, "save_every": 1}
    train(options(chat_files, chat_template=chat_files / "bot.jinja", **data), console=quiet())
    tokenizer = load(chat_files / "run")[1]
    assert saved_template(chat_files / "run" / "checkpoint-1") == tokenizer.chat_template == MARKED
    assert ChatPrompts(tokenizer).encode(turns("hi")) == list(b"<user>hi<bot>")
    assert ChatPrompts(tokenizer).stops == ["</bot>"]
    data |= {"init_from": chat_files / "run", "config": None}
    train(options(chat_files, "tuned", **data), console=quiet())
    assert decoded(Corpus.open(chat_files / "tuned" / "corpus"), tokenizer)[0][1][0].endswith("</bot>")
    assert saved_template(chat_files / "tuned" / "checkpoint-1") == MARKED
    train(options(chat_files, "other", chat_template=chat_files / "other.jinja", **data), console=quiet())
    assert saved_template(chat_files / "other" / "checkpoint-1") == PLAIN_CHATML


def test_a_tokenizer_without_a_template_gets_chatml_with_conversations_alone(chat_files):
    tokenizer = tokenizer_with(None)
    tokenizer.save_pretrained(chat_files / "bare")
    run = {"tokenizer": str(chat_files / "bare"), "steps": 1, "save_every": 1}
    train(options(chat_files, "text", **run), console=quiet())
    assert saved_template(chat_files / "text" / "checkpoint-1") is None
    train(options(chat_files, "chat", validation=chat_files / "chat.jsonl", **run), console=quiet())
    assert saved_template(chat_files / "chat" / "checkpoint-1") == byte_tokenizer().chat_template


def test_a_run_on_conversations_resumes(chat_files):
    data = {"data": chat_files / "chat.jsonl", "steps": 8, "save_every": 4, "log_every": 1}
    train(options(chat_files, **data), console=quiet())
    expected = losses(chat_files / "run")
    shutil.rmtree(chat_files / "run" / "checkpoint-8")
    os.remove(chat_files / "chat.jsonl")
    train(options(chat_files, **data), resume=True, console=quiet())
    assert losses(chat_files / "run") == pytest.approx(expected, rel=1e-4)


TEMPLATE_FAULTS = {
    "missing": (None, "No such file or directory"),
    "empty": (b" \n", "holds no chat template"),
    "not UTF-8": (b"\xff", "is not UTF-8"),
    "not Jinja": (b"{% for", "the chat template is not valid"),
}


@pytest.mark.parametrize(("template", "message"), TEMPLATE_FAULTS.values(), ids=TEMPLATE_FAULTS)
def test_a_template_that_cannot_be_read_is_refused_before_any_work(chat_files, template, message):
    if template is not None:
        (chat_files / "a.jinja").write_bytes(template)
    with pytest.raises((ValueError, OSError), match=message):
        train(options(chat_files, chat_template=chat_files / "a.jinja"), console=quiet())
    assert not (chat_files / "run").exists()


@pytest.mark.slow
def test_a_tokenizer_of_the_hub_keeps_its_special_tokens_and_template(chat_files):
    """From the cache of the hub, without a network."""
    snapshot = chat_files / "cache" / "models--someone--tiny" / "snapshots" / "0123"
    tokenizer = bpe(chat_files)
    tokenizer.chat_template = PLAIN_CHATML
    tokenizer.save_pretrained(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    env = os.environ | {"HF_HUB_CACHE": str(chat_files / "cache"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    (chat_files / "model.json").write_text(json.dumps(MODEL))
    line = arguments(chat_files, tokenizer="someone/tiny", steps=1, save_every=1)
    result = command(*line, env=env)
    assert result.returncode == 0, result.stderr
    saved = AutoTokenizer.from_pretrained(chat_files / "run" / "checkpoint-1")
    assert saved.special_tokens_map == tokenizer.special_tokens_map
    assert saved.chat_template == PLAIN_CHATML
    missing = command(*arguments(chat_files, "other", tokenizer="someone/else", steps=1), env=env)
    assert missing.returncode == 2
    (line,) = error_lines(missing.stderr)
    assert "there is no file someone/else, and none on the hub: " in line
    assert not (chat_files / "other").exists()
