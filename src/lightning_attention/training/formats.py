"""Readers of source files: text, JSON lines or parquet, compressed or not, in bounded memory."""

import io
import json
import os
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from ..extras import require
from ..models.tokenization import well_formed
from .conversations import ChatDocument

BLOCK = 1 << 16  # bytes read or decompressed at a time, so that a text file need not fit in memory
ROWS = 256  # rows of a parquet file read at a time
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "compression.zstd"}
LINES = ".jsonl", ".ndjson"
TEXT, MESSAGES = FIELDS = "text", "messages"  # of a line or row, unless another is named

Count = Callable[[int], object]  # takes a number of bytes that were read
Document = Iterator[str] | ChatDocument  # consecutive parts of a text, or a conversation


def documents(file: Path, text_field: str | None, count: Count = bool) -> Iterator[Document]:
    """Read the documents of a file: texts, each an iterator of its consecutive parts, or conversations.

    A `.jsonl` or `.ndjson` file holds one document per line, a `.parquet` file one per row; any other file is one
    document. JSON lines end in LF, CRLF or CR. Line ends in text are kept, a byte order mark is not.

    Args:
        file: the file.
        text_field: field of a JSON line, or column of a parquet file, with the text or the messages; None for `text`,
            or `messages` of a conversation.
        count: called with the number of bytes of the file that were read, as they are read.

    Raises:
        ValueError: the file is not UTF-8, is damaged, or a line or row has no text or conversation in `text_field`.
        ImportError: a package for the format is missing.
    """
    suffix, _ = _suffixes(file)
    if suffix == ".parquet":
        yield from _rows(file, text_field, count)
    elif suffix in LINES:
        yield from _lines(file, text_field, count)
    else:
        yield _parts(file, count)


def may_be_text(file: Path, text_field: str | None) -> bool:
    """True for a parquet file, and for a file whose first 64 KiB, decompressed, are UTF-8 text without NUL.

    Raises:
        ValueError: the start of a compressed file or a parquet file is damaged, or a parquet file has no column
            `text_field`.
        ImportError: a package for the format is missing.
    """
    if _suffixes(file)[0] == ".parquet":
        with _parquet(file, text_field):
            return True
    try:
        next(_parts(file), None)
    except NotUtf8Error:
        return False
    return True


class NotUtf8Error(ValueError):
    """Raised for a file that is not UTF-8 text without NUL."""

    def __init__(self, file: Path):
        super().__init__(f"{file} is not UTF-8 text")
        self.file = file


def _suffixes(file: Path) -> tuple[str, str]:
    """Suffixes of the format and of the compression, or an empty one, in lower case."""
    stem, suffix = os.path.splitext(file.name.lower())
    return (os.path.splitext(stem)[1], suffix) if suffix in COMPRESSED else (suffix, "")


def _parts(file: Path, count: Count = bool) -> Iterator[str]:
    decode = getincrementaldecoder("utf-8-sig")().decode
    with _named_errors(file), _content(file, count) as content:
        block = content.read(BLOCK)
        while block:
            following = content.read(BLOCK)
            part = decode(block, final=not following)
            if "\0" in part:
                raise NotUtf8Error(file)
            yield part
            block = following


def _lines(file: Path, text_field: str | None, count: Count) -> Iterator[Document]:
    # Python limits the digits of an int, and numbers are not needed.
    decode = json.JSONDecoder(parse_int=float).decode
    with (
        _named_errors(file),
        _content(file, count) as content,
        io.TextIOWrapper(content, encoding="utf-8-sig", newline=None) as lines,
    ):
        for number, line in enumerate(lines, start=1):
            if "\0" in line:
                raise NotUtf8Error(file)
            if line.isspace():
                continue
            where = f"{file}, line {number}"
            try:
                content = decode(line)
            except (ValueError, RecursionError):
                content = None
            document = _document(content, text_field, where)
            if document is None:
                raise ValueError(
                    f"{where}: not a JSON object with a text in {text_field or TEXT!r}{_or_messages(text_field)}"
                )
            yield document


