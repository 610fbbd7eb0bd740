"""Text of tokens as they are generated, in time linear in their number."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

# How a SentencePiece vocabulary spells a byte. Whether bytes in a row are text is known where the row ends.
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Tokens that are decoded again with the next one: more than the 4 bytes of a character, so that what comes before them
# does not matter. At LONGEST tokens all but the last SHORTEST are dropped.
SHORTEST, LONGEST = 8, 16
# What `clean_up_tokenization_spaces` may still remove: a space before as many characters.
CLEANED = 4


class Detokenizer:
    """Decodes tokens one by one; the pieces together are `tokenizer.decode(tokens, skip_special_tokens=True)`.

    A piece holds whole characters: bytes wait for the rest of theirs. Only the last few tokens are decoded again.

        detokenizer = Detokenizer(tokenizer)
        text = "".join(detokenizer.add(token) for token in tokens) + detokenizer.rest()

    Args:
        tokenizer: a checkpoint's.

    Attributes:
        special: names of the special tokens, which are not part of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        self.special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._tokens: list[int] = []  # the last ones, without special tokens
        self._returned = 0  # characters of their text

    def add(self, token: int) -> str:
        """Text that is complete with this token; may be empty."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if token in self.special or name is None:
            return ""
        self._tokens.append(token)
        if BYTE.fullmatch(str(name)):
            return ""
        text = self._decode()
        start, end = self._returned, max(self._returned, self._complete(text))
        self._returned = end
        if len(self._tokens) >= LONGEST:
            self._tokens = self._tokens[-SHORTEST:]
            self._returned = len(self._decode()) - (len(text) - end)
        return text[start:end]

    def rest(self) -> str:
        """Text of the tokens so far that `add` has held back, as it is if no token follows."""
        return self._decode()[self._returned :]

    def _complete(self, text: str) -> int:
        """How many characters no further token changes."""
        end = len(text.removesuffix("\ufffd"))  # maybe a character's first bytes
        if self._tokenizer.clean_up_tokenization_spaces:
            space = text.rfind(" ", max(0, end - CLEANED), end)
            return space if space >= 0 else end
        return end

    def _decode(self) -> str:
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True) if self._tokens else ""
        assert isinstance(text, str)
        return text


class GeneratedText:
    """Text of generated tokens up to the first stop text.

    A stop text may be spread over tokens, and may hold special tokens, which are not part of the text otherwise.

    Args:
        tokenizer: a checkpoint's.
        stop: texts that end it, none of them empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()):
        self._detokenizer = Detokenizer(tokenizer)
        names = self._detokenizer.special.values()
        with_names = [text for text in stop if any(name in text for name in names)]
        self._search = _Search([text for text in stop if text not in with_names])
        self._search_with_names = _Search(with_names)
        self._pieces: list[str] = []
        self._length = 0
        self._end: int | None = None  # where the stop text begins
        self.num_tokens = 0

    def add(self, token: int) -> bool:
        """Take the next token. True once a stop text is there."""
        self.num_tokens += 1
        piece = self._detokenizer.add(token)
        if piece:
            self._append(piece, piece)
        if self._search_with_names.texts and token in self._detokenizer.special:
            held = self._detokenizer.rest()
            self._found(self._search_with_names.add(held, self._length))
            name, end = self._detokenizer.special[token], self._length + len(held)
            self._found(self._search_with_names.add(name, end, is_shown=False))
        return self._end is not None

    def finish(self) -> tuple[str, bool]:
        """The text, and whether a stop text ended it, after the last token."""
        if rest := self._detokenizer.rest():
            # Half a character is no character: nobody asked to stop at it.
            self._append(rest, rest.rstrip("\ufffd"))
        text = "".join(self._pieces)
        return text[: self._end], self._end is not None

    def _append(self, piece: str, searched: str) -> None:
        for search in (self._search, self._search_with_names):
            self._found(search.add(searched, self._length))
        self._pieces.append(piece)
        self._length += len(piece)

    def _found(self, start: int | None) -> None:
        if start is not None:
            self._end = start if self._end is None else min(self._end, start)


class _Search:
    """Finds the first of some texts in pieces of a longer one, of which only what may begin a text is kept."""

    def __init__(self, texts: Sequence[str]):
        self.texts = texts
        self._kept = max(map(len, texts), default=1) - 1
        self._tail = ""
        self._starts: list[int] = []  # where the characters of the tail are in the generated text
        self._taken = 0  # characters of the generated text so far

    def add(self, piece: str, start: int, *, is_shown: bool = True) -> int | None:
        """Where the first text begins that this piece completes; the piece is in the generated text from `start` on,
        or if it is not shown there, before the character `start`.
        """
        if not self.texts:
            return None
        if is_shown:
            known = max(0, self._taken - start)
            piece, start = piece[known:], start + known
            self._taken = start + len(piece)
        self._tail += piece
        self._starts += range(start, start + len(piece)) if is_shown else [start] * len(piece)
        found = [at for text in self.texts if (at := self._tail.find(text)) >= 0]
        result = self._starts[min(found)] if found else None
        drop = max(0, len(self._tail) - self._kept)
        self._tail, self._starts = self._tail[drop:], self._starts[drop:]
        return result
