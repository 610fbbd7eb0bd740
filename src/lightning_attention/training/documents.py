"""The files of a corpus: which are read, in which order, and which are not."""

import os
import random
import stat
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..paths import PathLike, to_paths
from . import formats

SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Sources:
    """The files of a corpus in the order they are read.

    Attributes:
        files: `str` or `os.PathLike`, kept as `Path`s; see `formats.documents`.
        text_field: the field of a JSON line, or the column of a parquet file, that holds the text.
        skipped: how many files and folders were not taken from the folders searched, by reason.
    """

    files: tuple[Path, ...]
    text_field: str = "text"
    skipped: Mapping[str, int] = field(default_factory=dict)

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

        Links are followed, and a file or folder that is found twice is read once. Hidden files, caches, installed
        packages and folders named in `without` are left out.

        Raises:
            ValueError: a path does not exist, a file named is not UTF-8 text, a file is no regular file (a FIFO, a
                device), a compressed file is damaged, or there is no file at all.
            OSError: a folder or file cannot be read.
            ImportError: a package that reads the format of a file is missing.
        """
        search = _Search(text_field, SKIPPED_FOLDERS | set(without))
        for path in to_paths(paths, "paths"):
            search.add(path)
        if not search.files:
            raise ValueError("no text files found" + (f"; {reasons}" if (reasons := _line(search.skipped)) else ""))
        random.Random(seed).shuffle(search.files)
        return cls(tuple(search.files), text_field, dict(search.skipped))

    def describe(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of every file: what the tokens depend on."""
        return [(str(file.resolve()), (info := file.stat()).st_size, info.st_mtime_ns) for file in self.files]

    def describe_skipped(self) -> str:
        """One line that counts what was skipped by reason, empty if nothing was."""
        return _line(self.skipped)

    def documents(self) -> Iterator[Iterator[str]]:
        """Each document as its pieces.

        Raises:
            ValueError, ImportError: as `formats.documents`.
        """
        for file in self.files:
            yield from formats.documents(file, self.text_field)


def standard_library() -> Path:
    """Real text that is on every machine: the source of Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


class _Search:
    """Text files under paths, each once."""

    def __init__(self, text_field: str, excluded: Collection[str]):
        self.text_field, self.excluded = text_field, excluded
        self.files: list[Path] = []
        self.skipped: Counter[str] = Counter()
        self.read: set[tuple[int, int]] = set()  # device and inode, the same by whichever path

    def add(self, path: Path) -> None:
        if not path.exists():
            what = "is a dangling link" if path.is_symlink() else "does not exist"
            raise ValueError(f"there is no file or folder {path}: it {what}")
        if path.is_dir():
            self._add_folder(path)
        elif not self._add_file(path):
            raise ValueError(f"{path} is not UTF-8 text")

    def _add_folder(self, folder: Path) -> None:
        if self._is_read(folder):
            return
        self.read.add(_identity(folder))
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = Path(entry)
            if entry.name.startswith("."):
                self.skipped["hidden"] += 1
            elif not path.exists():
                self.skipped["dangling links"] += 1
            elif not path.is_dir():
                if not self._add_file(path):
                    self.skipped["not UTF-8 text"] += 1
            elif entry.name in self.excluded:
                self.skipped["caches, packages and the like"] += 1
            else:
                self._add_folder(path)

    def _add_file(self, file: Path) -> bool:
        """False if it is not text."""
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError(f"{file} is no regular file but a FIFO, socket or device: copy what it gives to a file")
        if not self._is_read(file):
            if not formats.is_text(file, self.text_field):
                return False
            self.read.add(_identity(file))
            self.files.append(file)
        return True

    def _is_read(self, path: Path) -> bool:
        if is_read := _identity(path) in self.read:
            self.skipped["found twice"] += 1
        return is_read


def _identity(path: Path) -> tuple[int, int]:
    information = path.stat()
    return information.st_dev, information.st_ino


def _line(skipped: Mapping[str, int]) -> str:
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    return f"skipped files and folders: {counts}" if counts else ""
