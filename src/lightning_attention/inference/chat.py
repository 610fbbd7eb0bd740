"""Conversations as prompts, by the chat template of a checkpoint."""

import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast

from ..models.tokenization import encode_texts, special_tokens, well_formed

# Texts that end the turn of an assistant in the templates that write them. They need not be special tokens.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
ROLES = ("system", "user", "assistant")
NO_TEMPLATE = "the checkpoint has no chat template: give one by --chat-template FILE, or a prompt without roles"

Message = Mapping[str, str]
NO_TOKENS: Mapping[int, Sequence[int]] = {}


class ConversationError(ValueError):
    """A conversation that has no prompt."""


class ChatPrompts:
    """Prompts of conversations.

    Special tokens come from the template alone: their spelling in a message is encoded as text, as in
    `lightning_attention.inference.encode`.

    Args:
        tokenizer: tokenizer of a checkpoint.
        template: Jinja template; by default that of the tokenizer.

    Attributes:
        stops: texts that end an answer.

    Raises:
        ValueError: the template is not valid Jinja.

    Example:
        >>> from lightning_attention.inference import ChatPrompts, load
        >>> prompts = ChatPrompts(load("run")[1])
        >>> tokens = prompts.encode([{"role": "user", "content": "Who are you?"}])
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None = None):
        self.tokenizer = tokenizer
        found = tokenizer.chat_template if template is None else template
        self.template = found.get("default") if isinstance(found, dict) else found
        self.stops = [end for end in TURN_ENDS if self.template is not None and end in self.template]
        vocabulary = tokenizer.get_vocab()
        self._special = {name: vocabulary[name] for name in special_tokens(tokenizer) if name in vocabulary}
        names = sorted(map(re.escape, self._special), key=len, reverse=True)
        self._is_special = re.compile("|".join(names) or "(?!)")
        if self.template is not None:
            with suppress(ConversationError):
                self._render([{"role": "user", "content": "a"}])

    def encode(self, messages: Sequence[Message], tokens: Mapping[int, Sequence[int]] = NO_TOKENS) -> list[int]:
        """Encode a conversation up to where the assistant answers.

        Args:
            messages: each with `role`, `content` and perhaps `name`; the template says which roles there are.
            tokens: token ids of contents, by the index of the message: those that were generated, which need not be
                those that their text is encoded as.

        Raises:
            ConversationError: there is no template, or the template refuses the messages.
        """
        if self.template is None:
            raise ConversationError(NO_TEMPLATE)
        secret, spelled = secrets.token_hex(8), []

        def hide(match: re.Match[str]) -> str:
            spelled.append(match[0])
            return f"{secret}{len(spelled) - 1}."

        conversation = []
        for i, message in enumerate(messages):
            content = f"{secret}{i};" if i in tokens else self._is_special.sub(hide, well_formed(message["content"]))
            conversation.append({**message, "content": content})
        prompt = self._render(conversation)
        if not spelled and not tokens:
            return list(self.tokenizer(prompt, add_special_tokens=False).input_ids)
        ids: list[int] = []
        # Texts at even places; at odd ones indices of messages with tokens.
        for place, part in enumerate(re.split(rf"{secret}(\d+);", prompt)):
            ids += tokens[int(part)] if place % 2 else self._encode(part, secret, spelled)
        return ids

    def _encode(self, prompt: str, secret: str, spelled: Sequence[str]) -> list[int]:
        """Encode a part of a prompt, in which names of special tokens in messages are hidden."""
        ids: list[int] = []
        for text, token in self._parts(prompt):
            if text:
                text = re.sub(rf"{secret}(\d+)\.", lambda match: spelled[int(match[1])], text)
                ids += encode_texts(self.tokenizer, [text])[0].ids
            ids += [] if token is None else [token]
        return ids

    def _render(self, conversation: list[dict[str, str]]) -> str:
        try:
            prompt = self.tokenizer.apply_chat_template(
                conversation, chat_template=self.template, add_generation_prompt=True, tokenize=False
            )
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid: {error}") from error
        except Exception as error:  # templates raise what they like
            message = f"the chat template cannot render these messages: {' '.join(str(error).split())}"
            raise ConversationError(message) from error
        assert isinstance(prompt, str)
        if not prompt:
            raise ConversationError("the chat template renders these messages as an empty prompt")
        return prompt

    def _parts(self, prompt: str) -> list[tuple[str, int | None]]:
        """Split a prompt into texts, each with the special token after it."""
        parts, start = [], 0
        for match in self._is_special.finditer(prompt):
            parts.append((prompt[start : match.start()], self._special[match[0]]))
            start = match.end()
        return [*parts, (prompt[start:], None)]


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
