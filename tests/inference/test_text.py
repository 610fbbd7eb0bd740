"""Decoding of tokens one by one, and search for stop texts."""

from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lightning_attention.inference.text import Detokenizer, GeneratedText
from lightning_attention.training import byte_tokenizer

SPECIAL = ["<s>", "<|im_end|>"]
WORDS = ["▁", "▁a", "b", "▁▁", "é", ".", "n't", "�", "##c", "'", "s"]
BYTES = [f"<0x{byte:02X}>" for byte in (0x41, 0x20, 0xE2, 0x82, 0xAC, 0xFF, 0xC3, 0xA9)]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def word_tokenizer(decoder: object | None, **options) -> PreTrainedTokenizerFast:
    tokens = [*SPECIAL, *WORDS, *BYTES]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="b"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.add_tokens(["added"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", **options)


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "SentencePiece with bytes": word_tokenizer(decoders.Sequence(LLAMA)),
    "SentencePiece": word_tokenizer(decoders.Metaspace()),
    "WordPiece": word_tokenizer(decoders.WordPiece()),
    "cleaned up": word_tokenizer(decoders.WordPiece(cleanup=False), clean_up_tokenization_spaces=True),
    "word ends": word_tokenizer(decoders.BPEDecoder("b")),
    "no decoder": word_tokenizer(None),
}


def decoded_one_by_one(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(token) for token in tokens), detokenizer.rest()]


def ids_of(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> list[int]:
    return [cast(int, tokenizer.convert_tokens_to_ids(token)) for token in tokens]


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True))


def bytes_of(text: str) -> list[int]:
    return [*text.encode()]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_texts_joined_equal_the_decoded_tokens(tokenizer, data):
    # Bytes of characters and of incomplete characters, special tokens, and an id without a token.
    some = st.sampled_from([*range(0x78, 0x8A), 0xC3, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0xFF, 256, 257, 999])
    ids = some if tokenizer is TOKENIZERS["bytes"] else st.integers(0, len(tokenizer))
    tokens = data.draw(st.lists(ids, max_size=60))
    assert "".join(decoded_one_by_one(tokenizer, tokens)) == decoded(tokenizer, tokens)


def test_a_character_is_returned_with_its_last_byte():
    text = "aé€😀\n b"
    expected = [c for character in text for c in [""] * (len(character.encode()) - 1) + [character]]
    assert decoded_one_by_one(TOKENIZERS["bytes"], bytes_of(text)) == [*expected, ""]


def test_a_word_is_returned_at_once_with_its_space():
    tokenizer = TOKENIZERS["SentencePiece with bytes"]
    ids = ids_of(tokenizer, ["▁a", "<|im_end|>", "▁a", "b", "▁", *BYTES[2:5], "b"])
    assert decoded_one_by_one(tokenizer, ids) == ["a", "", " a", "b", " ", "", "", "", "€b", ""]


@pytest.mark.parametrize(
    "ids",
    [bytes_of("no line ends here " * 200), [0xFF] * 3000, bytes_of("€" * 1000), [256] * 3000],
    ids=["text", "no characters", "wide characters", "special tokens"],
)
def test_decoding_takes_linear_time(monkeypatch, ids):
    tokenizer, lengths = byte_tokenizer(), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: lengths.append(len(ids)) or decode(ids, **options))
    decoded_one_by_one(tokenizer, ids)
    assert max(lengths, default=0) <= 16
    assert sum(lengths) <= 20 * len(ids)


def test_a_long_run_of_byte_tokens_is_decoded_once(monkeypatch):
    tokenizer, lengths = word_tokenizer(decoders.Sequence(LLAMA)), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: lengths.append(len(ids)) or decode(ids, **options))
    run = ids_of(tokenizer, [*BYTES[2:5]] * 1000 + ["b"])
    assert "".join(decoded_one_by_one(tokenizer, run)) == "€" * 1000 + "b"
    assert sum(lengths) <= len(run) + 100


