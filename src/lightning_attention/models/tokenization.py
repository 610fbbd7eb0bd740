"""Tokenizers that read a prompt as training reads the beginning of a document."""

import json
import secrets
from collections.abc import Iterable
from typing import Any, cast
from weakref import WeakKeyDictionary

from tokenizers import Encoding, Tokenizer, processors
from transformers import PreTrainedTokenizerFast


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Size of an embedding for the tokenizer: its largest token id, plus one. Ids may have holes."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def bos_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids before the text of a training document: the BOS token if the tokenizer has one, else nothing.

    It may be the EOS token too, as in GPT-2: documents are then `[eos] text eos`.
    """
    bos = tokenizer.bos_token_id
    return [bos] if isinstance(bos, int) else []


def begin_with_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    """Make `tokenizer(text)` the beginning of a training document: `bos_ids` and the text, without an EOS token.

    A pair of texts is one document. What the tokenizer added before (BOS, EOS, `[CLS]`, `[SEP]`) is replaced, and
    truncation and padding that its file asks for are switched off. The change is saved with the tokenizer.
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
    """The text with U+FFFD for lone surrogates, which JSON can spell and tokenizers cannot read."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[Encoding]:
    """Tokens of texts alone: whole, unpadded, and without any special token, whatever the texts spell.

    The one way from text to tokens, in training and for prompts.

    Raises:
        ValueError: the tokenizer has no token for a text, not even an unknown one.
    """
    backend = _text_backend(tokenizer)
    try:
        return backend.encode_batch(list(texts), add_special_tokens=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"the tokenizer cannot encode a text: {error}") from error


_TEXT_BACKENDS: WeakKeyDictionary[PreTrainedTokenizerFast, tuple[Any, Tokenizer]] = WeakKeyDictionary()


def _text_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy for `encode_texts`, made anew when tokens were added or became special."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    key = len(tokenizer), special
    known = _TEXT_BACKENDS.get(tokenizer)
    if known is None or known[0] != key:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        backend = Tokenizer.from_str(json.dumps(_without_special_spellings(content, special)))
        backend.encode_special_tokens = True
        known = _TEXT_BACKENDS[tokenizer] = key, backend
    return known[1]


def _without_special_spellings(content: dict[str, Any], special: set[str]) -> dict[str, Any]:
    """A tokenizer.json in which no text spells a special token.

    `encode_special_tokens` keeps added tokens from being found in a text, but the model would still find those that lie
    in its vocabulary, as it finds any other piece. They keep their ids under names that no text contains. A special
    token of one character stays: it is what the character's text is written with.
    """
    model, vocabulary = content["model"], content["model"]["vocab"]
    is_list = isinstance(vocabulary, list)  # Unigram: pieces with scores, by their ids
    pieces = {piece for piece, _ in vocabulary} if is_list else set(vocabulary)
    secret = secrets.token_hex(16)
    names = {token: f"{secret} {i}" for i, token in enumerate(special & pieces) if len(token) > 1}
    if is_list:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocabulary.items()}
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [
            (left, right)
            for left, right in model["merges"]
            if names.keys().isdisjoint((left, right, left + right[prefix:]))
        ]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    for token in content["added_tokens"]:
        token["special"] |= token["content"] in special
        token["content"] = names.get(token["content"], token["content"])
    return content | {"truncation": None, "padding": None, "post_processor": None}


def _byte_level(processor: Any) -> list[processors.ByteLevel]:
    """The parts of a post-processor that correct offsets and add no token."""
    is_sequence = isinstance(processor, processors.Sequence)
    parts: list[Any] = list(cast(Any, processor)) if is_sequence else [processor]
    return [part for part in parts if isinstance(part, processors.ByteLevel)]
