"""Decoding of tokens as they are generated, in time linear in their number, and search for stop texts."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

# A byte in a SentencePiece vocabulary; consecutive bytes are decoded together, when the next token is another.
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Last tokens, which are decoded again with the next one: at MAX_TOKENS all but the last MIN_TOKENS are dropped.
# MIN_TOKENS exceeds the 4 bytes of a character, so that earlier tokens do not matter.
MIN_TOKENS, MAX_TOKENS = 8, 16
CLEANED = 4  # characters after a space that `clean_up_tokenization_spaces` may still remove


class Detokenizer:
    """Decode tokens one by one, to the text of `tokenizer.decode(tokens, skip_special_tokens=True)`.

    Characters are returned once they are complete. Only the last few tokens are decoded again.

    Args:
        tokenizer: tokenizer of a checkpoint.

    Attributes:
        special: names of the special tokens by id; they are not part of the text.

    Example:
        >>> from lightning_attention.inference.text import Detokenizer
        >>> from lightning_attention.training import byte_tokenizer
        >>> detokenizer = Detokenizer(byte_tokenizer())
        >>> [*map(detokenizer.add, "né".encode()), detokenizer.rest()]
        ['n', '', 'é', '']
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        self.special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._tokens: list[int] = []  # the last tokens, without special ones
        self._returned = 0  # characters of their text that were returned

    def add(self, token: int) -> str:
        """Decode a token; return the text that it completes, which may be empty."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if token in self.special or name is None:
            return ""
        self._tokens.append(token)
        if BYTE.fullmatch(str(name)):
            return ""
        text = self._decode()
        start, end = self._returned, max(self._returned, self._num_final(text))
        self._returned = end
        if len(self._tokens) >= MAX_TOKENS:
            self._tokens = self._tokens[-MIN_TOKENS:]
            self._returned = len(self._decode()) - (len(text) - end)
        return text[start:end]

    def rest(self) -> str:
        """Text that `add` has held back, for the end of the tokens."""
        return self._decode()[self._returned :]

    def _num_final(self, text: str) -> int:
        """Number of characters that further tokens do not change."""
        end = len(text.removesuffix("\ufffd"))  # perhaps the first bytes of a character
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

    A stop text may span tokens, and may contain names of special tokens, which are otherwise not part of the text.

    Args:
        tokenizer: tokenizer of a checkpoint.
        stop: stop texts, none of them empty.

    Attributes:
        num_tokens: number of tokens added.
        length: number of characters, without an incomplete one at the end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()):
        self._detokenizer = Detokenizer(tokenizer)
        names = self._detokenizer.special.values()
        with_names = [text for text in stop if any(name in text for name in names)]
        self._search = _Search([text for text in stop if text not in with_names])
        self._search_with_names = _Search(with_names)
        self._texts: list[str] = []
        self.length = 0
        self._taken = 0  # characters that `take` has returned
        self._untaken = ""
        self._end: int | None = None  # position of the first stop text
        self.num_tokens = 0

    def add(self, token: int) -> bool:
        """Add a token; return True once the text contains a stop text."""
        self.num_tokens += 1
        if text := self._detokenizer.add(token):
            self._append(text, text)
        if self._search_with_names.texts and token in self._detokenizer.special:
            rest = self._detokenizer.rest()
            self._found(self._search_with_names.add(rest, self.length))
            name, end = self._detokenizer.special[token], self.length + len(rest)
            self._found(self._search_with_names.add(name, end, is_special=True))
        return self._end is not None

    def take(self) -> str:
        """Return the text since the last call, up to where a stop text may begin."""
        starts = [self.length, self._search.open_start(), self._search_with_names.open_start(), self._end]
        count = max(0, min(start for start in starts if start is not None) - self._taken)
        text, self._untaken = self._untaken[:count], self._untaken[count:]
        self._taken += count
        return text

    def take_rest(self) -> str:
        """Return the text that `take` has held back, after `finish`."""
        end = self.length if self._end is None else self._end
        text, self._untaken = self._untaken[: max(0, end - self._taken)], ""
        return text

    def finish(self) -> tuple[str, bool]:
        """End the tokens; return the text, and True if a stop text ended it."""
        if rest := self._detokenizer.rest():
            self._append(rest, rest.rstrip("\ufffd"))  # an incomplete character does not match a stop text
        text = "".join(self._texts)
        return text[: self._end], self._end is not None

    def _append(self, text: str, searched: str) -> None:
        for search in (self._search, self._search_with_names):
            self._found(search.add(searched, self.length))
        self._texts.append(text)
        self._untaken += text
        self.length += len(text)

    def _found(self, start: int | None) -> None:
        if start is not None:
            self._end = start if self._end is None else min(self._end, start)


class _Search:
    """Search for stop texts in a generated text that grows; only characters that may begin a stop text are kept."""

    def __init__(self, texts: Sequence[str]):
        self.texts = texts
        self._kept = max(map(len, texts), default=1) - 1
        self._tail = ""
        self._starts: list[int] = []  # positions of the characters of the tail in the generated text
        self._searched = 0  # characters of the generated text so far

    def open_start(self) -> int | None:
        """Position from which the text may be the beginning of a stop text."""
        for i in range(len(self._tail)):
            if any(text.startswith(self._tail[i:]) for text in self.texts):
                return self._starts[i]
        return None

    def add(self, text: str, start: int, *, is_special: bool = False) -> int | None:
        """Search on; return the position of the first stop text, if one is complete.

        Args:
            text: next characters, some of which may be known already.
            start: position of `text` in the generated text.
            is_special: `text` is the name of a special token before `start`, and not in the generated text.
        """
        if not self.texts:
            return None
        if not is_special:
            known = max(0, self._searched - start)
            text, start = text[known:], start + known
            self._searched = start + len(text)
        self._tail += text
        self._starts += [start] * len(text) if is_special else range(start, start + len(text))
        found = [at for text in self.texts if (at := self._tail.find(text)) >= 0]
        result = self._starts[min(found)] if found else None
        drop = max(0, len(self._tail) - self._kept)
        self._tail, self._starts = self._tail[drop:], self._starts[drop:]
        return result
