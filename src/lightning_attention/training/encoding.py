"""Tokenization of documents in bounded memory."""

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, groupby, pairwise
from typing import Any, NamedTuple, cast

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from ..models.tokenization import bos_ids, encode_texts, special_tokens, vocab_size
from .conversations import ChatDocument, Conversations
from .documents import Place
from .formats import Document
from .tokenizer import has_byte_ids

BYTES_BATCH = 1 << 18  # bytes of text returned at a time by the byte tokenizer
BATCH = max(1 << 21, (os.cpu_count() or 1) << 18)  # characters tokenized at a time by other tokenizers, on all cores
WINDOW = 1 << 18  # characters of a window; most documents are shorter, and one window
OVERLAP = 1 << 12  # characters that consecutive windows of a document share
UNUSED_BYTES = 11  # the last values of a byte, which do not occur in UTF-8

Documents = Iterable[tuple[Place, Document]]
Texts = Iterable[tuple[Place, Iterator[str]]]


class Tokens(NamedTuple):
    """Consecutive tokens of the corpus.

    Attributes:
        stored: token ids, or bytes that stand for them, see `special_bytes`; with BOS and EOS of documents.
        starts: indices at which a document begins.
        files: index of the source file of each of these documents.
        place: place in the sources after these tokens; None within a document.
        context: bounds of ranges of tokens that have no loss: what is between the answers of conversations.
    """

    stored: np.ndarray
    starts: list[int]
    files: list[int]
    place: Place | None
    context: Sequence[tuple[int, int]] = ()


