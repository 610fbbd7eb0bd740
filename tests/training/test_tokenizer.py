"""Tokenizers begin a text as training begins a document."""

import json
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_attention.inference import encode
from lightning_attention.models.tokenization import begin_with_bos, vocab_size
from lightning_attention.training import Corpus, byte_tokenizer, load_tokenizer
from lightning_attention.training.documents import Sources

BOS, EOS, PAD = 256, 257, 258
TEXTS = ["some text", "some more text to learn from", " text", "some <s> </s> <|bos|> <|eos|> text"]
TRIMMED = processors.ByteLevel(trim_offsets=True)


def template(single: str) -> processors.TemplateProcessing:
    tokens = [("<s>", 0), ("</s>", 1), ("[CLS]", 2), ("[SEP]", 3)]
    return processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=tokens)


def learned(post_processor: object | None = None) -> Tokenizer:
    """A byte-level tokenizer.json with special tokens 0 to 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=["<s>", "</s>", "[CLS]", "[SEP]"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    return tokenizer


LLAMA = template("<s> $A")
T5 = template("$A </s>")
BERT = template("[CLS] $A [SEP]")
BOTH = template("<s> $A </s>")

# Post-processor, special tokens of tokenizer_config.json (None for a tokenizer.json alone), first token of documents.
TOKENIZERS = {
    "BOS added": (LLAMA, {"bos_token": "<s>", "eos_token": "</s>"}, "<s>"),
    "BOS added, tokenizer.json alone": (LLAMA, None, "<s>"),
    "BOS and EOS added": (BOTH, {"bos_token": "<s>", "eos_token": "</s>"}, "<s>"),
    "BOS added after byte-level offsets": (
        processors.Sequence([TRIMMED, LLAMA]),
        {"bos_token": "<s>", "eos_token": "</s>"},
        "<s>",
    ),
    "BOS named, not added": (TRIMMED, {"bos_token": "<s>", "eos_token": "</s>"}, "<s>"),
    "BOS named, another added": (BERT, {"bos_token": "<s>", "eos_token": "</s>"}, "<s>"),
    "BOS is EOS": (TRIMMED, {"bos_token": "</s>", "eos_token": "</s>"}, "</s>"),
    "no BOS, EOS added": (T5, {"eos_token": "</s>"}, None),
    "no BOS, CLS and SEP added": (BERT, {"cls_token": "[CLS]", "sep_token": "[SEP]"}, None),
    "CLS added, tokenizer.json alone": (BERT, None, "[CLS]"),
    "nothing": (None, None, None),
}


def saved(folder: Path, post_processor: object | None, special_tokens: dict[str, str] | None) -> Path:
    folder.mkdir()
    tokenizer = learned(post_processor)
    tokenizer.save(str(folder / "tokenizer.json"))
    if special_tokens is None:
        return folder / "tokenizer.json"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)
    wrapped.save_pretrained(folder)
    return folder


def document(folder: Path, tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Tokens of a document in a corpus, without EOS."""
    folder.mkdir(parents=True)
    (folder / "data.jsonl").write_text(json.dumps({"text": text}))
    corpus = Corpus.prepare(folder / "corpus", Sources.find([folder / "data.jsonl"]), tokenizer, 0.5)
    *tokens, eos = [*corpus.train_tokens()[:].tolist(), *corpus.held_out_tokens()[:].tolist()]
    assert eos == tokenizer.eos_token_id
    return tokens


@given(st.text())
def test_the_byte_tokenizer_decodes_to_the_text(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, split_special_tokens=True).input_ids
    assert ids == [BOS, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, split_special_tokens=True, add_special_tokens=False).input_ids == list(text.encode())


