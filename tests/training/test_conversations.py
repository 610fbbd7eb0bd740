"""Conversations as training data: which tokens have loss, on the disk and in runs."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from lightning_attention.inference import ChatPrompts
from lightning_attention.training import Corpus, PackedDataset, byte_tokenizer, encoding, writer
from lightning_attention.training.batches import num_labels
from lightning_attention.training.bpe import train_bpe
from lightning_attention.training.conversations import ChatDocument, Conversations
from lightning_attention.training.documents import Sources
from lightning_attention.training.text_bytes import bits_per_nat, token_bytes

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PLAIN_CHATML = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<bot>{% generation %}{{ m.content }}</bot>{% endgeneration %}"
    "{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
LAST_ONLY = (  # drops all answers but the last, as templates for reasoning drop thoughts
    "{% for m in messages %}[{{ m.role }}:{{ m.content if m.role == 'user' or loop.last else '' }}]{% endfor %}"
)
NO_SYSTEM = "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}={{ m.content }};{% endif %}{% endfor %}"
NO_END = "{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = [{"role": "system", "content": system}] if system is not None else []
    return roles + [{"role": ("user", "assistant")[i % 2], "content": x} for i, x in enumerate(contents)]


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def bpe(folder: Path) -> PreTrainedTokenizerFast:
    (folder / "words.txt").write_text("the cat and the dog say yes or no to the cat " * 20)
    return train_bpe(Sources.find(folder / "words.txt"), 290)


def write_lines(file: Path, *lines: Any) -> Path:
    file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return file


def chat_lines(count: int, start: int = 0) -> list[dict[str, Any]]:
    numbers = range(start, start + count)
    return [{"messages": turns(f"What is {i} plus 1?", f"It is {i + 1}.", "Sure?", "Yes."[: i % 5])} for i in numbers]


def decoded(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, list[str]]]:
    """Text of each document, and its parts that have loss."""
    tokens = np.concatenate([corpus.train_tokens()[:], corpus.held_out_tokens()[:]])
    has_loss = np.ones(len(tokens), bool)
    for start, stop in corpus.context():
        has_loss[start:stop] = False
    found = []
    for start, stop in pairwise([*corpus.document_starts().tolist(), len(tokens)]):
        bounds = [start, *(start + 1 + np.flatnonzero(np.diff(has_loss[start:stop]))).tolist(), stop]
        parts = [tokenizer.decode(tokens[i:j].tolist()) for i, j in pairwise(bounds) if has_loss[i]]
        found.append((str(tokenizer.decode(tokens[start:stop].tolist())), [*map(str, parts)]))
    return found


# Templates, messages, and the parts of the text that have loss.
ANSWERS: dict[str, tuple[str | None, list[dict[str, str]], list[str]]] = {
    "ChatML by default": (None, turns("hi", "ho", "a", "b", system="s"), ["ho<|im_end|>", "b<|im_end|>"]),
    "ChatML without marks": (PLAIN_CHATML, turns("hi", "ho", "a", "b"), ["ho<|im_end|>", "b<|im_end|>"]),
    "space around answers": (PLAIN_CHATML, turns("hi", " ho \n"), [" ho \n<|im_end|>"]),
    "characters of several bytes": (None, turns("größe", "日本é"), ["日本é<|im_end|>"]),
    "an empty answer": (PLAIN_CHATML, turns("hi", "", "a", "b"), ["<|im_end|>", "b<|im_end|>"]),
    "an empty answer, marked": (MARKED, turns("hi", ""), ["</bot>"]),
    "the assistant begins": (PLAIN_CHATML, turns("hi", "ho")[1:] + turns("a", "b"), ["ho<|im_end|>", "b<|im_end|>"]),
    "a user's message at the end": (PLAIN_CHATML, turns("hi", "ho", "a"), ["ho<|im_end|>"]),
    "no header of answers": (LLAMA_2, turns("hi", "ho", "a", "b"), [" ho <|eos|>", " b <|eos|>"]),
    "marks": (MARKED, turns("hi", "ho", "a", "b"), ["ho</bot>", "b</bot>"]),
    "two answers in a row": (PLAIN_CHATML, [*turns("hi", "ho"), turns("", "b")[1]], ["ho<|im_end|>", "b<|im_end|>"]),
    "answers equal to questions": (PLAIN_CHATML, turns("a", "a", "a", "a"), ["a<|im_end|>"] * 2),
    "answers that spell the end": (PLAIN_CHATML, turns("a", "b<|im_end|>\n"), ["b<|im_end|>\n<|im_end|>"]),
}


@pytest.mark.parametrize("kind", ["bytes", "BPE"])
@pytest.mark.parametrize(("template", "messages", "answers"), ANSWERS.values(), ids=ANSWERS)
def test_answers_and_the_ends_of_their_turns_have_loss(tmp_path, kind, template, messages, answers):
    tokenizer = bpe(tmp_path) if kind == "BPE" else byte_tokenizer()
    tokenizer.chat_template = template
    file = write_lines(tmp_path / "chat.jsonl", {"messages": messages}, {"text": "plain"})
    corpus = Corpus.prepare(tmp_path / "corpus", Sources.find(file), tokenizer, 0.0)
    (text, found), plain = decoded(Corpus.open(tmp_path / "corpus"), tokenizer)
    if template is None:
        tokenizer.chat_template = PLAIN_CHATML
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert found == answers
    assert plain == ("<|bos|>plain<|eos|>", ["<|bos|>plain<|eos|>"])
    assert corpus.num_predicted_train == corpus.num_train - sum(b - a for a, b in corpus.context().tolist())


@pytest.mark.parametrize("template", [None, PLAIN_CHATML, LLAMA_2], ids=["marked", "ChatML", "Llama 2"])
@pytest.mark.parametrize("content", ["hi", "<|eos|> <|im_end|>", "a\n\n"], ids=repr)
def test_what_precedes_an_answer_has_the_tokens_of_a_prompt(tmp_path, template, content):
    tokenizer = bpe(tmp_path)
    if template is not None:
        tokenizer.chat_template = template
    messages = turns(content, "yes <|eos|>", "the cat?", "no")
    (parts,) = Conversations(tokenizer).encode([ChatDocument(messages, "a line")])
    before = next(i for i, (_, is_answer) in enumerate(parts) if is_answer)
    assert [token for ids, _ in parts[:before] for token in ids] == ChatPrompts(tokenizer).encode(messages[:1])
    assert tokenizer.eos_token_id not in parts[before][0][:-1]  # the spelling in a message is text


def test_names_of_special_tokens_in_a_template_are_tokens(tmp_path):
    """Tokens of bytes are stored in a byte each with special tokens of ChatML, too."""
    tokenizer: Any = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")], True)
    file = write_lines(tmp_path / "chat.jsonl", {"messages": turns("<|im_end|>", "ho")})
    corpus = Corpus.prepare(tmp_path / "corpus", Sources.find(file), tokenizer, 0.0)
    assert corpus.token_bytes == 1
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    prompt = ChatPrompts(tokenizer).encode(turns("<|im_end|>"))
    assert corpus.train_tokens()[:].tolist() == [*prompt, *b"ho", end, *b"\n"]
    assert (prompt.count(start), prompt.count(end)) == (2, 1)


FAULTS: dict[str, tuple[Any, str | None, str]] = {
    "no answer": ({"messages": turns("hi")}, None, "no message has the role assistant"),
    "no messages": ({"messages": []}, None, "messages must be a list of objects"),
    "a text": ({"messages": "hi"}, None, "messages must be a list of objects"),
    "an object": ({"messages": {"role": "user"}}, None, "messages must be a list of objects"),
    "numbers": ({"messages": [1, 2]}, None, "a message must be an object with role and content"),
    "content null": ({"messages": [{"role": "assistant", "content": None}]}, None, "the content of a message must be"),
    "content in parts": (
        {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
        None,
        "the content of a message must be a text",
    ),
    "no content": ({"messages": [{"role": "assistant"}]}, None, "a message must be an object with role and content"),
    "tool": ({"messages": [*turns("a", "b"), {"role": "tool", "content": "c"}]}, None, "the role of a message must be"),
    "a role that is a list": ({"messages": [{"role": ["user"], "content": ""}]}, None, "the role of a message must be"),
    "another field": ({"messages": [{"role": "assistant", "content": "", "weight": 0}]}, None, "and nothing else"),
    "tools": ({"messages": turns("a", "b"), "tools": [{}]}, None, "conversations with tools are not supported"),
    "text and messages": ({"messages": turns("a", "b"), "text": "a"}, None, "both 'text' and 'messages'"),
    "neither": ({"conversations": []}, None, "not a JSON object with a text in 'text' or a conversation in 'messages'"),
    "refused": ({"messages": turns("a", "b", system="c")}, LLAMA_2, "cannot render these messages: no system"),
    "left out": ({"messages": turns("a", "b", system="c")}, NO_SYSTEM, "leaves out message 1, of the role system"),
    "no end": ({"messages": turns("a", "b")}, NO_END, "writes nothing but space after an answer"),
    "other prefixes": (
        {"messages": turns("a", "b", "c", "d")},
        LAST_ONLY,
        r"another way .*mark .* by {% generation %}",
    ),
    "no prompt": ({"messages": turns("a", "b")[1:]}, LLAMA_2, "for which the chat template has no prompt"),
    "padding": ({"messages": turns("a", "b")}, MARKED + "<|pad|>", "writes <|pad|>, the padding token"),
}


@pytest.mark.parametrize(("line", "template", "message"), FAULTS.values(), ids=FAULTS)
def test_a_conversation_that_cannot_be_learned_is_named(tmp_path, line, template, message):
    file = write_lines(tmp_path / "chat.jsonl", {"messages": turns("hi", "ho")}, line)
    tokenizer = tokenizer_with(template)
    where = "line [12]" if message == FAULTS["no end"][2] or template == MARKED + "<|pad|>" else "line 2"
    with pytest.raises(ValueError, match=rf"chat.jsonl, {where}: .*{message}") as raised:
        Corpus.prepare(tmp_path / "corpus", Sources.find(file), tokenizer)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "corpus").exists()


def test_text_field_names_the_messages(tmp_path):
    line = {"text": "plain", "messages": turns("a", "b"), "chat": turns("c", "d"), "name": None}
    for field, answers in (("text", ["<|bos|>plain<|eos|>"]), ("messages", ["b<|im_end|>"]), ("chat", ["d<|im_end|>"])):
        sources = Sources.find(write_lines(tmp_path / "a.jsonl", line), field)
        corpus = Corpus.prepare(tmp_path / field, sources, byte_tokenizer(), 0.0)
        assert [found for _, found in decoded(corpus, byte_tokenizer())] == [answers]


def test_parquet_rows_hold_conversations(tmp_path):
    """A column of structs has null fields in messages that do not need them."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    messages = [[*turns("a", "b")], [{**message, "name": None} for message in turns("c", "d")]]
    parquet.write_table(pyarrow.table({"id": [1, 2], "messages": messages}), tmp_path / "a.parquet")
    corpus = Corpus.prepare(tmp_path / "corpus", Sources.find(tmp_path / "a.parquet"), byte_tokenizer(), 0.0)
    assert [found for _, found in decoded(corpus, byte_tokenizer())] == [["b<|im_end|>"], ["d<|im_end|>"]]


