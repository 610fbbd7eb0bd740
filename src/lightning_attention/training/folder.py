"""Output folder of a run: lock, checksums, and choice of the checkpoint to resume from."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import writable_folder
from ..models.card import README
from ..models.checkpoint import checkpoints
from .options import FILE

LOCK, CORPUS, METRICS, PLOT = ".lock", "corpus", "metrics.jsonl", "loss.png"
LOG = "train.log"
TRACKED = "runs"  # where TensorBoard's callback writes
VALIDATION = "validation"  # the corpus of the text to evaluate on
BEST = "best"  # link to the checkpoint with the lowest held-out loss
CHECKSUMS = "checksums.sha256"


@dataclass
class RunFolder:
    """Output folder of a run.

    Attributes:
        path: the folder.
        is_started: True after the first step; from then on a failure leaves the folder as it is.
    """

    path: Path
    is_started: bool = False

    @property
    def has_run(self) -> bool:
        return (self.path / FILE).exists()

    def check_free(self) -> None:
        """Check that a new run would not mix its files with others.

        Raises:
            ValueError: the folder holds a run or a model.
        """
        if self.has_run or checkpoints(self.path):
            raise ValueError(f"{self.path} holds a run already: resume it, or choose another output")
        for name in ("config.json", METRICS, PLOT, BEST):
            if os.path.lexists(self.path / name):
                raise ValueError(f"{self.path} holds {name}, but no run: choose another output")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder; remove what the run has created if it fails before its first step.

        A folder that existed stays, with its content.

        Raises:
            ValueError: another process has locked the folder.
            OSError: the folder cannot be created, or is not writable.
        """
        had_lock = (self.path / LOCK).exists()
        with writable_folder(self.path):
            lock = FileLock(self.path / LOCK, blocking=False)
            try:
                lock.acquire()
            except Timeout:
                message = f"another process trains in {self.path}: wait for its end, or choose another output"
                raise ValueError(message) from None
            before = self._of_this_run()
            if not had_lock:
                del before[self.path / LOCK]
            try:
                for leftover in self.path.glob("*.unfinished"):  # of a run that was killed
                    leftover.unlink()
                yield
            except BaseException:
                if not self.is_started:
                    self._restore(before)
                raise
            finally:
                lock.release()

    def _of_this_run(self) -> dict[Path, int]:
        """Paths that a run creates or appends to before its first step, and their sizes."""
        paths = [self.path / name for name in (LOCK, CORPUS, VALIDATION, LOG, TRACKED)]
        return {path: path.stat().st_size for path in (*paths, *self.path.glob(f"{TRACKED}/*")) if path.exists()}

    def _restore(self, before: dict[Path, int]) -> None:
        """Remove the paths that were not there before, and what was appended to the log."""
        for path in self._of_this_run().keys() - before.keys():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()
        if (log := self.path / LOG) in before:
            with suppress(OSError):
                os.truncate(log, before[log])


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file in a folder, in the format of `sha256sum --check`; not of the model card, which
    users may edit."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / README)
    lines = [f"{_sha256(path)}  {path.relative_to(folder)}\n" for path in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def check_checksums(folder: Path) -> None:
    """Compare the files of a folder with its checksums; a folder without checksums passes.

    Raises:
        ValueError: a file is missing or differs.
    """
    list_ = folder / CHECKSUMS
    if not list_.exists():
        return
    for line in list_.read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if _sha256(path) != expected:
            raise ValueError(f"{name} is not what was written")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def last_intact(folder: Path, check: Callable[[Path], None], report: Callable[[str], None]) -> Path | None:
    """Find the last intact checkpoint; rename and report damaged ones after it.

    Args:
        folder: output folder of the run.
        check: raises a ValueError or OSError if a run cannot resume from a checkpoint.
        report: called with a line for every damaged checkpoint.

    Returns:
        The checkpoint; None if the run has saved none.

    Raises:
        ValueError: there are checkpoints, and none is intact.
    """
    damaged: list[tuple[Path, Exception]] = []
    for checkpoint in reversed(checkpoints(folder)):
        try:
            check_checksums(checkpoint)
            check(checkpoint)
        except (ValueError, OSError) as error:
            damaged.append((checkpoint, error))
            continue
        for path, error in damaged:
            renamed = _set_aside(path)
            report(f"{path} is damaged ({error}): it is now {renamed.name}, and {checkpoint.name} is taken")
        return checkpoint
    if damaged:
        reasons = "; ".join(f"{path.name}: {error}" for path, error in damaged)
        raise ValueError(f"no checkpoint in {folder} is intact: {reasons}")
    return None


def _set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint; the resumed run saves that step again."""
    for number in range(1, 1000):
        path = checkpoint.with_name(f"{checkpoint.name}.damaged" + (f"-{number}" if number > 1 else ""))
        if not path.exists():
            os.replace(checkpoint, path)
            return path
    raise OSError(f"there are too many damaged checkpoints in {checkpoint.parent}")