def test_the_byte_tokenizer_begins_texts_with_bos_pads_and_truncates():
    tokenizer = byte_tokenizer()
    assert tokenizer("ab").input_ids == tokenizer.encode("ab") == encode(tokenizer, "ab") == [BOS, *b"ab"]
    assert tokenizer("ab", add_special_tokens=False).input_ids == [*b"ab"]
    assert tokenizer("").input_ids == encode(tokenizer, "") == [BOS]
    assert tokenizer(["ab", "c"]).input_ids == [[BOS, *b"ab"], [BOS, *b"c"]]
    assert tokenizer("ab", "cd").input_ids == [BOS, *b"abcd"]
    padded = tokenizer(["ab", "c"], padding=True, return_tensors="pt")
    assert padded["input_ids"].tolist() == [[BOS, *b"ab"], [PAD, BOS, *b"c"]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert set(padded) == {"input_ids", "attention_mask"}
    assert tokenizer("abcd", truncation=True, max_length=3).input_ids == [BOS, *b"ab"]
    # The name of a special token is that token, as in every Hugging Face tokenizer.
    assert tokenizer("a<|eos|>").input_ids == [BOS, *b"a", EOS]


@pytest.mark.parametrize(("post_processor", "special_tokens", "begin"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_begins_a_text_as_training_begins_a_document(tmp_path, post_processor, special_tokens, begin):
    plain = learned()
    tokenizer = load_tokenizer(saved(tmp_path / "given", post_processor, special_tokens))
    tokenizer.save_pretrained(tmp_path / "saved")
    begin_ids = [] if begin is None else [plain.token_to_id(begin)]
    for again in (tokenizer, load_tokenizer(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")):
        for index, text in enumerate(TEXTS):
            expected = document(tmp_path / f"{id(again)}-{index}", tokenizer, text)
            assert expected[: len(begin_ids)] == begin_ids
            assert again(text, split_special_tokens=True).input_ids == expected
            assert (
                again(text, split_special_tokens=True, add_special_tokens=False).input_ids
                == (expected[len(begin_ids) :])
            )
        first, second = (plain.encode(text).ids for text in TEXTS[:2])
        assert again(TEXTS[:2]).input_ids == [[*begin_ids, *first], [*begin_ids, *second]]
        assert again(TEXTS[0], TEXTS[1]).input_ids == [*begin_ids, *first, *second]
        assert encode(again, TEXTS[0]) == [*begin_ids, *first]
        assert again.decode(encode(again, TEXTS[0]), skip_special_tokens=True) == TEXTS[0]
    ids = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == ids


def test_byte_level_offsets_are_kept(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path / "given", TRIMMED, {"bos_token": "<s>", "eos_token": "</s>"}))
    begin_with_bos(tokenizer)
    offsets = tokenizer("some text", return_offsets_mapping=True)["offset_mapping"]
    assert [text for a, b in offsets if (text := "some text"[a:b])] == ["some", "text"]


@pytest.mark.parametrize("special_tokens", [None, {"bos_token": "<s>", "eos_token": "</s>"}], ids=["alone", "folder"])
def test_documents_and_prompts_are_not_truncated_or_padded(tmp_path, special_tokens):
    folder = saved(tmp_path / "given", LLAMA, special_tokens)
    file = folder if special_tokens is None else folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64, pad_id=3, pad_token="[SEP]")
    tokenizer.save(str(file))
    loaded = load_tokenizer(folder)
    loaded.save_pretrained(tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert (content["truncation"], content["padding"]) == (None, None)
    expected = [0, *learned().encode(TEXTS[1]).ids]
    for again in (loaded, load_tokenizer(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert document(tmp_path / f"{id(again)}", again, TEXTS[1]) == expected
        assert encode(again, TEXTS[1]) == again(TEXTS[1]).input_ids == again.backend_tokenizer.encode(TEXTS[1]).ids
        assert encode(again, TEXTS[1]) == expected


# Vocabularies whose special tokens are ordinary pieces.
PIECES = ["<unk>", "<s>", "</s>", "<pad>", *"▁abcst</>p", "ab", "▁ab", "#", "##", "##a", "##b", "<s>ab"]


def unigram(byte_fallback: bool = False) -> Tokenizer:
    pieces = [*PIECES, *(f"<0x{byte:02X}>" for byte in range(256) if byte_fallback)]
    scores = [(piece, 0.0 if i < 4 else -float(i)) for i, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def words(model: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


VOCABULARY = {piece: i for i, piece in enumerate(PIECES)}
MERGED = VOCABULARY | {"</": 50, "</s": 51, "<s": 52}  # from characters to special tokens
MERGES = [("<", "/"), ("</", "s"), ("</s", ">"), ("<", "s"), ("<s", ">"), ("a", "b"), ("<s>", "ab")]

SPECIAL_PIECES: dict[str, Callable[[], Tokenizer]] = {
    "Unigram": unigram,
    "Unigram, byte fallback": lambda: unigram(byte_fallback=True),
    "WordLevel": lambda: words(models.WordLevel(VOCABULARY, unk_token="<unk>")),
    "WordPiece": lambda: words(models.WordPiece(VOCABULARY, unk_token="<unk>")),
    "BPE": lambda: words(models.BPE(MERGED, MERGES, unk_token="<unk>")),
    "BPE, words that are pieces": lambda: words(models.BPE(MERGED, MERGES, unk_token="<unk>", ignore_merges=True)),
}


# All texts of up to three of these parts.
PARTS = ["</s>", "<s>", "<pad>", "ab", "a", "b", " ", "<", "s"]
SPELLINGS = ["ab" + "".join(parts) for count in range(4) for parts in product(PARTS, repeat=count)]


@pytest.mark.parametrize("is_special", [True, False], ids=["special tokens", "pieces only"])
@pytest.mark.parametrize("make", SPECIAL_PIECES.values(), ids=SPECIAL_PIECES)
def test_text_never_encodes_to_a_special_token(tmp_path, make, is_special):
    """Documents and prompts have the same tokens; text without "<" has the tokens of the plain tokenizer."""
    given_tokenizer = make()
    if is_special:
        given_tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "<unk>"])
    ids = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=given_tokenizer, **ids).save_pretrained(tmp_path / "given")
    tokenizer = load_tokenizer(tmp_path / "given")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in SPELLINGS))
    corpus = Corpus.prepare(tmp_path / "corpus", Sources.find(tmp_path / "data.jsonl"), tokenizer, 0.5)
    tokens = [*corpus.train_tokens()[:].tolist(), *corpus.held_out_tokens()[:].tolist()]
    bounds = [*corpus.document_starts().tolist(), len(tokens)]
    plain = make()
    for text, (start, stop) in zip(SPELLINGS, pairwise(bounds), strict=True):
        bos, *ids, eos = tokens[start:stop]
        assert encode(tokenizer, text) == [bos, *ids]
        assert (bos, eos) == (1, 2)
        assert not {1, 2, 3} & {*ids}
        if "<" not in text:
            assert ids == plain.encode(text).ids


def test_text_is_encoded_with_the_current_special_tokens():
    tokenizer = byte_tokenizer()
    assert encode(tokenizer, "<mark>") == [BOS, *b"<mark>"]
    tokenizer.add_tokens(["<mark>"])
    assert encode(tokenizer, "<mark>") == [BOS, 259]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<mark>"]})
    assert encode(tokenizer, "<mark>") == [BOS, *b"<mark>"]
    assert encode(tokenizer, "a\ud800b") == [BOS, *"a\ufffdb".encode()]


def test_a_special_token_of_one_character_encodes_that_character(tmp_path):
    tokenizer = Tokenizer(models.BPE({"a": 0, "!": 1, "\n": 2}, []))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path, eos_token="\n")
    assert loaded.eos_token_id == 2
    assert encode(loaded, "a!\na") == document(tmp_path / "corpus", loaded, "a!\na") == [0, 1, 2, 0]


def test_text_without_tokens_is_an_error(tmp_path):
    words(models.WordLevel({"a": 0, "</s>": 1}, unk_token="none")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert encode(tokenizer, "a a") == [0, 0]
    with pytest.raises(ValueError, match="the tokenizer cannot encode a text"):
        encode(tokenizer, "a b")
    with pytest.raises(ValueError, match="the tokenizer cannot encode a text"):
        document(tmp_path / "x", tokenizer, "a b")


def bpe(*vocabulary: str) -> Tokenizer:
    return Tokenizer(models.BPE({token: i for i, token in enumerate(["a", "b", *vocabulary])}, []))


# Vocabulary, requested EOS token, resulting EOS and padding tokens, and reports.
CHOICES: dict[str, tuple[list[str], str | None, str, str, list[str]]] = {
    "GPT-2": (["<|endoftext|>"], None, "<|endoftext|>", "<|pad|>", ["EOS found", "padding added"]),
    "Llama 2": (["</s>", "<pad>"], None, "</s>", "<pad>", ["EOS found", "padding found"]),
    "Qwen": (["<|im_end|>", "<|endoftext|>"], None, "<|endoftext|>", "<|pad|>", ["EOS found", "padding added"]),
    "Qwen, chat": (["<|im_end|>", "<|endoftext|>"], "<|im_end|>", "<|im_end|>", "<|pad|>", ["padding added"]),
    "nothing": ([], None, "<|eos|>", "<|pad|>", ["EOS added", "padding added"]),
    "any token": (["<end>"], "<end>", "<end>", "<|pad|>", ["padding added"]),
}


@pytest.mark.parametrize(("vocabulary", "asked", "eos", "pad", "reported"), CHOICES.values(), ids=CHOICES)
def test_eos_and_padding_tokens_are_found_or_added(tmp_path, vocabulary, asked, eos, pad, reported):
    bpe(*vocabulary).save(str(tmp_path / "tokenizer.json"))
    lines: list[str] = []
    tokenizer = load_tokenizer(tmp_path, asked, lines.append)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (eos, pad)
    for line, (kind, what) in zip(lines, map(str.split, reported), strict=True):
        token = eos if kind == "EOS" else pad
        how = "found in" if what == "found" else "added to"
        assert line == f"the tokenizer names no {kind} token: {token} {how} the vocabulary"
    assert len(tokenizer) == 2 + len(vocabulary) + sum("added" in line for line in lines)
    assert document(tmp_path / "x", tokenizer, "ab") == [0, 1]
    tokenizer.save_pretrained(tmp_path / "saved")
    lines.clear()
    again = load_tokenizer(tmp_path / "saved", report=lines.append)
    assert (again.eos_token_id, again.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert lines == []


def test_added_tokens_of_a_configuration_are_reported(tmp_path):
    saved(tmp_path / "given", None, {"bos_token": "<begin>", "eos_token": "</s>", "pad_token": "</s>"})
    learned().save(str(tmp_path / "given" / "tokenizer.json"))
    lines: list[str] = []
    load_tokenizer(tmp_path / "given", report=lines.append)
    assert lines == ["tokens added to the vocabulary of the tokenizer: <begin>"]


def test_an_eos_token_must_be_in_the_vocabulary(tmp_path):
    tokenizer = bpe("<|im_end|>", "piece", "<|endoftext|>")
    tokenizer.add_special_tokens(["<mark>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    message = r"eos_token '<eot>' is not in the vocabulary .*: <mark>, <\|endoftext\|>, <\|im_end\|>$"
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path, "<eot>")
    with pytest.raises(ValueError, match=r"candidates: <\|bos\|>, <\|eos\|>, <\|pad\|>$"):
        load_tokenizer("bytes", "</s>")
    assert load_tokenizer("bytes", "<|pad|>").eos_token_id == PAD


def test_vocab_size_is_the_largest_token_id_plus_one(tmp_path):
    tokenizer = words(models.WordLevel({"a": 3, "b": 70_000, "</s>": 9, "[PAD]": 12}, unk_token="b"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert (len(loaded), vocab_size(loaded)) == (4, 70_001)
    assert document(tmp_path / "x", loaded, "a b a") == encode(loaded, "a b a") == [3, 70_000, 3]
    corpus = Corpus.open(tmp_path / "x" / "corpus")
    assert corpus.vocab_size == 70_001
    assert corpus.unigram().shape == (70_001,)


def test_invalid_prompts_are_refused(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path / "given", None, None))
    with pytest.raises(ValueError, match="the prompt is empty, and the tokenizer has no BOS token"):
        encode(tokenizer, "")
    with pytest.raises(TypeError, match="prompt must be a string, got list"):
        encode(tokenizer, ["a"])  # pyright: ignore[reportArgumentType]
    unframed = PreTrainedTokenizerFast(tokenizer_object=learned(), bos_token="<s>")
    with pytest.raises(ValueError, match="the tokenizer does not begin a text with its BOS token <s>"):
        encode(unframed, "a")


def test_invalid_tokenizer_files_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"tokenizer must be 'bytes', .*: there is no file nowhere/here/or/there, and no"
    ):
        load_tokenizer("nowhere/here/or/there")
    with pytest.raises(ValueError, match=r"there is no file nowhere$"):
        load_tokenizer(Path("nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there is no file .*empty/tokenizer.json$"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_model_max_length_is_unlimited(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (byte_tokenizer(), load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer("a" * 5000, truncation=True).input_ids) == 5001
        assert tokenizer.model_max_length == 10**21


CHAT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [("bytes", "<|bos|>" + CHAT), ("lone file", "<s>" + CHAT), ("own template", "[hi]"), ("no template", None)],
)
def test_only_tokenizers_that_are_made_here_get_a_chat_template(tmp_path, kind, prompt):
    if kind == "bytes":
        tokenizer = load_tokenizer("bytes")
    elif kind == "lone file":
        learned(LLAMA).save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    else:
        own = "[{{ messages[0].content }}]" if kind == "own template" else None
        PreTrainedTokenizerFast(tokenizer_object=learned(), eos_token="</s>", chat_template=own).save_pretrained(
            tmp_path
        )
        tokenizer = load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    if prompt is None:
        assert saved.chat_template is None
    else:
        conversation = [{"role": "user", "content": "hi"}]
        assert saved.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True) == prompt