def test_contents_of_messages_train_a_bpe(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", *[{"messages": turns("the question", "the answer")}] * 9)
    assert train_bpe(Sources.find(file), 300).tokenize("the answer") == ["the", "Ġanswer"]


# On the disk


def mixed(folder: Path) -> Sources:
    """Files of conversations, of texts, of both, and one that is not text after all."""
    data = folder / "data"
    data.mkdir()
    for i in range(3):
        write_lines(data / f"chat{i}.jsonl", *chat_lines(12, 12 * i))
        (data / f"text{i}.txt").write_text(f"plain text {i} " * 30)
    write_lines(data / "both.jsonl", *(x for i in range(9) for x in ({"text": f"t{i}"}, *chat_lines(1, i))))
    bad = write_lines(data / "bad.jsonl", *chat_lines(40))
    bad.write_bytes(bad.read_bytes() + b"\n\xff")
    return Sources.find(data)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_killed_tokenization_of_conversations_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 300)
    monkeypatch.setattr(encoding, "BYTES_BATCH", 100)
    monkeypatch.setattr(writer, "JOURNAL_SECONDS", 0)
    sources, folder, copies = mixed(tmp_path), tmp_path / "corpus", []

    def copy(*progress: int) -> None:
        copies.append(tmp_path / f"killed-{len(copies)}")
        shutil.copytree(folder, copies[-1])

    corpus = Corpus.prepare(folder, sources, byte_tokenizer(), 0.2, copy)
    assert sorted(content(folder)) == ["context.bin", "corpus.json", "documents.bin", "tokens.bin"]
    found = decoded(corpus, byte_tokenizer())
    assert len(found) == corpus.num_documents == 3 * 12 + 3 + 18
    assert sum(len(answers) == 2 for _, answers in found) == 3 * 12 + 9
    assert len(copies) > 20
    for each in copies[::4]:
        Corpus.prepare(each, sources, byte_tokenizer(), 0.2)
        assert content(each) == content(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "context.bin is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), r"context.bin has \d+ bytes, \d+ were written"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "context.bin is damaged near byte 0"),
    ],
    ids=["missing", "truncated", "zeros"],
)
def test_damaged_ranges_are_an_error(tmp_path, damage, message):
    sources = Sources.find(write_lines(tmp_path / "chat.jsonl", *chat_lines(9)))
    intact = Corpus.prepare(tmp_path / "corpus", sources, byte_tokenizer(), 0.2)
    damage(tmp_path / "corpus" / "context.bin")
    with pytest.raises(ValueError, match=message):
        Corpus.open(tmp_path / "corpus")
    assert Corpus.prepare(tmp_path / "corpus", sources, byte_tokenizer(), 0.2) == intact


