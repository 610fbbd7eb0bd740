"""Answers in the form of OpenAI's API, whole or in chunks of a stream."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

from .choices import Piece, TokenEntry
from .tokens import TokenTexts

LEAST_LOGPROB = -9999.0  # in place of minus infinity, which JSON does not have
DONE = b"data: [DONE]\n\n"

Content = dict[str, Any]


class Format(Protocol):
    """How the choices of a route are written."""

    prefix: str
    object: str
    chunk_object: str

    def first_chunk(self, index: int) -> Content | None:
        """Choice of a chunk before any token."""
        ...

    def chunk(self, piece: Piece) -> Content:
        """Choice of a chunk."""
        ...

    def choice(self, piece: Piece) -> Content:
        """Complete choice."""
        ...


class CompletionFormat:
    """Choices of `/v1/completions`.

    Args:
        texts: texts of tokens.
        echoes: text before each choice.
    """

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, texts: TokenTexts, echoes: Sequence[str] = ()):
        self._texts, self._echoes = texts, echoes

    def first_chunk(self, index: int) -> Content | None:
        if not self._echoes:
            return None
        return {"index": index, "text": self._echoes[index], "logprobs": None, "finish_reason": None}

    def chunk(self, piece: Piece) -> Content:
        logprobs = self._logprobs(piece.entries)
        return {"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def choice(self, piece: Piece) -> Content:
        echo = self._echoes[piece.index] if self._echoes else ""
        return self.chunk(piece) | {"text": echo + piece.text}

    def _logprobs(self, entries: Sequence[TokenEntry]) -> Content | None:
        if not entries:
            return None
        top = [entry.logprobs.top | {entry.token: entry.logprobs.chosen} for entry in entries]
        return {
            "tokens": [self._texts.text(entry.token) for entry in entries],
            "token_logprobs": [_finite(entry.logprobs.chosen) for entry in entries],
            "top_logprobs": [{self._texts.text(id): _finite(x) for id, x in each.items()} for each in top],
            "text_offset": [entry.offset for entry in entries],
        }


class ChatFormat:
    """Choices of `/v1/chat/completions`.

    Args:
        texts: texts of tokens.
    """

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: TokenTexts):
        self._texts = texts

    def first_chunk(self, index: int) -> Content | None:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, piece: Piece) -> Content:
        delta = {"content": piece.text} if piece.text else {}
        logprobs = self._logprobs(piece.entries)
        return {"index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def choice(self, piece: Piece) -> Content:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        logprobs = self._logprobs(piece.entries)
        return {"index": piece.index, "message": message, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _logprobs(self, entries: Sequence[TokenEntry]) -> Content | None:
        if not entries:
            return None
        content = []
        for entry in entries:
            top = [self._token(*each) for each in entry.logprobs.top.items()]
            content.append(self._token(entry.token, entry.logprobs.chosen) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Content:
        return {
            "token": self._texts.text(token),
            "logprob": _finite(logprob),
            "bytes": list(self._texts.bytes(token)),
        }


class ResponseWriter:
    """Writer of one response.

    Args:
        form: how choices are written.
        model: name of the model.
    """

    def __init__(self, form: Format, model: str):
        self.form = form
        self._common = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, pieces: Sequence[Piece], usage: Content) -> Content:
        """Response with all choices."""
        choices = [self.form.choice(piece) for piece in pieces]
        return self._common | {"object": self.form.object, "choices": choices, "usage": usage}

    def event(self, choices: Sequence[Content], usage: dict[str, Content | None]) -> bytes:
        """Event of a stream.

        Args:
            choices: choices of the chunk.
            usage: `{}`, or the field `usage` of the chunk.
        """
        chunk = self._common | {"object": self.form.chunk_object, "choices": list(choices)} | usage
        return event(chunk)


def event(content: Content) -> bytes:
    """Encode a server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> Content:
    """Numbers of tokens; a prompt with several choices counts once."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
