"""Lines of a run: on the console, and with the time in `train.log` of its folder."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

# Loggers whose records do not reach the root logger.
APART = ("transformers", "torch")


class RunLog:
    """Console of a run; within `kept_in` its lines also go to a file.

    Args:
        console: where lines are printed, without markup and never wrapped.
    """

    def __init__(self, console: Console):
        self.console, self.file = console, None

    def print(self, text: str) -> None:
        """Print a line, or several.

        Raises:
            OSError: the console or the file cannot be written.
        """
        self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
        self.write(text)

    def write(self, text: str) -> None:
        """Append lines to the file alone, each with the time."""
        if self.file is not None:
            now = datetime.now().astimezone().isoformat(" ", "seconds")
            with self.file.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(f"{now}  {line}\n" for line in text.splitlines()))

    @contextmanager
    def kept_in(self, file: Path) -> Iterator[None]:
        """Append to a file what the run prints in the block, warnings, and the error that ends the block.

        Nothing is appended to a file that standard output goes to already.

        Raises:
            OSError: the file cannot be written.
        """
        with file.open("a", encoding="utf-8"):  # an error now, not at the first line
            pass
        self.file = None if _is_standard_output(file) else file
        try:
            with _warnings_to(self._write_warning):
                yield
        except BaseException as error:
            with suppress(OSError):
                kind = "error: " if isinstance(error, Exception) else ""  # a signal is none
                self.write(f"{kind}{' '.join(str(error).split()) or type(error).__name__}")
            raise
        finally:
            self.file = None

    def _write_warning(self, text: str) -> None:
        with suppress(OSError):  # the next line of the run raises it
            self.write(f"warning: {' '.join(text.split())}")


class _Records(logging.Handler):
    """Pass the text of warnings and errors on."""

    def __init__(self, write: Any):
        super().__init__(logging.WARNING)
        self._write_text = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write_text(record.getMessage())
        except Exception:
            self.handleError(record)


@contextmanager
def _warnings_to(write: Any) -> Iterator[None]:
    """Pass warnings on, of the module `warnings` and of loggers; they are shown as before too."""
    show = warnings.showwarning

    def show_and_write(message: Any, category: Any, *args: Any, **kwargs: Any) -> None:
        show(message, category, *args, **kwargs)
        write(f"{category.__name__}: {message}")

    handlers: list[tuple[logging.Logger, logging.Handler]] = []
    root, records = logging.getLogger(), _Records(write)
    if not root.handlers and logging.lastResort is not None:  # it shows warnings while there is no handler
        handlers.append((root, logging.lastResort))
    apart = [logger for name in APART if not (logger := logging.getLogger(name)).propagate]
    handlers += [(logger, records) for logger in (root, *apart)]
    warnings.showwarning = show_and_write
    for logger, handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        warnings.showwarning = show
        for logger, handler in handlers:
            logger.removeHandler(handler)


def _is_standard_output(file: Path) -> bool:
    with suppress(OSError, ValueError, AttributeError):  # standard output may be closed, or no file
        return os.path.samestat(os.fstat(sys.stdout.fileno()), file.stat())
    return False
