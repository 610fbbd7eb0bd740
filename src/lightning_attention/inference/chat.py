"""Conversations as prompts, by the chat template of a checkpoint."""

import re
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerFast

from ..models.chat import ChatTemplate, ConversationError, Message, checked_messages, read_template

__all__ = ["ChatPrompts", "ConversationError", "Message", "checked_messages", "read_template"]

# Texts that end the turn of an assistant in the templates that write them. They need not be special tokens.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
NO_TEMPLATE = "the checkpoint has no chat template: give one by --chat-template FILE, or a prompt without roles"

NO_TOKENS: Mapping[int, Sequence[int]] = {}


class ChatPrompts:
    """Prompts of conversations.

    Special tokens come from the template alone: their spelling in a message is encoded as text, as in
    `lightning_attention.inference.encode`.

    Args:
        tokenizer: tokenizer of a checkpoint.
        template: Jinja template; by default that of the tokenizer.

    Attributes:
        stops: texts that end an answer: usual ones that the template contains, else what it writes after an answer.

    Raises:
        ValueError: the template is not valid Jinja.

    Example:
        >>> from lightning_attention.inference import ChatPrompts, load
        >>> prompts = ChatPrompts(load("run")[1])
        >>> tokens = prompts.encode([{"role": "user", "content": "Who are you?"}])
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None = None):
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, template)
        source = self._template.source
        self.stops = [end for end in TURN_ENDS if source is not None and end in source]
        if source is not None and not self.stops:
            end = (self._template.end or "").strip()
            self.stops = [end] if end not in ("", tokenizer.eos_token) else []

    @property
    def template(self) -> str | None:
        """The template; None if there is none."""
        return self._template.source

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
        spellings = self._template.spellings()
        conversation = []
        for i, message in enumerate(messages):
            content = f"{spellings.secret}{i};" if i in tokens else spellings.hide(message["content"])
            conversation.append({**message, "content": content})
        prompt = self._template.render(conversation)
        if not spellings.names and not tokens:
            return list(self.tokenizer(prompt, add_special_tokens=False).input_ids)
        ids: list[int] = []
        # Texts at even places; at odd ones indices of messages with tokens.
        for place, part in enumerate(re.split(rf"{spellings.secret}(\d+);", prompt)):
            ids += tokens[int(part)] if place % 2 else self._template.encode(part, spellings)
        return ids