def test_a_corpus_is_prepared_again_for_another_template_and_without_conversations(tmp_path):
    sources = Sources.find(write_lines(tmp_path / "chat.jsonl", *chat_lines(9)))
    for template in (PLAIN_CHATML, MARKED):
        corpus = Corpus.prepare(tmp_path / "corpus", sources, tokenizer_with(template), 0.0)
        assert decoded(corpus, byte_tokenizer())[0][0].startswith("<user>" if template == MARKED else "<|bos|>")
    (tmp_path / "chat.jsonl").write_text('{"text": "plain"}')
    Corpus.prepare(tmp_path / "corpus", sources, byte_tokenizer(), 0.0)
    assert sorted(content(tmp_path / "corpus")) == ["corpus.json", "documents.bin", "tokens.bin"]


@pytest.mark.parametrize("length", [2, 3, 16, 64, 200])
def test_labels_are_the_tokens_of_answers(tmp_path, length):
    """Sequences of both parts, of every length; those without a label are left out."""
    sources = mixed(tmp_path)
    corpus = Corpus.prepare(tmp_path / "corpus", sources, byte_tokenizer(), 0.3)
    tokens = np.concatenate([corpus.train_tokens()[:], corpus.held_out_tokens()[:]]).astype(np.int64)
    expected = np.where(~np.isin(np.arange(len(tokens)), corpus.document_starts()), tokens, -100)
    for start, stop in corpus.context():
        expected[start:stop] = -100
    total = 0
    for dataset, begin, end in (
        (corpus.training_set(length), 0, corpus.num_train),
        (corpus.held_out_set(length), corpus.num_train, len(tokens)),
    ):
        count = (end - begin) // length
        ids, labels = (x[begin:][: count * length].reshape(count, length).copy() for x in (tokens, expected))
        labels[:, 0] = -100
        kept = (labels >= 0).any(axis=1)
        items = [dataset[i] for i in range(len(dataset))]
        assert np.array_equal(np.stack([item["input_ids"] for item in items]), ids[kept])
        assert np.array_equal(np.stack([item["labels"] for item in items]), labels[kept])
        assert dataset.num_left_out == count - kept.sum()
        total += num_labels(items)
    assert total > 100
    limited = corpus.held_out_set(length, max_tokens=400)
    assert all(torch.equal(limited[i]["labels"], corpus.held_out_set(length)[i]["labels"]) for i in range(len(limited)))


def test_frequencies_and_bytes_are_those_of_tokens_with_loss(tmp_path):
    lines = [{"messages": turns("aaaa", "b" * 10)}] * 20
    sources = Sources.find(write_lines(tmp_path / "chat.jsonl", *lines))
    corpus = Corpus.prepare(tmp_path / "corpus", sources, byte_tokenizer(), 0.0)
    counts = np.bincount([*(b"b" * 10 + b"<|im_end|>") * 20], minlength=259) + 1
    np.testing.assert_allclose(corpus.unigram().exp().numpy(), counts / counts.sum())
    lengths = token_bytes(byte_tokenizer())
    assert lengths is not None
    assert bits_per_nat(corpus, lengths) == pytest.approx(1 / np.log(2))  # each predicted token is a byte


def test_ranges_must_be_pairs_of_int64():
    tokens, starts = np.zeros(10, np.uint16), np.array([0])
    with pytest.raises(TypeError, match="context must be a NumPy array of int64, got list"):
        PackedDataset(tokens, 4, starts, context=[(1, 2)])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"context must be \[N, 2\], got shape \(2,\)"):
        PackedDataset(tokens, 4, starts, context=np.array([1, 2]))
