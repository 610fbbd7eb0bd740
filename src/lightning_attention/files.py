"""Files that are replaced whole: a reader finds the old content or the new, whatever stops the writer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from .paths import PathLike, to_path


@contextmanager
def replacing(path: PathLike, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file to write the new content of `path`, which takes its place when the block ends without an error.

    The content is written beside `path`, flushed to the disk and renamed, and the folder is flushed too, so that not
    even a power cut leaves half of it. After an error nothing is left beside `path`. Text is UTF-8.

    Args:
        path: the file to replace or create; its folder must be there.
        mode: "w" for text, "wb" for bytes.

    Raises:
        OSError: it cannot be written; `path` is as it was.

        with replacing("settings.json") as file:
            json.dump(settings, file)
    """
    path = to_path(path, "path")
    aside = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        with aside.open(mode, encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else "") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with suppress(OSError):
            aside.unlink()
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise
    flush_folder(path.parent)


def write(path: PathLike, content: str | bytes) -> None:
    """Replace a file by one with this content, see `replacing`."""
    with replacing(path, "wb" if isinstance(content, bytes) else "w") as file:
        file.write(content)


@contextmanager
def writable_folder(folder: PathLike) -> Iterator[Path]:
    """Create a folder and try to write in it. After an error in the block, what was created and is empty is removed.

    Raises:
        OSError: it cannot be created, or nothing can be written in it.
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


def flush_folder(folder: PathLike) -> None:
    """Have the disk know the names in a folder: those of files that were created, renamed or removed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
