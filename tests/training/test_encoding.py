"""Tokenization in windows equals tokenization at once."""

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_attention.inference import encode
from lightning_attention.models.tokenization import begin_with_bos
from lightning_attention.training import byte_tokenizer, encoding
from lightning_attention.training.documents import Sources

RANDOM = random.Random(0)
WORDS = ["".join(RANDOM.choices("abcdefgé€", k=RANDOM.randint(1, 9))) for _ in range(300)]
PROSE = " ".join(RANDOM.choices([*WORDS, "\n", "  "], k=4000))
TEXTS = {
    "prose": PROSE,
    "no spaces": PROSE.replace(" ", "").replace("\n", ""),
    "one letter": "a" * 20_001,
    "spaces": " " * 20_001,
    "four bytes a character": "😀" * 6_001,
}
SPECIAL = ["<unk>", "<s>", "</s>"]


def llama() -> Tokenizer:
    """Tokenizer without a pre-tokenizer that puts a space before a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*SPECIAL, *bytes_], show_progress=False, max_token_length=9
    )
    tokenizer.train_from_iterator([*WORDS, "aaaaaaaaa  "], trainer)
    return tokenizer


def gpt2() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([PROSE[:5000], "aaaaaaaaa      "], trainer)
    return tokenizer


def unigram(split: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([PROSE[:5000]], trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    return tokenizer


def threes() -> Tokenizer:
    """Tokenizer whose tokens for a run of one letter depend on the start of the run."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("▁", -9.0), ("a", -9.0), ("aaa", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    return tokenizer


def wordpiece() -> Tokenizer:
    """Tokenizer to which a word of more than 100 characters is one unknown token."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([PROSE[:5000]], trainer)
    return tokenizer


TOKENIZERS = {
    "bytes": None,
    "Llama 2": llama,
    "GPT-2": gpt2,
    "Unigram": lambda: unigram(split=True),
    "Unigram, no words": lambda: unigram(split=False),
    "Unigram, threes": threes,
    "WordPiece": wordpiece,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_windows_have_the_tokens_of_the_document(tmp_path, monkeypatch, make, text):
    """Long documents between short ones are cut into windows."""
    monkeypatch.setattr(encoding, "WINDOW", 3000)
    monkeypatch.setattr(encoding, "OVERLAP", 256)
    monkeypatch.setattr(encoding, "BATCH", 9000)
    tokenizer = byte_tokenizer()
    if make is not None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), bos_token="<s>", eos_token="</s>")
    texts = ["abc", text, "cde", text[:5000], text[5000:7999]]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (tmp_path / "data.jsonl").write_text(lines)
    documents, open_document = [], []
    for ids, ends in encoding.tokenize(Sources.find(tmp_path), tokenizer):
        open_document += [int(token) for token in ids]
        if ends:
            documents, open_document = [*documents, open_document], []
    begin_with_bos(tokenizer)
    assert documents == [[*encode(tokenizer, text), tokenizer.eos_token_id] for text in texts]


def test_progress_counts_every_character_once(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "WINDOW", 3000)
    monkeypatch.setattr(encoding, "OVERLAP", 256)
    (tmp_path / "a.txt").write_text("é" * 10_000)
    read: list[int] = []
    for _ in encoding.tokenize(Sources.find(tmp_path), byte_tokenizer(), read.append):
        pass
    assert read == [10_000]
