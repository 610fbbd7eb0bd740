"""Files of answers, which a later run continues, and lines that arrive from a pipe."""

import json
import os
import select
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..files import write
from .batch import Answer, to_json

ANSWER_START = b'{"index": '


def read_answers(path: Path) -> dict[int, Answer]:
    """Read the answers in a file, by index, without errors and without a last line that was cut off.

    Returns:
        The answers; none if there is no file.

    Raises:
        ValueError: the file holds other than answers.
        OSError: the file cannot be read.
    """
    answers: dict[int, Answer] = {}
    seen: set[int] = set()
    if not path.exists():
        return answers
    with path.open("rb") as file:
        if file.peek(1)[:1] not in (b"{", b""):  # before reading a line, which may be large
            raise ValueError(f"{path} holds no answers: choose another output")
        for number, line in enumerate(file, start=1):
            if (answer := _answer_of(line)) is not None:
                if answer["index"] in seen:
                    raise ValueError(f"{path} holds two answers of index {answer['index']}: choose another output")
                seen.add(answer["index"])
                if "error" not in answer:
                    answers[answer["index"]] = answer
            elif line.endswith(b"\n") or not (line.startswith(ANSWER_START) or ANSWER_START.startswith(line)):
                raise ValueError(f"{path} holds other lines than answers, in line {number}: choose another output")
    return answers


def write_answers(path: Path, answers: Mapping[int, Answer]) -> None:
    """Replace the content of a file by answers."""
    content = b"".join(map(to_json, answers.values()))
    if not path.exists() or path.read_bytes() != content:
        write(path.resolve(), content)


def check_writable(path: Path) -> None:
    """Raise the OSError that writing a file would raise, as far as that is known before."""
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
    """Yield the lines of a file or pipe; None if the next line of a pipe has not arrived, unless `can_wait()`."""
    try:
        descriptor = file.fileno()
    except OSError:  # not a file of the operating system
        yield from file
        return
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        yield from file
        return
    parts: list[bytes] = []  # of the line that arrives
    while True:
        if not can_wait() and not select.select([descriptor], [], [], 0)[0]:
            yield None
            continue
        if not (content := os.read(descriptor, 1 << 16)):
            break
        first, *others = content.split(b"\n")
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
