"""Conversations as training documents: rendered by a chat template, with the tokens of answers apart."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from secrets import token_hex
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..models.chat import ASSISTANT, ChatTemplate, ConversationError, Message, checked_messages, rendering
from .tokenizer import CHAT_TEMPLATE, bytes_backend

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers finds the blocks of answers
REMEDY = "mark the answers in it by {% generation %} ... {% endgeneration %}"
NO_END = "the chat template writes nothing but space after an answer, so that answers would not end: add eos_token"


@dataclass(frozen=True)
class ChatDocument:
    """Conversation of the training data.

    Attributes:
        messages: each with `role` and `content`.
        where: file and line, for errors.
    """

    messages: Sequence[Message]
    where: str

    @classmethod
    def checked(cls, messages: Any, where: str) -> "ChatDocument":
        """Check messages as JSON or parquet has them; other fields of a message are left out if they are null.

        Raises:
            ValueError: the messages are not valid, or none is of the assistant.
        """
        if isinstance(messages, list):
            messages = [_without_null_fields(message) for message in messages]
        try:
            messages = checked_messages(messages)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if all(message["role"] != ASSISTANT for message in messages):
            raise ValueError(f"{where}: no message has the role {ASSISTANT}, so that there is no answer to learn")
        return cls(messages, where)

    def __iter__(self) -> Iterator[str]:
        """Contents of the messages."""
        return iter([message["content"] for message in self.messages])


def _without_null_fields(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {name: x for name, x in message.items() if x is not None or name in ("role", "content")}


class Part(NamedTuple):
    """Part of a rendered conversation.

    Attributes:
        text: part of the text; `Spellings` may stand in it.
        is_answer: the part is an answer with the end of its turn, which has loss.
    """

    text: str
    is_answer: bool


class Conversations:
    """Encoder of conversations, by the chat template of a tokenizer, or ChatML if it has none.

    The tokens of a conversation are those of its parts: what precedes an answer is encoded as the prompt for it, and an
    answer as the model writes it, apart. Answers are found in one of two ways:

    - The template marks them by `{% generation %}`, as transformers' `return_assistant_tokens_mask`.
    - Else an answer begins where the prompt for it ends, which the template renders from the messages before it, and
      ends with what the template writes after an answer, without space at the end. The messages up to an answer must be
      rendered as in the whole conversation.

    Args:
        tokenizer: tokenizer of the documents.

    Raises:
        ValueError: the template is not valid Jinja, or is one of several of which none is the default.

    Example:
        >>> from lightning_attention.training import byte_tokenizer
        >>> from lightning_attention.training.conversations import Conversations
        >>> hi = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
        >>> [part.text for part in Conversations(byte_tokenizer()).parts(hi) if part.is_answer]
        ['ho<|im_end|>']
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, chat_template(tokenizer))
        self._is_marked = MARKED.search(str(self.template.source)) is not None
        self._bytes = PreTrainedTokenizerFast(tokenizer_object=bytes_backend())

    def encode(self, documents: Sequence[ChatDocument]) -> list[list[tuple[list[int], bool]]]:
        """Encode conversations.

        Returns:
            Token ids of the parts of each conversation, and whether they have loss.

        Raises:
            ValueError: the template refuses a conversation, or does not show where answers begin and end; or the
                tokenizer has no token for a text.
        """
        all_parts = []
        for document in documents:
            spellings = self.template.spellings()
            messages = [{**message, "content": spellings.hide(message["content"])} for message in document.messages]
            try:
                all_parts.append((self.parts(messages), spellings))
            except ConversationError as error:
                raise ValueError(f"{document.where}: {error}") from error
        plain = iter(self._encode_texts([x.text for parts, names in all_parts if not names.names for x in parts]))
        return [
            [(self.template.encode(x.text, names) if names.names else next(plain), x.is_answer) for x in parts]
            for parts, names in all_parts
        ]

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        try:
            return self.tokenizer(texts, add_special_tokens=False).input_ids
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ValueError(f"the tokenizer cannot encode a text: {error}") from error

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """Render a conversation and divide the text into answers and what is between them.

        Raises:
            ConversationError: the template refuses the conversation, or does not show where answers begin and end.
        """
        parts = self._marked_parts(messages) if self._is_marked else self._rendered_parts(messages)
        self._check_complete(messages, "".join(part.text for part in parts))
        return parts

    def _check_complete(self, messages: Sequence[Message], text: str) -> None:
        """Check that no message is left out, as of a role that the template does not know."""
        for i, message in enumerate(messages):
            if message["content"].strip() not in text:  # changed, or left out
                other = token_hex(8)
                changed = [*messages[:i], {**message, "content": other}, *messages[i + 1 :]]
                if other not in self.template.render(changed, add_generation_prompt=False):
                    raise ConversationError(
                        f"the chat template leaves out message {i + 1}, of the role {message['role']}"
                    )

    def _marked_parts(self, messages: Sequence[Message]) -> list[Part]:
        # The mask is one of tokens: with bytes as tokens, it is exact.
        names: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        with rendering():
            encoded: Any = self._bytes.apply_chat_template(
                list(map(dict, messages)),
                chat_template=self.template.source,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **names,
            )
        content = np.array(encoded["input_ids"], np.uint8)
        is_first = content & 0xC0 != 0x80  # bytes of a character; versions of transformers differ in the others
        mask = np.array(encoded["assistant_masks"], bool)[is_first]
        if not mask.any():
            raise ConversationError("the chat template marks no answer in these messages by {% generation %}")
        text = content.tobytes().decode()
        bounds = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(text)]
        return [Part(text[i:j], bool(mask[i])) for i, j in pairwise(bounds)]

    def _rendered_parts(self, messages: Sequence[Message]) -> list[Part]:
        whole = self.template.render(messages, add_generation_prompt=False)
        parts, position = [], 0
        for i, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                start, stop = self._answer(messages[: i + 1], whole)
                if not position <= start < stop:
                    raise ConversationError(f"the chat template does not show where message {i + 1} begins: {REMEDY}")
                parts += [Part(whole[position:start], False), Part(whole[start:stop], True)]
                position = stop
        return [part for part in (*parts, Part(whole[position:], False)) if part.text]

    def _answer(self, messages: Sequence[Message], whole: str) -> tuple[int, int]:
        """Bounds of the last of the messages, an answer, in the whole conversation."""
        end = self.template.end
        if end is None:
            raise ConversationError(f"the chat template does not show where an answer ends: {REMEDY}")
        if not end.strip():
            raise ConversationError(NO_END)
        text = self.template.render(messages, add_generation_prompt=False)
        prompt = self._prompt(messages[:-1], text)
        if not (text.startswith(prompt) and whole.startswith(text) and text.endswith(end)):
            raise ConversationError(
                f"the chat template renders the messages up to message {len(messages)} in another way when messages "
                f"follow: {REMEDY}"
            )
        return len(prompt), len(text) - len(end) + len(end.rstrip())

    def _prompt(self, messages: Sequence[Message], text: str) -> str:
        """Prompt for an answer to the messages.

        Args:
            messages: messages before the answer.
            text: messages and answer.
        """
        if messages:
            return self.template.render(messages)
        user = [{"role": "user", "content": "a"}]  # transformers renders no empty conversation
        header = self.template.render(user).removeprefix(self.template.render(user, add_generation_prompt=False))
        if not header or header not in text:
            raise ConversationError(
                f"the first message is an answer, for which the chat template has no prompt: {REMEDY}"
            )
        return text[: text.index(header) + len(header)]


def chat_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """Chat template of a tokenizer, or ChatML if it has none.

    Raises:
        ValueError: it has several, none of them the default.
    """
    found = tokenizer.chat_template
    if isinstance(found, dict) and found and "default" not in found:
        raise ValueError(f"the tokenizer has chat templates {', '.join(found)}, and no default: give one to use")
    return (found.get("default") if isinstance(found, dict) else found) or CHAT_TEMPLATE
