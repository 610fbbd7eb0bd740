"""Documents from files and folders, read piece by piece."""

import json
import os
import random
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..paths import PathLike, to_paths

PIECE = 1 << 18  # characters read at a time, so that no document has to fit in memory
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Sources:
    """The files of a corpus in the order they are read.

    Attributes:
        files: `str` or `os.PathLike`, kept as `Path`s; text, code, or `.jsonl` with one document a line.
        text_field: the field of a `.jsonl` line that holds its text.
        skipped: files found in folders that are not UTF-8 text.
    """

    files: tuple[Path, ...]
    text_field: str = "text"
    skipped: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", to_paths(self.files, "files"))

    @classmethod
    def find(
        cls,
        paths: PathLike | Iterable[PathLike],
        text_field: str = "text",
        seed: int = 0,
        without: Collection[str] = (),
    ) -> "Sources":
        """Files as given, folders searched; shuffled, so that the end of the corpus is a sample of it.

        Hidden files, caches, installed packages and folders named in `without` are left out.

        Raises:
            ValueError: a path does not exist, a file named is not UTF-8 text, or there is no file at all.
        """
        files, skipped = [], 0
        for path in to_paths(paths, "paths"):
            if path.is_dir():
                found = sorted(_walk(path, SKIPPED_FOLDERS | set(without)))
                texts = [file for file in found if _is_text(file)]
                files, skipped = files + texts, skipped + len(found) - len(texts)
            elif not path.is_file():
                raise ValueError(f"there is no file or folder {path}")
            elif not _is_text(path):
                raise ValueError(f"{path} is not UTF-8 text")
            else:
                files.append(path)
        if not files:
            raise ValueError("no text files found")
        random.Random(seed).shuffle(files)
        return cls(tuple(files), text_field, skipped)

    def describe(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of every file: what the tokens depend on."""
        return [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in self.files]

    def documents(self) -> Iterator[Iterator[str]]:
        """Each document as its pieces.

        Raises:
            ValueError: a line of a `.jsonl` is not an object with a text.
        """
        for file in self.files:
            if file.suffix == ".jsonl":
                yield from self._lines(file)
            else:
                yield _pieces(file)

    def _lines(self, file: Path) -> Iterator[Iterator[str]]:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[self.text_field]
                except (ValueError, KeyError, TypeError, IndexError):
                    text = None
                if not isinstance(text, str):
                    raise ValueError(f"{file}, line {number}: not a JSON object with a text in {self.text_field!r}")
                yield iter([text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")])


def standard_library() -> Path:
    """Real text that is on every machine: the source of Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _walk(folder: Path, skipped: set[str]) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        yield from (Path(root) / name for name in files if not name.startswith("."))


def _is_text(file: Path) -> bool:
    try:
        return all("\0" not in piece for piece in _pieces(file))
    except UnicodeDecodeError:
        return False


def _pieces(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8", newline="") as text:
        while piece := text.read(PIECE):
            yield piece
