"""What the engine returns."""

from enum import StrEnum
from typing import NamedTuple


class FinishReason(StrEnum):
    STOP = "stop"  # a stop token, or `is_finished`
    LENGTH = "length"  # max_new_tokens
    CANCELLED = "cancelled"
    FAILED = "failed"  # an exception, which is logged


class Output(NamedTuple):
    """What a step has done for a request: one token more, or its end, or both."""

    request: int
    token: int | None
    finish_reason: FinishReason | None


class Completion(NamedTuple):
    """The answer to a request: its new tokens, a stop token included."""

    tokens: list[int]
    finish_reason: FinishReason
