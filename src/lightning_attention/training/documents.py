"""Source files of a corpus: search, order and skipped files."""

import os
import random
import stat
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..paths import PathLike, to_paths
from . import formats

NOT_TEXT = "not UTF-8 text"
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Sources:
    """Source files of a corpus, in reading order.

    Attributes:
        files: `str` or `os.PathLike`, kept as `Path`s; see `formats.documents`.
        text_field: field of a JSON line, or column of a parquet file, with the text or the messages; None for `text`,
            or `messages`.
        skipped: number of skipped files and folders by reason.
        optional: files to skip if they turn out not to be text; any other such file is an error.
    """

    files: tuple[Path, ...]
    text_field: str | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    optional: frozenset[Path] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", to_paths(self.files, "files"))

    @classmethod
    def find(
        cls,
        paths: PathLike | Iterable[PathLike],
        text_field: str | None = None,
        seed: int = 0,
        without: Collection[str] = (),
    ) -> "Sources":
        """Collect the given files and the text files in the given folders, in an order shuffled by `seed`.

        Shuffling makes the held-out end of the corpus a sample of all files. Links are followed; a file or folder found
        twice is read once. Hidden files, caches, installed packages and folders named in `without` are skipped.

        The first 64 KiB of a file tell whether it is text. If the rest is not, `Corpus.prepare` skips a file of a
        folder, and raises an error for a given file.

        Raises:
            ValueError: a path does not exist, a given file is not UTF-8 text, a file is not a regular file (a FIFO, a
                device), the start of a compressed file is damaged, or no file is found.
            OSError: a folder or file cannot be read.
            ImportError: a package for the format of a file is missing.

        Example:
            >>> from lightning_attention.training.documents import Sources
            >>> sources = Sources.find(["texts", "more.jsonl.gz"])
        """
        search = _Search(text_field, SKIPPED_FOLDERS | set(without))
        for path in to_paths(paths, "paths"):
            search.add(path)
        if not search.files:
            raise ValueError("no text files found" + (f"; {reasons}" if (reasons := _summary(search.skipped)) else ""))
        random.Random(seed).shuffle(search.files)
        return cls(tuple(search.files), text_field, dict(search.skipped), frozenset(search.optional.values()))

    def describe(self) -> list[tuple[str, int, int]]:
        """Path, size and modification time of every file."""
        return [(str(file.resolve()), (info := file.stat()).st_size, info.st_mtime_ns) for file in self.files]

    def describe_skipped(self, num_excluded: int = 0) -> str:
        """Count the skipped files and folders by reason, in one line; empty if there are none.

        Args:
            num_excluded: number of `optional` files that turned out not to be text.
        """
        return _summary(Counter(self.skipped) + Counter({NOT_TEXT: num_excluded}))

    def documents(self) -> Iterator[Iterator[str]]:
        """Read all documents, each as an iterator of consecutive parts of its text, or of contents of its messages.

        Raises:
            ValueError, ImportError: as `formats.documents`.
        """
        return (iter(document) for _, document in self.documents_from(Place(0, 0)))

    def documents_from(
        self, start: "Place", excluded: Collection[int] = (), count: formats.Count = bool
    ) -> Iterator[tuple["Place", formats.Document]]:
        """Read documents from a place on, each with the place after it.

        Args:
            start: where to start; earlier documents of its file are read again, earlier files are not.
            excluded: indices of files to leave out.
            count: called with the number of bytes that were read, as they are read.

        Raises:
            ValueError, ImportError: as `formats.documents`.
        """
        for index in range(start.file, len(self.files)):
            if index in excluded:
                continue
            finished = start.document if index == start.file else 0
            documents = formats.documents(self.files[index], self.text_field, count)
            yield from ((Place(index, n), x) for n, x in enumerate(documents, start=1) if n > finished)


class Place(NamedTuple):
    """Place between two documents of the sources.

    Attributes:
        file: index of a source file.
        document: number of documents of the file before the place.
    """

    file: int
    document: int


def standard_library() -> Path:
    """Folder of Python's standard library, text that every machine has."""
    return Path(sysconfig.get_path("stdlib"))


class _Search:
    """Search for text files; each is found once."""

    def __init__(self, text_field: str | None, excluded: Collection[str]):
        self.text_field, self.excluded = text_field, excluded
        self.files: list[Path] = []
        self.optional: dict[tuple[int, int], Path] = {}  # files in folders, by device and inode
        self.skipped: Counter[str] = Counter()
        self.found: set[tuple[int, int]] = set()  # device and inode

    def add(self, path: Path) -> None:
        if not path.exists():
            what = "is a dangling link" if path.is_symlink() else "does not exist"
            raise ValueError(f"there is no file or folder {path}: it {what}")
        if path.is_dir():
            self._add_folder(path)
        elif self._add_file(path):
            self.optional.pop(_identity(path.stat()), None)
        else:
            raise ValueError(f"{path} is not UTF-8 text")

    def _add_folder(self, folder: Path) -> None:
        identity = _identity(folder.stat())
        if self._is_found(identity):
            return
        self.found.add(identity)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                self.skipped["hidden"] += 1
            elif not os.path.exists(entry):
                self.skipped["dangling links"] += 1
            elif not entry.is_dir():
                if not self._add_file(Path(entry)):
                    self.skipped[NOT_TEXT] += 1
            elif entry.name in self.excluded:
                self.skipped["caches, packages and the like"] += 1
            else:
                self._add_folder(Path(entry))

    def _add_file(self, file: Path) -> bool:
        """Add a file; return False if it is not text."""
        information = file.stat()
        if not stat.S_ISREG(information.st_mode):
            raise ValueError(f"{file} is not a regular file but a FIFO, socket or device: copy its content to a file")
        identity = _identity(information)
        if not self._is_found(identity):
            if not formats.may_be_text(file, self.text_field):
                return False
            self.found.add(identity)
            self.optional[identity] = file
            self.files.append(file)
        return True

    def _is_found(self, identity: tuple[int, int]) -> bool:
        if is_found := identity in self.found:
            self.skipped["found twice"] += 1
        return is_found


def _identity(information: os.stat_result) -> tuple[int, int]:
    return information.st_dev, information.st_ino


def _summary(skipped: Mapping[str, int]) -> str:
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    return f"skipped files and folders: {counts}" if counts else ""