def special_bytes(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Token ids for which the last byte values stand in `Tokens.stored`, if all others stand for themselves.

    They are the ids of special tokens but padding, BOS and EOS last, if text is encoded as UTF-8, where 245 to 255 do
    not occur; empty otherwise.
    """
    if not has_byte_ids(tokenizer):
        return ()
    frame = (*bos_ids(tokenizer), cast(int, tokenizer.eos_token_id))
    vocabulary = tokenizer.get_vocab()
    special = {vocabulary[name] for name in special_tokens(tokenizer) if name in vocabulary}
    others = sorted(special - {*frame, cast(int | None, tokenizer.pad_token_id)})
    return (*others, *frame) if len(others) + len(frame) <= UNUSED_BYTES else ()


def stored_dtype(tokenizer: PreTrainedTokenizerFast) -> np.dtype:
    """Type of `Tokens.stored`: the smallest for the token ids, or uint8 with `special_bytes`."""
    largest = vocab_size(tokenizer) - 1
    return np.dtype(np.uint8) if special_bytes(tokenizer) else np.min_scalar_type(largest).newbyteorder("<")


def tokenize(documents: Documents, tokenizer: PreTrainedTokenizerFast) -> Iterator[Tokens]:
    """Tokenize texts as `[bos] text eos`, and conversations as their chat template renders them.

    Texts without content are left out.

    Args:
        documents: the place after each document, and the document: a text as an iterator of consecutive parts, or a
            conversation.
        tokenizer: with an EOS token.

    Raises:
        ValueError: a conversation cannot be rendered, see `Conversations`, or the tokenizer cannot encode a text.
    """
    encode = _encode_bytes if special_bytes(tokenizer) else _encode
    conversations: Conversations | None = None
    for is_chat, group in groupby(documents, key=lambda document: isinstance(document[1], ChatDocument)):
        if is_chat:
            conversations = conversations or Conversations(tokenizer)
            yield from _encode_conversations(cast(Any, group), conversations)
        else:
            yield from encode(cast(Any, group), tokenizer)


def _encode_conversations(
    documents: Iterable[tuple[Place, ChatDocument]], conversations: Conversations
) -> Iterator[Tokens]:
    to_stored = _Stored(conversations.tokenizer)
    for batch in _chat_batches(documents):
        lists, starts, files, size, context = [], [], [], 0, []
        encoded = conversations.encode([document for _, document in batch])
        for (place, document), parts in zip(batch, encoded, strict=True):
            starts.append(size)
            files.append(place.file)
            for ids, is_answer in parts:
                if not is_answer and ids:
                    context.append((size, size + len(ids)))
                lists.append(to_stored(ids, document.where))
                size += len(ids)
        yield Tokens(np.concatenate(lists), starts, files, batch[-1][0], context)


def _chat_batches(documents: Iterable[tuple[Place, ChatDocument]]) -> Iterator[list[tuple[Place, ChatDocument]]]:
    batch, size = [], 0
    for place, document in documents:
        batch.append((place, document))
        size += sum(map(len, document))
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Stored:
    """Conversion of token ids to `Tokens.stored`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer, self.dtype = tokenizer, stored_dtype(tokenizer)
        special = special_bytes(tokenizer)
        self.bytes = {token: 256 - len(special) + i for i, token in enumerate(special)}

    def __call__(self, ids: list[int], where: str) -> np.ndarray:
        if self.bytes:
            ids = [self.bytes.get(token, token) for token in ids]
            if ids and (largest := max(ids)) > 255:
                name = self.tokenizer.convert_ids_to_tokens(largest)
                raise ValueError(f"{where}: the chat template writes {name}, the padding token")
        return np.array(ids, self.dtype)


def _encode_bytes(documents: Texts, tokenizer: PreTrainedTokenizerFast) -> Iterator[Tokens]:
    begin = b"\xfe" * len(bos_ids(tokenizer))
    batch, starts, files, size = [], [], [], 0
    finished = None
    for place, document in documents:
        for index, part in enumerate(_framed(document, begin, b"\xff")):
            if size >= BYTES_BATCH or (index == 0 and batch and not starts):  # only the end of a document
                yield Tokens(_joined(batch), starts, files, finished if index == 0 else None)
                batch, starts, files, size = [], [], [], 0
            if index == 0:
                starts.append(size)
                files.append(place.file)
            batch.append(part)
            size += len(part)
        finished = place
    if batch:
        yield Tokens(_joined(batch), starts, files, finished)


def _joined(batch: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(batch), np.uint8)


def _framed(document: Iterator[str], begin: bytes, end: bytes) -> Iterator[bytes]:
    """Parts of a document in UTF-8, between `begin` and `end`; nothing for a document without text."""
    parts = filter(None, document)
    for first in parts:
        yield begin + first.encode()
        yield from (part.encode() for part in parts)
        yield end


def _encode(documents: Texts, tokenizer: PreTrainedTokenizerFast) -> Iterator[Tokens]:
    """Tokenize documents by the library of the tokenizer.

    A document of more than `WINDOW` characters is tokenized in overlapping windows, which are joined where they have
    the same tokens. The result equals tokenization at once: a tokenizer that puts a space before a text adds one space
    per document. Memory is bounded by a batch, except for a text whose windows never agree.
    """
    dtype = stored_dtype(tokenizer)
    begin, end = bos_ids(tokenizer), [cast(int, tokenizer.eos_token_id)]
    previous: _EncodedWindow | None = None  # the window before, within a document
    with ThreadPoolExecutor(1) as pool:
        batches = (pool.submit(_encode_batch, tokenizer, batch) for batch in _batches(documents))
        for batch, _ in pairwise(chain(batches, [Future()])):  # the next batch is encoded meanwhile
            lists, starts, files, size, place = [], [], [], 0, None
            for window, encoding in batch.result():
                place = window.place if window.ends else None
                if window.starts:
                    starts.append(size)
                    files.append(window.place.file)
                if window.is_document:
                    ids = [*begin, *encoding.ids, *end]
                elif previous is None:
                    ids, previous = begin, _EncodedWindow(window.text, encoding)
                else:
                    ids, previous = _join(tokenizer, previous, _EncodedWindow(window.text, encoding))
                if previous is not None and window.ends:
                    ids, previous = [*ids, *previous.ids[previous.start :], *end], None
                lists.append(np.array(ids, dtype))
                size += len(ids)
            yield Tokens(np.concatenate(lists), starts, files, place)


class _Window(NamedTuple):
    text: str
    starts: bool  # the document
    ends: bool
    place: Place  # after the document

    @property
    def is_document(self) -> bool:
        return self.starts and self.ends


def _encode_batch(tokenizer: PreTrainedTokenizerFast, batch: list[_Window]) -> list[tuple[_Window, Encoding]]:
    """Encode windows; only windows to be joined need the positions of tokens."""
    documents, windows = [x.text for x in batch if x.is_document], [x.text for x in batch if not x.is_document]
    encodings = iter(encode_texts(tokenizer, documents, positions=False)), iter(encode_texts(tokenizer, windows))
    return [(window, next(encodings[not window.is_document])) for window in batch]


def _batches(documents: Texts) -> Iterator[list[_Window]]:
    batch, size = [], 0
    for place, document in documents:
        for window in _windows(document, place):
            batch.append(window)
            size += len(window.text)
            if size >= BATCH or (window.ends and not batch[0].starts):  # only the end of a document
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _windows(document: Iterator[str], place: Place) -> Iterator[_Window]:
    """Cut a document into windows of at most `WINDOW` characters that overlap by `OVERLAP`."""
    text, starts = "", True
    for part in document:
        text, at = text + part, 0
        while len(text) - at > WINDOW:
            yield _Window(text[at : at + WINDOW], starts, False, place)
            at, starts = at + WINDOW - OVERLAP, False
        text = text[at:]
    if text:
        yield _Window(text, starts, True, place)


class _EncodedWindow:
    """Window of a long document and its tokens; tokens before `start` were yielded already."""

    def __init__(self, text: str, encoding: Encoding, start: int = 0):
        self.text, self.encoding, self.start = text, encoding, start
        self.ids = encoding.ids

    @classmethod
    def encode(cls, tokenizer: PreTrainedTokenizerFast, text: str) -> "_EncodedWindow":
        return cls(text, encode_texts(tokenizer, [text])[0])

    def position(self, token: int) -> int:
        """Position in the text of the first character of a token; for the end of the tokens, the end of the text."""
        if token == len(self.ids):
            return len(self.text)
        return cast(tuple[int, int], self.encoding.token_to_chars(token))[0]

    def token(self, position: int) -> int:
        """Index of the first token that begins at or after a position."""
        return bisect_left(range(len(self.ids)), position, key=self.position)

    def between(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Ids of the tokens that begin between two positions, with their positions relative to `start`."""
        return [(self.ids[i], self.position(i) - start) for i in range(self.token(start), self.token(stop))]


def _join(
    tokenizer: PreTrainedTokenizerFast, first: _EncodedWindow, second: _EncodedWindow
) -> tuple[list[int], _EncodedWindow]:
    """Return the tokens of the first window up to a position in the overlap, and the second window from there on."""
    following = second.text[OVERLAP:]
    begin = len(first.text) - OVERLAP
    if _agreement(first, second, begin) is None:  # such as a long run of one character: align the windows at a token
        begin = first.position(first.token(begin))
        second = _EncodedWindow.encode(tokenizer, first.text[begin:] + following)
    if (position := _agreement(first, second, begin)) is None:  # encode both as one window
        joined = _EncodedWindow.encode(tokenizer, first.text + following)
        joined.start = joined.token(first.position(first.start)) if first.ids else 0
        return [], joined
    second.start = second.token(position - begin)
    return first.ids[first.start : first.token(position)], second


def _agreement(first: _EncodedWindow, second: _EncodedWindow, begin: int) -> int | None:
    """Position in the first window from which both have the same tokens for half of the overlap, if there is one.

    Args:
        first, second: consecutive windows of a document.
        begin: position in the first window where the second begins.
    """
    quarter = (len(first.text) - begin) // 4
    start, stop = begin + quarter, len(first.text) - quarter
    tokens = first.between(start, stop)
    return start if tokens and tokens == second.between(start - begin, stop - begin) else None
