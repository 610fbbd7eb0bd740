"""One answer that the engine writes: its text, piece by piece, and its log-probabilities."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from ..inference import FinishReason, Output, SamplingOptions, TokenLogprobs
from ..inference.text import GeneratedText


class TokenEntry(NamedTuple):
    """New token with its log-probabilities.

    Attributes:
        offset: characters of the answer before the token.
    """

    token: int
    offset: int
    logprobs: TokenLogprobs


class Piece(NamedTuple):
    """Next part of a choice.

    Attributes:
        index: number of the choice in its request.
        text: text that further tokens do not change; may be empty.
        num_tokens: number of tokens, also of those whose text is not complete.
        entries: the tokens with log-probabilities, if the request asks for them.
        finish_reason: "stop" or "length" if the choice is complete.
        failure: why the engine could not complete the choice.
    """

    index: int
    text: str = ""
    num_tokens: int = 0
    entries: tuple[TokenEntry, ...] = ()
    finish_reason: str | None = None
    failure: str | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.failure is not None

    @staticmethod
    def joined(pieces: "Sequence[Piece]") -> "Piece":
        """Join successive pieces of a choice."""
        return pieces[-1]._replace(
            text="".join(piece.text for piece in pieces),
            num_tokens=sum(piece.num_tokens for piece in pieces),
            entries=tuple(entry for piece in pieces for entry in piece.entries),
        )


class Choice:
    """Answer to a prompt, written by the thread of the engine.

    Args:
        index: number of the choice in its request.
        prompt: token ids.
        options: how tokens are chosen.
        stop: texts that end the choice.
        logprobs: number of most likely tokens; None for no log-probabilities.
        tokenizer: tokenizer of the model.
        arrived: `time.monotonic()` at the arrival of the request.
    """

    def __init__(
        self,
        index: int,
        prompt: list[int],
        options: SamplingOptions,
        stop: Sequence[str],
        logprobs: int | None,
        tokenizer: PreTrainedTokenizerFast,
        arrived: float,
    ):
        self.index, self.prompt, self.options, self.logprobs, self.arrived = index, prompt, options, logprobs, arrived
        self.request = -1  # number in the engine
        self.num_tokens = 0
        self.first_at = self.last_at = arrived
        self._text = GeneratedText(tokenizer, stop)
        self._offset = self._next_offset = 0

    def is_finished(self, tokens: Sequence[int]) -> bool:
        """Add the last of the new tokens; return True if it completes a stop text."""
        return self._add(tokens[-1])

    def advance(self, output: Output) -> Piece:
        """Return what an output of the engine adds to the text."""
        entries: tuple[TokenEntry, ...] = ()
        if output.token is not None:
            self.num_tokens += 1
            self.last_at = time.monotonic()
            if self.num_tokens == 1:
                self.first_at = self.last_at
            if self._text.num_tokens < self.num_tokens:  # the engine does not show a stop token to `is_finished`
                self._add(output.token)
            if output.logprobs is not None:
                entries = (TokenEntry(output.token, self._offset, output.logprobs),)
        text, reason, failure = self._text.take(), None, None
        if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            _, is_stopped = self._text.finish()
            text += self._text.take_rest()
            reason = str(FinishReason.STOP if is_stopped else output.finish_reason)
        elif output.finish_reason is not None:
            failure = str(output.finish_reason)
        return Piece(self.index, text, int(output.token is not None), entries, reason, failure)

    def _add(self, token: int) -> bool:
        self._offset = self._next_offset
        is_stopped = self._text.add(token)
        self._next_offset = self._text.length
        return is_stopped
