"""Conversations as prompts, by the chat template of a checkpoint."""

import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerFast

from ..models.tokenization import encode_texts, special_tokens, well_formed
from .errors import ApiError
from .protocol import Message

# Texts that end the turn of an assistant in the templates that write them. They need not be special tokens.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
NO_TEMPLATE = (
    "the checkpoint has no chat template: start the server with --chat-template FILE, or send a prompt to "
    "/v1/completions"
)


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
            with suppress(ApiError):
                self._render([{"role": "user", "content": "a"}])

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation up to where the assistant answers.

        Raises:
            ApiError: there is no template, or the template refuses the messages.
        """
        if self.template is None:
            raise ApiError(400, NO_TEMPLATE, param="messages")
        secret, spelled = secrets.token_hex(8), []

        def hide(match: re.Match[str]) -> str:
            spelled.append(match[0])
            return f"{secret}{len(spelled) - 1}."

        conversation = []
        for message in messages:
            text = self._is_special.sub(hide, well_formed(message.text))
            role = "system" if message.role == "developer" else message.role
            name = {} if message.name is None else {"name": message.name}
            conversation.append({"role": role, "content": text, **name})
        prompt = self._render(conversation)
        if not spelled:
            return list(self.tokenizer(prompt, add_special_tokens=False).input_ids)
        ids, hidden = [], re.compile(rf"{secret}(\d+)\.")
        for text, token in self._parts(prompt):
            if text:
                text = hidden.sub(lambda match: spelled[int(match[1])], text)
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
            raise ApiError(400, message, param="messages") from error
        assert isinstance(prompt, str)
        if not prompt:
            raise ApiError(400, "the chat template renders these messages as an empty prompt", param="messages")
        return prompt

    def _parts(self, prompt: str) -> list[tuple[str, int | None]]:
        """Split a prompt into texts, each with the special token after it."""
        parts, start = [], 0
        for match in self._is_special.finditer(prompt):
            parts.append((prompt[start : match.start()], self._special[match[0]]))
            start = match.end()
        return [*parts, (prompt[start:], None)]


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
