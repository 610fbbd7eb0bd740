"""Requests to the engine: their tokens, their state, and how they end."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from .outputs import FinishReason
from .prefixes import History, NewTokens
from .sampling import NOT_FINITE, Sampler, SamplingOptions

log = logging.getLogger(__name__)

IsFinished = Callable[[Sequence[int]], bool]
OnError = Callable[[BaseException], None]


@dataclass(eq=False)
class Request:
    """Request to an engine.

    Attributes:
        history: tokens of the prompt, and new tokens.
        prompt_length: tokens of the prompt.
        is_finished: callback, see `Engine.submit`.
        on_error: callback, see `Engine.submit`.
        logprobs: see `Engine.submit`.
        new_tokens: view of the new tokens.
        id: number in outputs.
        slot: slot of the state; -1 while the request waits.
        num_read: tokens that the state in the slot has read.
        is_kept: its states may go to the prefix cache.
    """

    history: History
    prompt_length: int
    options: SamplingOptions
    sampler: Sampler
    stop_token_ids: frozenset[int]
    is_finished: IsFinished | None
    on_error: OnError | None
    logprobs: int | None = None
    new_tokens: NewTokens = field(init=False)
    id: int = -1
    slot: int = -1
    num_read: int = 0
    is_kept: bool = True
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self.new_tokens = NewTokens(self.history, self.prompt_length)

    @property
    def is_decoding(self) -> bool:
        """True once the prompt has been read."""
        return self.num_read >= self.prompt_length

    def finish_reason(self, token: int | None) -> FinishReason | None:
        """Return the reason why the request ends after a new token; None if it goes on.

        Raises:
            ValueError: the logits of the token were not finite.
        """
        if token is None:
            raise ValueError(NOT_FINITE)
        if self.is_cancelled:
            return FinishReason.CANCELLED
        if token in self.stop_token_ids:
            return FinishReason.STOP
        if self.is_finished is not None and self.is_finished(self.new_tokens):
            return FinishReason.STOP
        if self.is_cancelled:  # by `is_finished`
            return FinishReason.CANCELLED
        return FinishReason.LENGTH if len(self.new_tokens) >= self.options.max_new_tokens else None

    def report(self, error: BaseException) -> None:
        """Log the error that ended the request, and call `on_error`."""
        log.error("request %d failed", self.id, exc_info=error)
        if self.on_error is not None:
            try:
                self.on_error(error)
            except Exception:
                log.exception("on_error of request %d", self.id)


@dataclass
class PromptChunk:
    """Part of a prompt that one step reads.

    Attributes:
        stop: tokens of the prompt that are read after the step.
        saved_at: numbers of tokens after which the state goes to the prefix cache.
    """

    request: Request
    stop: int
    saved_at: list[int]

    @property
    def start(self) -> int:
        return self.request.num_read


def prompt_chunks(requests: Iterable[Request], left: int, room: int, *, ends_at_saved: bool) -> list[PromptChunk]:
    """Divide tokens of a step among the prompts that are not read yet, in order of arrival.

    Args:
        requests: that run.
        left: tokens, at most.
        room: states that go to the prefix cache, at most.
        ends_at_saved: end a chunk with the first state that goes there.
    """
    chunks: list[PromptChunk] = []
    for request in requests:
        if request.is_decoding:
            continue
        if left == 0:
            break
        block = request.history.block
        stop = min(request.prompt_length, request.num_read + left)
        next_block = (request.num_read // block + 1) * block
        saved_at = list(range(next_block, stop + 1, block))[-room:] if room and request.is_kept else []
        if saved_at and ends_at_saved:
            stop, saved_at = saved_at[0], saved_at[:1]
        chunks.append(PromptChunk(request, stop, saved_at))
        left, room = left - (stop - request.num_read), room - len(saved_at)
    return chunks
