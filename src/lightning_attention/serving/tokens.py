"""Texts and bytes of single tokens, for log-probabilities."""

import json
import re

from transformers import PreTrainedTokenizerFast

from ..models.tokenization import byte_characters

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581"  # a space in SentencePiece vocabularies


class TokenTexts:
    """Texts of tokens: part of a character becomes `bytes:\\xe2\\x82`, as in OpenAI's answers.

    Args:
        tokenizer: tokenizer of a checkpoint.

    Example:
        >>> from lightning_attention.serving.tokens import TokenTexts
        >>> from lightning_attention.training import byte_tokenizer
        >>> texts = TokenTexts(byte_tokenizer())
        >>> texts.text(104), texts.text(0xE2)
        ('h', 'bytes:\\\\xe2')
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        self._added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
        is_byte_level = '"ByteLevel"' in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
        self._bytes = {character: byte for byte, character in byte_characters()} if is_byte_level else None

    def bytes(self, token: int) -> bytes:
        """Return the bytes of a token, in UTF-8 where they are text."""
        if token in self._added:
            return self._added[token].encode()
        name = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):
            return b""
        if self._bytes is not None and all(character in self._bytes for character in name):
            return bytes(self._bytes[character] for character in name)
        if match := BYTE.fullmatch(name):
            return bytes([int(match[1], 16)])
        return name.replace(SPACE, " ").encode()

    def text(self, token: int) -> str:
        """Return the text of a token."""
        content = self.bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
