"""Results of the engine."""

from enum import StrEnum
from typing import NamedTuple


class FinishReason(StrEnum):
    """Reasons for the end of a request."""

    STOP = "stop"  # a stop token, or `is_finished`
    LENGTH = "length"  # max_new_tokens
    CANCELLED = "cancelled"
    FAILED = "failed"  # an exception, which is logged


class Output(NamedTuple):
    """Result of a step for a request: a new token, its end, or both."""

    request: int
    token: int | None
    finish_reason: FinishReason | None


class Completion(NamedTuple):
    """Answer to a request: its new tokens, with the stop token if there is one, and why it ended."""

    tokens: list[int]
    finish_reason: FinishReason