EOS = 257
# Tokenizer, tokens, stop texts, and the text before a stop text with the number of tokens that decide it.
STOPS = {
    "over several tokens": ("bytes", bytes_of("to be, or"), ["be,"], ("to ", 6)),
    "the first of two": ("bytes", bytes_of("to be, or"), ["or", "e"], ("to b", 5)),
    "at the start": ("bytes", bytes_of("abc"), ["ab"], ("", 2)),
    "none": ("bytes", bytes_of("abc"), ["d"], ("abc", None)),
    "no stop": ("bytes", bytes_of("abc"), [], ("abc", None)),
    "a wide character": ("bytes", bytes_of("a€b"), ["€"], ("a", 4)),
    "half a character": ("bytes", bytes_of("a€b"), ["\ufffd"], ("a€b", None)),
    "half a character at the end": ("bytes", [97, 0xE2, 0x82], ["\ufffd"], ("a\ufffd", None)),
    "bytes that are no character": ("bytes", [97, 0xFF, 98], ["\ufffd"], ("a", 3)),
    "a special token": ("bytes", [97, EOS, 98], ["<|eos|>"], ("a", 2)),
    "text and a special token": ("bytes", [97, 98, EOS, 98], ["b<|eos|>"], ("a", 3)),
    "a special token and text": ("bytes", [97, EOS, 256, 98, 99], ["<|eos|><|bos|>b"], ("a", 4)),
    "text around a special token": ("bytes", [97, EOS, 98, 99], ["ab"], ("", 3)),
    "part of a special token's name": ("bytes", [97, EOS, 98], ["<|"], ("ab", None)),
    "a special token as text": ("bytes", bytes_of("a<|eos|>b"), ["<|eos|>"], ("a", 8)),
    "half a character before a special token": ("bytes", [0xC3, EOS, 0xA9], ["<|eos|>"], ("\ufffd", 2)),
    "a space between words": ("SentencePiece", ["▁a", "▁a", "b", "▁a"], ["a ab"], ("", 3)),
    "a word and its space": ("SentencePiece", ["▁a", "▁a", "b", "▁a"], [" a"], ("a", 2)),
    "bytes before a special token": (
        "SentencePiece with bytes",
        ["▁a", "<0xC3>", "<0xA9>", "<|im_end|>", "b"],
        ["<|im_end|>"],
        ("aé", 4),
    ),
    "bytes and a special token": (
        "SentencePiece with bytes",
        ["▁a", "<0xC3>", "<0xA9>", "<|im_end|>", "b"],
        ["é<|im_end|>"],
        ("a", 4),
    ),
    "bytes at the end": ("SentencePiece with bytes", ["▁a", "<0xC3>", "<0xA9>"], ["é"], ("a", 3)),
}


@pytest.mark.parametrize(("name", "tokens", "stop", "expected"), STOPS.values(), ids=STOPS)
def test_text_ends_before_a_stop_text(name, tokens, stop, expected):
    tokenizer = TOKENIZERS[name]
    ids = tokens if isinstance(tokens[0], int) else ids_of(tokenizer, tokens)
    generated = GeneratedText(tokenizer, stop)
    stopped_at = next((i for i, token in enumerate(ids, start=1) if generated.add(token)), None)
    text, is_stopped = generated.finish()
    assert (text, generated.num_tokens if is_stopped else None) == expected
    assert stopped_at is None or stopped_at == expected[1]


@given(st.lists(st.sampled_from([*b"abc", 0xC3, 0xA9, 256]), max_size=40), st.lists(st.text("abcé", min_size=1)))
def test_a_stop_text_is_found_at_any_position(ids, stop):
    generated, tokenizer = GeneratedText(TOKENIZERS["bytes"], stop), TOKENIZERS["bytes"]
    for i, token in enumerate(ids, start=1):
        if generated.add(token):
            break
        assert not any(text in decoded(tokenizer, ids[:i]) for text in stop)
    text, is_stopped = generated.finish()
    assert not any(x in text for x in stop)
    expected = decoded(tokenizer, ids)
    assert expected.startswith(text) if is_stopped else text == expected


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_text_taken_piece_by_piece_is_the_text_up_to_the_stop_text(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    text = decoded(tokenizer, ids)
    starts = st.integers(0, max(0, len(text) - 1))
    stop = [
        text[at : at + length] for at, length in data.draw(st.lists(st.tuples(starts, st.integers(1, 4)), max_size=2))
    ]
    stop = [x for x in [*stop, "<s>a"] if x]
    generated, taken = GeneratedText(tokenizer, stop), []
    for token in ids:
        is_stopped = generated.add(token)
        taken.append(generated.take())
        if is_stopped:
            break
    expected, _ = generated.finish()
    assert expected.startswith("".join(taken))
    assert "".join(taken) + generated.take_rest() == expected


def test_only_what_may_begin_a_stop_text_is_held_back():
    generated = GeneratedText(byte_tokenizer(), ["<|im_end|>", "two"])
    taken = []
    for token in b"a <b> t to <|im_sta tw":
        generated.add(token)
        taken.append(generated.take())
    assert taken[:7] == ["a", " ", "", "<b", ">", " ", ""]
    assert ("".join(taken), generated.take_rest()) == ("a <b> t to <|im_sta ", "tw")
