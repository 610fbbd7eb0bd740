"""Tokenization of documents and prompts: a prompt is read as the beginning of a training document."""

import json
import secrets
from collections.abc import Iterable
from typing import Any, cast
from weakref import WeakKeyDictionary

from tokenizers import Encoding, Tokenizer, processors
from transformers import PreTrainedTokenizerFast


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Smallest embedding size for the tokenizer: its largest token id plus one, since ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def bos_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids before the text of a training document: the BOS token if the tokenizer has one, else nothing.

    BOS and EOS may be the same token, as in GPT-2; documents are then `[eos] text eos`.
    """
    bos = tokenizer.bos_token_id
    return [bos] if isinstance(bos, int) else []


def begin_with_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    """Change a tokenizer so that `tokenizer(text)` gives `bos_ids` and the text, without an EOS token.

    A pair of texts is one document. Special tokens that the tokenizer added before (BOS, EOS, `[CLS]`, `[SEP]`) are
    replaced, and truncation and padding from its file are switched off. The change is saved with the tokenizer.
    """
    begin = [str(tokenizer.bos_token)] if bos_ids(tokenizer) else []
    template = processors.TemplateProcessing(
        single=[*(f"{token}:0" for token in begin), "$A:0"],
        pair=[*(f"{token}:0" for token in begin), "$A:0", "$B:1"],
        special_tokens=list(zip(begin, bos_ids(tokenizer), strict=True)),
    )
    backend = tokenizer.backend_tokenizer
    offsets = _byte_level(backend.post_processor)
    backend.post_processor = processors.Sequence([*offsets, template]) if offsets else template
    backend.no_truncation()
    backend.no_padding()
    for name in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):
        tokenizer.init_kwargs.pop(name, None)


def well_formed(text: str) -> str:
    """Replace lone surrogates, which JSON can contain and tokenizers cannot read, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], positions: bool = True) -> list[Encoding]:
    """Encode texts without truncation, padding or special tokens, even if a text contains their spelling.

    Training and prompts both use this function.

    Args:
        tokenizer: the tokenizer.
        texts: well-formed texts, encoded on all cores.
        positions: False leaves out the positions of tokens in their text, which takes half the time for long texts.

    Raises:
        ValueError: the tokenizer has no token for a text, not even an unknown token.
    """
    backend = _text_backend(tokenizer)
    encode = backend.encode_batch if positions else backend.encode_batch_fast
    try:
        return encode(list(texts), add_special_tokens=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"the tokenizer cannot encode a text: {error}") from error


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """Tokens whose spelling in a text is encoded as any other text."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return special | set(tokenizer.all_special_tokens)


def byte_characters() -> list[tuple[int, str]]:
    """Every byte with its printable character in byte-level tokenizers such as GPT-2's."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*((byte, chr(byte)) for byte in printable), *((byte, chr(256 + i)) for i, byte in enumerate(others))]


_TEXT_BACKENDS: WeakKeyDictionary[PreTrainedTokenizerFast, tuple[Any, Tokenizer]] = WeakKeyDictionary()


def _text_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Copy of a tokenizer for `encode_texts`, made again after tokens are added or become special."""
    special = special_tokens(tokenizer)
    key = len(tokenizer), special
    known = _TEXT_BACKENDS.get(tokenizer)
    if known is None or known[0] != key:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        backend = Tokenizer.from_str(json.dumps(_without_special_spellings(content, special)))
        backend.encode_special_tokens = True
        known = _TEXT_BACKENDS[tokenizer] = key, backend
    return known[1]


def _without_special_spellings(content: dict[str, Any], special: set[str]) -> dict[str, Any]:
    """Rename special tokens in a tokenizer.json so that no text contains them.

    `encode_special_tokens` prevents matches of added tokens, but the model would still match special tokens in its
    vocabulary. They keep their ids under random names. A special token of one character keeps its name, since it also
    encodes that character.
    """
    model, vocabulary = content["model"], content["model"]["vocab"]
    is_list = isinstance(vocabulary, list)  # Unigram: [token, score] in the order of ids
    tokens = {token for token, _ in vocabulary} if is_list else set(vocabulary)
    secret = secrets.token_hex(16)
    names = {token: f"{secret} {i}" for i, token in enumerate(special & tokens) if len(token) > 1}
    if is_list:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    else:
        model["vocab"] = {names.get(token, token): index for token, index in vocabulary.items()}
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [
            (left, right)
            for left, right in model["merges"]
            if names.keys().isdisjoint((left, right, left + right[prefix:]))
        ]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    for added in content["added_tokens"]:
        added["special"] |= added["content"] in special
        added["content"] = names.get(added["content"], added["content"])
    return content | {"truncation": None, "padding": None, "post_processor": None}


def _byte_level(processor: Any) -> list[processors.ByteLevel]:
    """Steps of a post-processor that correct offsets and add no token."""
    is_sequence = isinstance(processor, processors.Sequence)
    parts: list[Any] = list(cast(Any, processor)) if is_sequence else [processor]
    return [part for part in parts if isinstance(part, processors.ByteLevel)]
