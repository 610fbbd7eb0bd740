"""Atomic file replacement: a reader finds the old content or the new, whenever the writer is stopped."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from .paths import PathLike, to_path


@contextmanager
def replacing(path: PathLike, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` if the block ends without an error.

    The temporary file is in the folder of `path`. It is flushed to the disk and renamed, and the folder is flushed, so
    that a power cut does not leave half of the content. After an error the temporary file is removed. Text is UTF-8.

    Args:
        path: the file to replace or create; its folder must exist.
        mode: "w" for text, "wb" for bytes.

    Raises:
        OSError: the file cannot be written; `path` is unchanged.

    Example:
        >>> with replacing("settings.json") as file:
        ...     json.dump(settings, file)
    """
    path = to_path(path, "path")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        with temporary.open(
            mode, encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else ""
        ) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise
    flush(path.parent)


def write(path: PathLike, content: str | bytes) -> None:
    """Replace the content of a file, see `replacing`."""
    with replacing(path, "wb" if isinstance(content, bytes) else "w") as file:
        file.write(content)


@contextmanager
def writable_folder(folder: PathLike) -> Iterator[Path]:
    """Create a folder and check that it is writable; after an error in the block, remove created folders if empty.

    Raises:
        OSError: the folder cannot be created, or is not writable.
    """
    folder, created = to_path(folder, "folder"), []
    try:
        try:
            created = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OSError(error.errno, f"cannot write to this folder: {error.strerror}", str(folder)) from error
        yield folder
    except BaseException:
        for path in created:
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def complete_or_empty(folder: PathLike) -> Iterator[None]:
    """Create a folder or take an empty one; after an error in the block, remove what was written to it."""
    folder = to_path(folder, "folder")
    with writable_folder(folder):
        try:
            yield
        except BaseException:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise


def flush(path: PathLike) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
