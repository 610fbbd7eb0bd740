"""A tokenizer begins a text as training begins a document."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_attention.inference import encode
from lightning_attention.models.tokenization import begin_with_bos
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

# The post-processor, the special tokens of tokenizer_config.json (None: a tokenizer.json alone), and the token that
# documents begin with.
TOKENIZERS = {
    "BOS added": (LLAMA, {"bos_token": "<s>", "eos_token": "</s>"}, "<s>"),
    "BOS added by a file alone": (LLAMA, None, "<s>"),
    "BOS and EOS added": (BOTH, {"bos_token": "<s>", "eos_token": "</s>"}, "<s>"),
    "BOS added after byte-level offsets": (
        processors.Sequence([TRIMMED, LLAMA]),
        {"bos_token": "<s>", "eos_token": "</s>"},
        "<s>",
    ),
    "BOS named, not added": (TRIMMED, {"bos_token": "<s>", "eos_token": "</s>"}, "<s>"),
    "BOS named, another added": (BERT, {"bos_token": "<s>", "eos_token": "</s>"}, "<s>"),
    "BOS is EOS": (TRIMMED, {"bos_token": "</s>", "eos_token": "</s>"}, None),
    "no BOS, EOS added": (T5, {"eos_token": "</s>"}, None),
    "no BOS, CLS and SEP added": (BERT, {"cls_token": "[CLS]", "sep_token": "[SEP]"}, None),
    "CLS added by a file alone": (BERT, None, "[CLS]"),
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
    """As training reads it, without its EOS."""
    folder.mkdir(parents=True)
    (folder / "data.jsonl").write_text(json.dumps({"text": text}))
    corpus = Corpus.prepare(folder / "corpus", Sources.find([folder / "data.jsonl"]), tokenizer, 0.5)
    *tokens, eos = [*corpus.train_tokens().tolist(), *corpus.held_out_tokens().tolist()]
    assert eos == tokenizer.eos_token_id
    return tokens


@given(st.text())
def test_the_byte_tokenizer_gives_the_bytes_back(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, split_special_tokens=True).input_ids
    assert ids == [BOS, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, split_special_tokens=True, add_special_tokens=False).input_ids == list(text.encode())


def test_every_way_to_call_the_byte_tokenizer():
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
        assert again(*TEXTS[:2]).input_ids == [*begin_ids, *first, *second]
        assert encode(again, TEXTS[0]) == [*begin_ids, *first]
        assert again.decode(encode(again, TEXTS[0]), skip_special_tokens=True) == TEXTS[0]
    ids = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == ids


def test_byte_level_offsets_stay(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path / "given", TRIMMED, {"bos_token": "<s>", "eos_token": "</s>"}))
    begin_with_bos(tokenizer)
    offsets = tokenizer("some text", return_offsets_mapping=True)["offset_mapping"]
    assert [text for a, b in offsets if (text := "some text"[a:b])] == ["some", "text"]


def test_documents_are_neither_truncated_nor_padded(tmp_path):
    tokenizer = learned()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert document(tmp_path / "x", loaded, TEXTS[1]) == learned().encode(TEXTS[1]).ids


def test_a_prompt_that_cannot_be(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path / "given", None, None))
    with pytest.raises(ValueError, match="the prompt is empty, and the tokenizer has no token for the beginning"):
        encode(tokenizer, "")
    with pytest.raises(TypeError, match="prompt must be a string, got list"):
        encode(tokenizer, ["a"])
    unframed = PreTrainedTokenizerFast(tokenizer_object=learned(), bos_token="<s>")
    with pytest.raises(ValueError, match="the tokenizer does not begin a text with its BOS token <s>"):
        encode(unframed, "a")


def test_what_is_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer must be 'bytes' or a tokenizer.json, there is no file nowhere"):
        load_tokenizer("nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_no_text_is_too_long(tmp_path):
    """Neither for this library nor for tools that read the length, and padding to it is not tried."""
    byte_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (byte_tokenizer(), load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer("a" * 5000, truncation=True).input_ids) == 5001
        assert tokenizer.model_max_length == 10**21
