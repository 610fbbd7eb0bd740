"""Chat templates: conversations as text, and the tokens of that text."""

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast

from .tokenization import encode_texts, special_tokens, well_formed

ROLES = ("system", "user", "assistant")
ASSISTANT = "assistant"

Message = Mapping[str, str]


class ConversationError(ValueError):
    """A conversation that a chat template cannot render."""


class ChatTemplate:
    """Chat template of a tokenizer.

    Special tokens come from the template alone: their spelling in a message is encoded as text, as in
    `tokenization.encode_texts`.

    Args:
        tokenizer: tokenizer of a model.
        source: Jinja template; by default that of the tokenizer.

    Attributes:
        source: the template; None if there is none.

    Raises:
        ValueError: the template is not valid Jinja.

    Example:
        >>> from lightning_attention.models.chat import ChatTemplate
        >>> from lightning_attention.training import byte_tokenizer
        >>> ChatTemplate(byte_tokenizer()).render([{"role": "user", "content": "hi"}])
        '<|bos|><|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\n'
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, source: str | None = None):
        self.tokenizer = tokenizer
        found = tokenizer.chat_template if source is None else source
        self.source = found.get("default") if isinstance(found, dict) else found
        vocabulary = tokenizer.get_vocab()
        self._special = {name: vocabulary[name] for name in special_tokens(tokenizer) if name in vocabulary}
        names = sorted(map(re.escape, self._special), key=len, reverse=True)
        self._is_special = re.compile("|".join(names) or "(?!)")
        if self.source is not None:
            with suppress(ConversationError):
                self.render([{"role": "user", "content": "a"}])

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Render a conversation.

        Args:
            messages: each with `role`, `content` and perhaps `name`; the template says which roles there are.
            add_generation_prompt: end with what precedes an answer.

        Raises:
            ConversationError: the template refuses the messages, or renders them as nothing.
        """
        with rendering():
            text = self.tokenizer.apply_chat_template(
                list(map(dict, messages)),
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        assert isinstance(text, str)
        if not text:
            raise ConversationError("the chat template renders these messages as an empty prompt")
        return text

    @cached_property
    def end(self) -> str | None:
        """What the template writes after an answer, with the space around it; None if it shows no answer as it is."""
        answer = secrets.token_hex(8)
        messages = [{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": answer}]
        try:
            _, *after = self.render(messages, add_generation_prompt=False).split(answer)
        except ConversationError:
            return None
        return after[0] if len(after) == 1 else None

    def spellings(self) -> "Spellings":
        """Empty store of the spellings of special tokens in one conversation."""
        return Spellings(self._is_special)

    def encode(self, text: str, spellings: "Spellings") -> list[int]:
        """Encode a part of what was rendered, with the names of special tokens that messages contain as text."""
        ids, start = [], 0
        for match in self._is_special.finditer(text):
            ids += self._encode_text(spellings.restore(text[start : match.start()]))
            ids.append(self._special[match[0]])
            start = match.end()
        return ids + self._encode_text(spellings.restore(text[start:]))

    def _encode_text(self, text: str) -> list[int]:
        return encode_texts(self.tokenizer, [text])[0].ids if text else []


class Spellings:
    """Names of special tokens in messages, hidden from the template and from the search for its special tokens.

    Attributes:
        secret: begins what stands for a name; no message contains it.
        names: the names, in their order.
    """

    def __init__(self, is_special: re.Pattern[str]):
        self._is_special = is_special
        self.secret, self.names = secrets.token_hex(8), list[str]()

    def hide(self, content: str) -> str:
        """Content of a message without the names; lone surrogates become U+FFFD."""
        return self._is_special.sub(self._hide, well_formed(content))

    def restore(self, text: str) -> str:
        """Text with the names."""
        return re.sub(rf"{self.secret}(\d+)\.", lambda match: self.names[int(match[1])], text) if self.names else text

    def _hide(self, match: re.Match[str]) -> str:
        self.names.append(match[0])
        return f"{self.secret}{len(self.names) - 1}."


@contextmanager
def rendering() -> Iterator[None]:
    """Context for `apply_chat_template`: errors of a template are `ConversationError`s of one line."""
    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid: {error}") from error
    except Exception as error:  # templates raise what they like
        message = f"the chat template cannot render these messages: {' '.join(str(error).split())}"
        raise ConversationError(message) from error


def checked_messages(value: Any) -> list[Message]:
    """Return a list of messages, as JSON has them.

    Raises:
        ValueError: it is not a list of objects with a known role and a text, or a message has other fields.
    """
    if not isinstance(value, list) or not value:
        raise ValueError("messages must be a list of objects with role and content, not empty")
    for message in value:
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise ValueError("a message must be an object with role and content, and nothing else")
        if message["role"] not in ROLES:
            raise ValueError(f"the role of a message must be one of {', '.join(ROLES)}, got {message['role']!r}")
        if not isinstance(message["content"], str):
            raise ValueError("the content of a message must be a text")
    return value


def read_template(file: Path) -> str:
    """Read a chat template.

    Raises:
        ValueError: the file is not UTF-8, or empty.
        OSError: the file cannot be read.
    """
    try:
        template = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    if not template.strip():
        raise ValueError(f"{file} holds no chat template")
    return template
