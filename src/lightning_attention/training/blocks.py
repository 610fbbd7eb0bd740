"""Files with a checksum for each block of their content."""

import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from ..paths import PathLike

BLOCK = 1 << 22  # bytes per checksum
VERIFIED_BLOCKS = 1024  # blocks that `verify` reads at most: seconds for a file of any size
REMEDY = "restore it from a copy, or start a new run, which tokenizes its data again"


def unfinished(path: Path) -> Path:
    """Temporary name of a file that is being written."""
    return path.with_name(f"{path.name}.unfinished")


class BlockWriter:
    """File that is written from start to end under a temporary name, with the checksums of its blocks.

    Args:
        path: the file that `finish` creates or replaces.
        size: bytes that the temporary file holds.
        checksums: checksums of their blocks.

    Raises:
        OSError: the file cannot be written; the error names `path`.
    """

    def __init__(self, path: Path, size: int = 0, checksums: Sequence[int] = ()):
        self.path, self.size, self.checksums = path, size, [*checksums]
        self.temporary = unfinished(path)
        self.file = self.temporary.open("ab")
        os.truncate(self.temporary, size)

    def write(self, content: bytes | memoryview) -> None:
        if not len(content):  # cannot be cast
            return
        rest = memoryview(content).cast("B")
        with self._named_errors():
            self.file.write(rest)
        while rest:
            if self.size % BLOCK == 0:
                self.checksums.append(0)
            part, rest = rest[: BLOCK - self.size % BLOCK], rest[BLOCK - self.size % BLOCK :]
            self.checksums[-1] = zlib.crc32(part, self.checksums[-1])
            self.size += len(part)

    def truncate(self, size: int) -> None:
        """Drop the content after `size` bytes."""
        self.flush()
        os.truncate(self.temporary, size)
        self.size = size
        last = size // BLOCK
        self.checksums[last:] = _checksums(self.temporary, range(last, math.ceil(size / BLOCK)))

    def flush(self) -> None:
        """Flush the content to the disk."""
        with self._named_errors():
            self.file.flush()
            os.fsync(self.file.fileno())

    def finish(self) -> None:
        """Flush the content and give the file its name."""
        self.flush()
        os.replace(self.temporary, self.path)

    def close(self) -> None:
        with suppress(OSError):  # a full disk, which a flush has reported
            self.file.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self.path)  # a full disk names no file
            raise


def verify(file: Path, size: int, checksums: Sequence[int]) -> None:
    """Verify the size of a file and checksums of its blocks: all, or `VERIFIED_BLOCKS` evenly spaced ones.

    Raises:
        ValueError: the file is missing, or its size or a checksum differs.
    """
    try:
        found = file.stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing: {REMEDY}") from error
    if found != size:
        raise ValueError(f"{file} has {found:,} bytes, {size:,} were written: {REMEDY}")
    blocks = np.linspace(0, len(checksums) - 1, min(len(checksums), VERIFIED_BLOCKS)).astype(int).tolist()
    for block, checksum in zip(blocks, _checksums(file, blocks), strict=True):
        if checksum != checksums[block]:
            raise ValueError(f"{file} is damaged near byte {block * BLOCK:,}: {REMEDY}")


def _checksums(path: PathLike, blocks: Iterable[int] | None = None) -> list[int]:
    """CRC-32 of blocks of a file, by default all."""
    with open(path, "rb") as content:
        checksums = []
        for block in range(math.ceil(os.path.getsize(path) / BLOCK)) if blocks is None else blocks:
            content.seek(block * BLOCK)
            checksums.append(zlib.crc32(content.read(BLOCK)))
        return checksums
