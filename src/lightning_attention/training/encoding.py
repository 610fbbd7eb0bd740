"""Tokenization of documents in bounded memory."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from ..models.tokenization import bos_ids, encode_texts
from .documents import Sources

BATCH = 1 << 22  # characters tokenized at a time
WINDOW = 1 << 18  # characters of a window; most documents are shorter, and one window
OVERLAP = 1 << 12  # characters that consecutive windows of a document share


class Tokens(NamedTuple):
    """Consecutive tokens of a document: all of them, or for a long document some.

    Attributes:
        ids: token ids, with BOS at the start of a document and EOS at its end.
        ends: True if the document ends with these tokens.
    """

    ids: list[int]
    ends: bool


def tokenize(
    sources: Sources, tokenizer: PreTrainedTokenizerFast, progress: Callable[[int], None] = lambda characters: None
) -> Iterator[Tokens]:
    """Tokenize documents as `[bos] text eos`; documents without text are left out.

    A document of more than `WINDOW` characters is tokenized in overlapping windows, which are joined where they have
    the same tokens. The result equals tokenization at once: a tokenizer that puts a space before a text adds one space
    per document. Memory is bounded by a batch, except for a text whose windows never agree.

    Args:
        sources: the documents.
        tokenizer: with an EOS token.
        progress: called with the number of characters read so far.
    """
    begin, end = bos_ids(tokenizer), [cast(int, tokenizer.eos_token_id)]
    previous: _EncodedWindow | None = None  # the window before, within a document
    characters = 0
    for batch in _batches(sources):
        encodings = encode_texts(tokenizer, (window.text for window in batch))
        for window, encoding in zip(batch, encodings, strict=True):
            if window.starts and window.ends:
                yield Tokens([*begin, *encoding.ids, *end], True)
            elif previous is None:
                yield Tokens(begin, False)
                previous = _EncodedWindow(window.text, encoding)
            else:
                ids, previous = _join(tokenizer, previous, _EncodedWindow(window.text, encoding))
                yield Tokens(ids, False)
            if previous is not None and window.ends:
                yield Tokens(previous.ids[previous.start :] + end, True)
                previous = None
            characters += len(window.text) - (0 if window.starts else OVERLAP)
        progress(characters)


class _Window(NamedTuple):
    text: str
    starts: bool  # the document
    ends: bool


def _batches(sources: Sources) -> Iterator[list[_Window]]:
    batch, size = [], 0
    for document in sources.documents():
        for window in _windows(document):
            batch.append(window)
            size += len(window.text)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _windows(document: Iterator[str]) -> Iterator[_Window]:
    """Cut a document into windows of at most `WINDOW` characters that overlap by `OVERLAP`."""
    text, starts = "", True
    for part in document:
        text, at = text + part, 0
        while len(text) - at > WINDOW:
            yield _Window(text[at : at + WINDOW], starts, False)
            at, starts = at + WINDOW - OVERLAP, False
        text = text[at:]
    if text:
        yield _Window(text, starts, True)


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
