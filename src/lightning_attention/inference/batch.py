"""A file of prompts, answered many at a time."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers import PreTrainedTokenizerFast

from .engine import Engine, FinishReason
from .generate import encode
from .sampling import SamplingOptions

Answer = dict[str, Any]

OPTIONS = {option.name for option in fields(SamplingOptions)}


def answer_lines(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, lines: Iterable[str], options: SamplingOptions
) -> Iterator[Answer]:
    """The answers to prompts, each as soon as it is there.

    Args:
        engine: with nothing else to do.
        tokenizer: of its model.
        lines: JSON objects with a text `prompt`; where they wish, with options of `SamplingOptions`, and with `stop`, a
            text or a list of texts that end the answer. Blank lines are skipped. They are read as they are needed.
        options: for what a line leaves open.

    Yields:
        What the line held, and `index`, its number from 0; `text`, without the prompt and what stopped it; `tokens`,
        how many were written; and `finish_reason`. A line that cannot be answered has `error` instead.
    """
    open_answers: dict[int, _Open] = {}
    numbered = enumerate(lines)
    more = True
    while more or engine.has_work:
        while more and len(open_answers) < 2 * engine.max_requests:
            index, line = next(numbered, (None, ""))
            if index is None:
                more = False
            elif line.strip():
                try:
                    answer = _Open.of_line(line, index, tokenizer, options)
                    open_answers[answer.submit(engine)] = answer
                except (ValueError, TypeError) as error:
                    yield _failed(line, index, error)
        for output in engine.step():
            answer = open_answers[output.request]
            if output.token is not None:
                answer.tokens.append(output.token)
            if output.finish_reason is not None:
                yield open_answers.pop(output.request).finished(output.finish_reason)


@dataclass
class _Open:
    """A line that is being answered."""

    given: dict[str, Any]
    index: int
    tokenizer: PreTrainedTokenizerFast
    prompt: list[int]
    options: SamplingOptions
    stop: list[str]
    tokens: list[int] = field(default_factory=list)

    @classmethod
    def of_line(cls, line: str, index: int, tokenizer: PreTrainedTokenizerFast, options: SamplingOptions) -> "_Open":
        given = json.loads(line)
        if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
            raise ValueError("a line must be a JSON object with a text prompt")
        wishes = {name: value for name, value in given.items() if name in OPTIONS}
        stop = given.get("stop", [])
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop must be a text or a list of texts, got {stop!r}")
        return cls(given, index, tokenizer, encode(tokenizer, given["prompt"]), replace(options, **wishes), stop)

    def submit(self, engine: Engine) -> int:
        return engine.submit(self.prompt, self.options, is_finished=self._stop_test())

    def finished(self, reason: FinishReason) -> Answer:
        text = self._text(self.tokens)
        text = text[: min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=len(text))]
        return self.given | {
            "index": self.index,
            "text": text,
            "tokens": len(self.tokens),
            "finish_reason": str(reason),
        }

    def _stop_test(self) -> Callable[[list[int]], bool] | None:
        if not self.stop:
            return None
        # A token is at least a byte, so the last tokens hold every text that the newest could have completed.
        window = max(len(stop.encode()) for stop in self.stop) + 8
        return lambda tokens: any(stop in self._text(tokens[-window:]) for stop in self.stop)

    def _text(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def _failed(line: str, index: int, error: Exception) -> Answer:
    try:
        given = json.loads(line)
    except ValueError:
        given = None
    return (given if isinstance(given, dict) else {}) | {"index": index, "error": " ".join(str(error).split())}
