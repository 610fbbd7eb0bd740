"""Documents to tokens, in bounded memory."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from ..models.tokenization import bos_ids, encode_texts
from .documents import Sources

BATCH = 1 << 22  # characters tokenized at a time
WINDOW = 1 << 18  # characters of a document in one piece; most documents are shorter, and never cut
OVERLAP = 1 << 12  # characters that the windows of a longer document share


class Tokens(NamedTuple):
    """A document's tokens, or for a long document some of them.

    Attributes:
        ids: in order, with BOS at the beginning of a document and EOS at its end.
        ends: True if the document ends with them.
    """

    ids: list[int]
    ends: bool


def tokenize(
    sources: Sources, tokenizer: PreTrainedTokenizerFast, progress: Callable[[int], None] = lambda characters: None
) -> Iterator[Tokens]:
    """Tokens of all documents, `[bos] text eos`; documents without text are left out.

    A document is tokenized whole up to `WINDOW` characters. A longer one is tokenized in windows that overlap and are
    joined where both have the same tokens, so that the result is that of the whole document: a tokenizer that begins
    every text with a space does so once. Memory is bounded by a batch, except for a text whose windows never agree.

    Args:
        sources: the documents.
        tokenizer: with an EOS token.
        progress: called with the characters read so far.
    """
    begin, end = bos_ids(tokenizer), [cast(int, tokenizer.eos_token_id)]
    long: _Window | None = None  # the last window of a long document that goes on
    characters = 0
    for batch in _batches(sources):
        encodings = encode_texts(tokenizer, (piece.text for piece in batch))
        for piece, encoding in zip(batch, encodings, strict=True):
            if piece.starts and piece.ends:
                yield Tokens([*begin, *encoding.ids, *end], True)
            elif long is None:
                yield Tokens(begin, False)
                long = _Window(piece.text, encoding)
            else:
                ids, long = _join(tokenizer, long, _Window(piece.text, encoding))
                yield Tokens(ids, False)
            if long is not None and piece.ends:
                yield Tokens(long.ids[long.start :] + end, True)
                long = None
            characters += len(piece.text) - (0 if piece.starts else OVERLAP)
        progress(characters)


class _Piece(NamedTuple):
    text: str
    starts: bool
    ends: bool


def _batches(sources: Sources) -> Iterator[list[_Piece]]:
    batch, waiting = [], 0
    for document in sources.documents():
        for piece in _cut(document):
            batch.append(piece)
            waiting += len(piece.text)
            if waiting >= BATCH:
                yield batch
                batch, waiting = [], 0
    if batch:
        yield batch


def _cut(document: Iterator[str]) -> Iterator[_Piece]:
    """Pieces of at most `WINDOW` characters; each but the first begins with the last `OVERLAP` of the one before."""
    text, starts = "", True
    for part in document:
        text, at = text + part, 0
        while len(text) - at > WINDOW:
            yield _Piece(text[at : at + WINDOW], starts, False)
            at, starts = at + WINDOW - OVERLAP, False
        text = text[at:]
    if text:
        yield _Piece(text, starts, True)


class _Window:
    """Part of a long document and its tokens, of which those before `start` were yielded already."""

    def __init__(self, text: str, encoding: Encoding, start: int = 0):
        self.text, self.encoding, self.start = text, encoding, start
        self.ids = encoding.ids

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, text: str) -> "_Window":
        return cls(text, encode_texts(tokenizer, [text])[0])

    def position(self, token: int) -> int:
        """Where a token begins in the text; after the last token its end."""
        if token == len(self.ids):
            return len(self.text)
        return cast(tuple[int, int], self.encoding.token_to_chars(token))[0]

    def token(self, position: int) -> int:
        """Index of the first token that begins at a position or after it."""
        return bisect_left(range(len(self.ids)), position, key=self.position)

    def between(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Token ids and their positions from one position to another, counted from the first."""
        return [(self.ids[i], self.position(i) - start) for i in range(self.token(start), self.token(stop))]


def _join(tokenizer: PreTrainedTokenizerFast, first: _Window, second: _Window) -> tuple[list[int], _Window]:
    """Tokens of the first window up to where the second goes on, and the second from there."""
    following = second.text[OVERLAP:]
    begin = len(first.text) - OVERLAP
    if _agree(first, second, begin) is None:  # one long run of a character, say: begin where a token of the first does
        begin = first.position(first.token(begin))
        second = _Window.of(tokenizer, first.text[begin:] + following)
    if (middle := _agree(first, second, begin)) is None:  # then both are one window
        whole = _Window.of(tokenizer, first.text + following)
        whole.start = whole.token(first.position(first.start)) if first.ids else 0
        return [], whole
    second.start = second.token(middle - begin)
    return first.ids[first.start : first.token(middle)], second


def _agree(first: _Window, second: _Window, begin: int) -> int | None:
    """A position in the first window from which on both have the same tokens, for half of the text that they share.

    Args:
        first, second: windows of a document.
        begin: where the second begins in the first.
    """
    quarter = (len(first.text) - begin) // 4
    start, stop = begin + quarter, len(first.text) - quarter
    tokens = first.between(start, stop)
    return start if tokens and tokens == second.between(start - begin, stop - begin) else None
