"""Tokenization in windows equals tokenization at once."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_attention.inference import encode
from lightning_attention.models.tokenization import begin_with_bos, bos_ids, encode_texts, well_formed
from lightning_attention.training import byte_tokenizer, encoding
from lightning_attention.training.corpus import ByteTokens
from lightning_attention.training.documents import Place, Sources

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


# Changes of the byte tokenizer that leave its text as it is.
BYTES: dict[str, Callable[[PreTrainedTokenizerFast], object]] = {
    "as made": lambda tokenizer: None,
    "EOS is padding": lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "<|pad|>"}),
    "EOS is a letter": lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "a"}),
    "EOS is the last byte": lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "ÿ"}),
    "BOS is EOS": lambda tokenizer: tokenizer.add_special_tokens({"bos_token": "<|eos|>"}),
    "no BOS": lambda tokenizer: setattr(tokenizer, "bos_token", None),
    "more special tokens": lambda tokenizer: tokenizer.add_special_tokens({"additional_special_tokens": ["<mark>"]}),
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
    documents = tokenized(Sources.find(tmp_path).documents(), tokenizer)
    begin_with_bos(tokenizer)
    assert documents == [[*encode(tokenizer, text), tokenizer.eos_token_id] for text in texts]


def tokenized(documents: Iterable[Iterator[str]], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of each document."""
    tokens, bounds, size = [], [], 0
    special = encoding.special_bytes(tokenizer)
    placed = ((Place(0, number), document) for number, document in enumerate(documents, start=1))
    for stored, starts, files, place, context in encoding.tokenize(placed, tokenizer):
        assert not context
        assert files == [0] * len(starts)
        if place is not None:
            assert place.file == 0
        tokens += (ByteTokens(stored, special) if special else stored)[:].tolist()
        bounds += [size + start for start in starts]
        size += len(stored)
    return [tokens[start:stop] for start, stop in pairwise([*bounds, size])]


NASTY = [
    "a\x00b", "\r\n\r\n", " leading", "<|bos|><|eos|> <|pad|>", "naïve € 😀 \u200d\ufeff", "\U0010ffff\ud7ff",
    "é" * 700, "invalid \udcff\ud800", "\x7f\x80\xff", "Ġ Ċ ÿ þ", "",
]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 100, 1 << 18])
@pytest.mark.parametrize("change", BYTES.values(), ids=BYTES)
def test_bytes_are_the_ids_of_the_tokenizer_library(monkeypatch, change, batch):
    """Text is encoded without the library; special tokens are added ones, or bytes of the vocabulary."""
    monkeypatch.setattr(encoding, "BYTES_BATCH", batch)
    tokenizer = byte_tokenizer()
    change(tokenizer)
    assert encoding.stored_dtype(tokenizer) == np.uint8
    texts = [well_formed(text) for text in NASTY]
    expected = [
        [*bos_ids(tokenizer), *each.ids, tokenizer.eos_token_id] for each in encode_texts(tokenizer, texts[:-1])
    ]
    documents = (iter([text[:3], "", text[3:]]) for text in texts)
    assert tokenized(documents, tokenizer) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer.add_tokens(["<mark>"]),
        lambda tokenizer: setattr(tokenizer.backend_tokenizer, "normalizer", normalizers.NFC()),
        lambda tokenizer: setattr(tokenizer.backend_tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel()),
    ],
    ids=["a token of text", "a normalizer", "a space before text"],
)
def test_other_tokenizers_are_not_taken_for_bytes(change):
    tokenizer = byte_tokenizer()
    change(tokenizer)
    texts = [well_formed(text) for text in [*NASTY, "e\u0301", "<mark>"] if text]
    expected = [[*bos_ids(tokenizer), *each.ids, tokenizer.eos_token_id] for each in encode_texts(tokenizer, texts)]
    assert tokenized(map(iter, zip(texts)), tokenizer) == expected
