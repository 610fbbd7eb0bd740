"""A conversation with a model: its messages, and the state that the next message goes on from."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from ..models import LightningForCausalLM
from .chat import ChatPrompts, Message
from .engine import Engine
from .outputs import FinishReason
from .packing import can_pack
from .sampling import SamplingOptions
from .text import GeneratedText

# States that are kept: after the last answer, and some within its prompt, from which a changed message is read again.
STATES = 8


@dataclass
class Answered:
    """Numbers of an answer.

    Attributes:
        prompt_tokens: tokens of the conversation before the answer.
        tokens: tokens of the answer.
        finish_reason: why the answer ended; None while it is generated.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    finish_reason: FinishReason | None = None


class Conversation:
    """Conversation with a model in constant memory: a message is read from the state after the answer before it.

    Args:
        model: see `Engine`.
        tokenizer: tokenizer of the model.
        options: how tokens are chosen, and how many an answer has at most.
        chat_template: Jinja template; by default that of the tokenizer.
        system: system message; None for none.

    Attributes:
        messages: the messages so far.
        last: numbers of the last answer.

    Raises:
        TypeError, ValueError: see `Engine` and `ChatPrompts`.
        ConversationError: there is no chat template.

    Example:
        >>> from lightning_attention.inference import Conversation, SamplingOptions, load
        >>> conversation = Conversation(*load("run"), SamplingOptions(max_new_tokens=8, seed=0))
        >>> answer = "".join(conversation.answer("Who are you?"))
    """

    def __init__(
        self,
        model: LightningForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        options: SamplingOptions,
        *,
        chat_template: str | None = None,
        system: str | None = None,
    ):
        self._chat = ChatPrompts(tokenizer, chat_template)
        self._options = options
        self._first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._chat.encode([*self._first, {"role": "user", "content": "a"}])  # may fail, before anything is asked
        self._engine = Engine(model, max_requests=1, prefix_slots=STATES, pack_weights=can_pack(model))
        self.messages: list[Message] = list(self._first)
        self._written: dict[int, _Written] = {}  # by index
        self.last = Answered()

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of the conversation, of any length."""
        return self._engine.pool.nbytes // self._engine.pool.num_slots

    def restart(self) -> None:
        """Forget all messages but the system message."""
        self.messages = list(self._first)

    def answer(self, content: str) -> Generator[str, None, None]:
        """Answer a message of the user, and yield the text as it is generated.

        A caller that stops reading ends the answer, which stays in the conversation as far as it was generated.

        Raises:
            ConversationError: the chat template refuses the messages.
            ValueError: the conversation and the answer exceed the positions of the model.
            RuntimeError: the model failed.
        """
        messages = [*self.messages, {"role": "user", "content": content}]
        known = {
            i: written.content
            for i, message in enumerate(messages)
            if (written := self._written.get(i)) and written.text == message["content"]
        }
        prompt = self._chat.encode(messages, known)
        self.last = Answered(len(prompt))
        answer = _Answer(self._engine, prompt, self._options, GeneratedText(self._chat.tokenizer, self._chat.stops))
        try:
            for text in answer.pieces():
                self.last.tokens = len(answer.tokens)
                yield text
            self.last = Answered(len(prompt), len(answer.tokens), answer.finish_reason)
            if answer.finish_reason == FinishReason.FAILED:
                raise RuntimeError(f"the model failed: {answer.error or 'its log says why'}")
        finally:
            self._engine.cancel(answer.request)
            if answer.tokens:
                self._written[len(messages)] = written = answer.written()
                self.messages = [*messages, {"role": "assistant", "content": written.text}]


class _Written(NamedTuple):
    """Answer that the model wrote, and the tokens of its text."""

    text: str
    content: list[int]


class _Answer:
    """Answer that is generated.

    Attributes:
        tokens: all new tokens.
        error: exception that ended it.
    """

    def __init__(self, engine: Engine, prompt: list[int], options: SamplingOptions, text: GeneratedText):
        self._engine, self._text = engine, text
        self.tokens: list[int] = []
        self._starts: list[int] = []  # characters before each token
        self._finished: tuple[str, bool] | None = None
        self.finish_reason: FinishReason | None = None
        self.error: BaseException | None = None
        self.request = engine.submit(prompt, options, is_finished=self._add_last, on_error=self._fail)

    def pieces(self) -> Generator[str, None, None]:
        while self.finish_reason is None:
            for output in self._engine.step():
                if output.request == self.request:
                    if output.token is not None and self._text.num_tokens == len(self.tokens):
                        self._add(output.token)  # a stop token, which the engine does not show
                    if output.token is not None:
                        self.tokens.append(output.token)
                    self.finish_reason = output.finish_reason
            if piece := self._text.take():
                yield piece
        self._finished = self._text.finish()
        if rest := self._text.take_rest():
            yield rest

    def written(self) -> "_Written":
        """The text so far, and its tokens without those of the end of the turn."""
        text, is_stopped = self._finished or self._text.finish()
        if is_stopped:
            content = [token for token, start in zip(self.tokens, self._starts, strict=False) if start < len(text)]
        else:
            content = self.tokens[:-1] if self.finish_reason == FinishReason.STOP else self.tokens
        return _Written(text, content)

    def _add_last(self, tokens: Sequence[int]) -> bool:
        return self._add(tokens[-1])

    def _add(self, token: int) -> bool:
        self._starts.append(self._text.length)
        return self._text.add(token)

    def _fail(self, error: BaseException) -> None:
        self.error = error