def _document(content: Any, text_field: str | None, where: str) -> Document | None:
    """Document of a line or row; None if it holds none."""
    if not isinstance(content, dict):
        return None
    names = [text_field] if text_field else [name for name in FIELDS if content.get(name) is not None]
    if len(names) > 1:
        raise ValueError(f"{where}: there are both {TEXT!r} and {MESSAGES!r}: choose by text_field")
    found = content.get(names[0]) if names else None
    if isinstance(found, str) and (text_field or names == [TEXT]):
        return iter([well_formed(found)])
    if found is None or names == [TEXT] or (text_field and not isinstance(found, list)):
        return None
    if content.get("tools"):
        raise ValueError(f"{where}: conversations with tools are not supported")
    return ChatDocument.checked(found, where)


def _or_messages(text_field: str | None) -> str:
    return "" if text_field else f" or a conversation in {MESSAGES!r}"


def _rows(file: Path, text_field: str | None, count: Count) -> Iterator[Document]:
    number, size = 0, file.stat().st_size
    with _parquet(file, text_field) as table:
        known = {text_field} if text_field else {*FIELDS}
        names = [name for name in table.schema_arrow.names if name in known | {"tools"}]
        for batch in table.iter_batches(batch_size=ROWS, columns=names):
            for row in batch.to_pylist():
                number += 1
                where = f"{file}, row {number}"
                document = _document(row, text_field, where)
                if document is None:
                    raise ValueError(f"{where}: no text in {text_field or TEXT!r}{_or_messages(text_field)}")
                yield document
            count(size * batch.num_rows // table.metadata.num_rows)


@contextmanager
def _parquet(file: Path, text_field: str | None) -> Iterator[Any]:
    with _named_errors(file):
        require("data", "pyarrow")
        with import_module("pyarrow.parquet").ParquetFile(file) as table:
            known, names = [text_field] if text_field else FIELDS, table.schema_arrow.names
            if not set(known) & {*names}:
                found = ", ".join(map(repr, names))
                raise ValueError(f"{file} has no column {' or '.join(map(repr, known))}, but {found}")
            yield table


@contextmanager
def _content(file: Path, count: Count) -> Iterator[Any]:
    """Open a file to read its bytes, decompressed."""
    compression = _suffixes(file)[1]
    with io.BufferedReader(_CountedFile(file, count), BLOCK) as content:
        if not compression:
            yield content
            return
        try:
            module = import_module(COMPRESSED[compression])
        except ModuleNotFoundError:
            if compression != ".zst":
                raise
            require("data", "zstandard")  # before Python 3.14
            yield io.BufferedReader(_BytesReader(_zstd_blocks(content)))
            return
        with module.open(content, "rb") as decompressed:
            yield decompressed


class _CountedFile(io.FileIO):
    def __init__(self, file: Path, count: Count):
        super().__init__(file)
        self.count = count

    def readinto(self, buffer: Any) -> int:
        num_bytes = super().readinto(buffer) or 0
        self.count(num_bytes)
        return num_bytes


@contextmanager
def _named_errors(file: Path) -> Iterator[None]:
    """Name the file in errors."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise NotUtf8Error(file) from error
    except ImportError as error:
        raise ImportError(f"{file}: {error}", name=error.name) from error
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the operating system, not of a decompressor
            error.filename = error.filename or str(file)
        elif str(file) not in str(error):
            raise ValueError(f"{file} is damaged, or not what its name says: {error}") from error
        raise


def _zstd_blocks(compressed: IO[bytes]) -> Iterator[bytes]:
    """Decompress all frames; unlike zstandard's reader, raise an error if the last one is cut off."""
    zstandard = import_module("zstandard")
    frame = None
    while data := compressed.read(BLOCK):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("it ends within a frame")


class _BytesReader(io.RawIOBase):
    """Readable file over an iterator of bytes."""

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks, self.rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest and (block := next(self.blocks, None)) is not None:
            self.rest = memoryview(block)
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count
