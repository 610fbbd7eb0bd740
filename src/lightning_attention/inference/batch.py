"""Answers to lines of prompts, many at a time."""

import json
import math
from collections.abc import Generator, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from transformers import PreTrainedTokenizerFast

from .chat import ChatPrompts, checked_messages
from .engine import Engine
from .generate import encode
from .outputs import FinishReason
from .sampling import SamplingOptions
from .text import GeneratedText

Answer = dict[str, Any]

OPTIONS = {option.name for option in fields(SamplingOptions)}
# Names that an answer adds to its line; values of the line under these names are dropped.
ADDED = {"index", "text", "tokens", "finish_reason", "error"}
MAX_DEPTH = 100  # nesting of objects and lists in a line; few JSON readers take more than some hundreds


def answer_lines(
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    lines: Iterable[str | bytes | None],
    options: SamplingOptions,
    answered: Mapping[int, Answer] | None = None,
    *,
    chat_template: str | None = None,
) -> Generator[Answer, None, None]:
    """Answer prompts, and yield each answer when it is complete.

    Args:
        engine: without other requests.
        tokenizer: tokenizer of the model.
        lines: JSON objects with a text `prompt`, or with `messages`, a list of objects with `role` (system, user or
            assistant) and `content`, as text or UTF-8; they may set options of `SamplingOptions`, and
            `stop`, a text or list of texts that end the answer. Blank lines are skipped. Lines are read when needed;
            None means that the next line has not arrived, while the engine has work.
        options: defaults for the options of a line.
        answered: known answers, by index; their lines are skipped.
        chat_template: Jinja template for messages, by default that of the tokenizer.

    Yields:
        The content of the line, with `index`, its number from 0; `text`, without the prompt and the stop text;
        `tokens`, the number of generated tokens; and `finish_reason`. A line that cannot be answered has `error`
        instead of the last three.

    Raises:
        ValueError: an answer in `answered` does not belong to the line with its index, or the chat template is not
            valid.
    """
    chat = ChatPrompts(tokenizer, chat_template)
    running: dict[int, _Line] = {}
    known = dict(answered or {})
    source, index, is_read = iter(lines), -1, False
    try:
        while running or not is_read:
            while not is_read and len(running) < 2 * engine.max_requests:
                try:
                    text = next(source)
                except StopIteration:
                    is_read = True
                    break
                if text is None:
                    break
                index += 1
                if not text.strip():
                    continue
                line = _Line(text, index, chat)
                if index in known:
                    line.check_is_answered_by(known.pop(index))
                    continue
                try:
                    running[line.submit(engine, options)] = line
                except Exception as error:
                    yield line.failed(error)
            for output in engine.step():
                line = running.get(output.request)
                if line is None:
                    continue
                if output.token is not None:
                    line.add(output.token)
                if output.finish_reason is not None:
                    yield running.pop(output.request).answer(output.finish_reason)
        if known:
            raise ValueError(f"there is an answer to line {min(known) + 1}, but no such line among the prompts")
    finally:
        for request in running:
            engine.cancel(request)


def to_json(answer: Answer) -> bytes:
    """Encode an answer as a JSON line in UTF-8; lone surrogates stay escaped."""
    return json.dumps(answer, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"


class _Line:
    """Line with a prompt, and its answer."""

    def __init__(self, line: str | bytes, index: int, chat: ChatPrompts):
        self.index, self._chat = index, chat
        self._given: dict[str, Any] = {}
        self._unreadable: Exception | None = None
        self._failure: BaseException | None = None
        self._num_tokens = 0
        try:
            self._given = _parse(line)
        except (ValueError, RecursionError) as error:
            self._unreadable = error

    def submit(self, engine: Engine, options: SamplingOptions) -> int:
        if self._unreadable is not None:
            raise self._unreadable
        stop = self._given.get("stop", [])
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop must be a text or a list of texts, got {stop!r}")
        for text in stop:
            _check_characters("stop", text)
        prompt, ends = self._prompt()
        stop = [*stop, *ends]
        options = replace(options, **{name: value for name, value in self._given.items() if name in OPTIONS})
        self._text = GeneratedText(self._chat.tokenizer, stop)
        return engine.submit(
            prompt,
            options,
            is_finished=(lambda tokens: self._text.add(tokens[-1])) if stop else None,
            on_error=self._fail,
        )

    def _prompt(self) -> tuple[list[int], list[str]]:
        """Token ids of the prompt or conversation, and texts that end the answer."""
        if "messages" in self._given:
            if "prompt" in self._given:
                raise ValueError("a line must have a prompt or messages, not both")
            messages = checked_messages(self._given["messages"])
            for message in messages:
                _check_characters("messages", message["content"])
            return self._chat.encode(messages), self._chat.stops
        prompt = self._given.get("prompt")
        if not isinstance(prompt, str):
            raise ValueError("a line must be a JSON object with a text prompt")
        _check_characters("prompt", prompt)
        return encode(self._chat.tokenizer, prompt), []

    def add(self, token: int) -> None:
        self._num_tokens += 1
        if self._text.num_tokens < self._num_tokens:
            self._text.add(token)

    def _fail(self, error: BaseException) -> None:
        self._failure = error

    def answer(self, reason: FinishReason) -> Answer:
        if self._failure is not None:
            return self.failed(self._failure)
        text, is_stopped = self._text.finish()
        reason = FinishReason.STOP if is_stopped else reason
        return self._echo() | {"text": text, "tokens": self._num_tokens, "finish_reason": str(reason)}

    def failed(self, error: BaseException) -> Answer:
        return self._echo() | {"error": " ".join(str(error).split()) or type(error).__name__}

    def check_is_answered_by(self, answer: Answer) -> None:
        """Raise a ValueError if the answer belongs to another line."""
        if self._unreadable is not None or _without_added(answer) != _without_added(self._given):
            raise ValueError(f"line {self.index + 1} of the prompts is not the one that was answered before")

    def _echo(self) -> Answer:
        return {"index": self.index} | _without_added(self._given)


def _check_characters(name: str, text: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} holds a lone surrogate, which is no character")


def _without_added(answer: Answer) -> Answer:
    return {name: value for name, value in answer.items() if name not in ADDED}


def _parse(line: str | bytes) -> dict[str, Any]:
    """Parse the JSON object in a line; raise a ValueError for what JSON readers disagree on, and for deep nesting."""
    text = line if isinstance(line, str) else line.decode("utf-8")
    try:
        given = json.loads(
            text.removeprefix("\ufeff"), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite
        )
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    if not isinstance(given, dict):
        raise ValueError("a line must be a JSON object with a text prompt")
    level, depth = [given], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        children = (list(x.values()) if isinstance(x, dict) else x for x in level)
        level = [child for values in children for child in values if isinstance(child, (dict, list))]
    return given


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{name!r} occurs twice")
    return found


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is not a number of JSON, or too large")
    return value
