"""Results of the engine."""

from enum import StrEnum
from typing import NamedTuple


class FinishReason(StrEnum):
    """Reasons for the end of a request."""

    STOP = "stop"  # a stop token, or `is_finished`
    LENGTH = "length"  # max_new_tokens
    CANCELLED = "cancelled"
    FAILED = "failed"  # an exception, which is logged


class TokenLogprobs(NamedTuple):
    """Log-probability of a new token, and those of the most likely tokens by id, most likely first."""

    chosen: float
    top: dict[int, float]


class Output(NamedTuple):
    """Result of a step for a request: a new token, its end, or both.

    `logprobs` belongs to the token, if the request asked for log-probabilities.
    """

    request: int
    token: int | None
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None


class Completion(NamedTuple):
    """Answer to a request: its new tokens, with the stop token if there is one, and why it ended."""

    tokens: list[int]
    finish_reason: FinishReason
