"""A file of answers, which a later run goes on with; and lines from a pipe."""

import json
import os
import select
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..files import write
from .batch import Answer, to_json

START = b'{"index": '


def read_answers(path: Path) -> dict[int, Answer]:
    """The answers in a file, by index; none if there is no file. Lines with an `error`, and a last line that was cut
    off, are left out.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    answers: dict[int, Answer] = {}
    seen: set[int] = set()
    if not path.exists():
        return answers
    with path.open("rb") as file:
        if file.peek(1)[:1] not in (b"{", b""):  # before a line of gigabytes is read
            raise ValueError(f"{path} holds no answers: choose another output")
        for number, line in enumerate(file, start=1):
            if (answer := _answer_of(line)) is not None:
                if answer["index"] in seen:
                    raise ValueError(f"{path} holds two answers of index {answer['index']}: choose another output")
                seen.add(answer["index"])
                if "error" not in answer:
                    answers[answer["index"]] = answer
            elif line.endswith(b"\n") or not (line.startswith(START) or START.startswith(line)):
                raise ValueError(f"{path} holds something else than answers, in line {number}: choose another output")
    return answers


def write_answers(path: Path, answers: Mapping[int, Answer]) -> None:
    """Make a file hold these answers and nothing else."""
    content = b"".join(map(to_json, answers.values()))
    if not path.exists() or path.read_bytes() != content:
        write(path.resolve(), content)


def check_writable(path: Path) -> None:
    """Raise the OSError that writing the file would end with, as far as that can be told without writing it."""
    if path.exists():
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, not a file")
        target = path
    else:
        target = path.parent
        if not target.is_dir():
            raise FileNotFoundError(f"there is no folder {target}")
    if not os.access(target, os.W_OK):
        raise PermissionError(f"{target} cannot be written")


def arriving_lines(file: IO[Any], can_wait: Callable[[], bool]) -> Iterator[str | bytes | None]:
    """Lines of a file, or of a pipe as they arrive: None if the next one is not there yet and something else can be
    done, that is unless `can_wait()`.
    """
    try:
        descriptor = file.fileno()
    except OSError:  # not a file of the system
        yield from file
        return
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        yield from file
        return
    parts: list[bytes] = []
    while True:
        if not can_wait() and not select.select([descriptor], [], [], 0)[0]:
            yield None
            continue
        if not (chunk := os.read(descriptor, 1 << 16)):
            break
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for rest in others:
            yield b"".join(parts)
            parts = [rest]
    if parts := [part for part in parts if part]:
        yield b"".join(parts)


def _answer_of(line: bytes) -> Answer | None:
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict) or type(answer.get("index")) is not int:
        return None
    has_text = all(type(answer.get(name)) is kind for name, kind in (("text", str), ("tokens", int)))
    return answer if has_text or isinstance(answer.get("error"), str) else None
