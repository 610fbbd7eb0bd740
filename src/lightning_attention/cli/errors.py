"""Messages for errors of a command."""

import errno
import os
import sys
import traceback
from contextlib import suppress

TRACEBACK = "LIGHTNING_ATTENTION_TRACEBACK"
# Raised by the library for errors of the user; any other exception is a bug.
EXPECTED = ValueError, TypeError, FloatingPointError, OSError, ImportError, NotImplementedError, MemoryError
# In the RuntimeErrors of PyTorch's allocators and of CUDA's libraries.
NO_MEMORY = (
    "out of memory",
    "allocate memory",
    "not enough memory",
    "ALLOC_FAILED",
    "Storage size calculation overflowed",
)


def report(error: Exception, program: str) -> None:
    """Write an error as one line to standard error, after its traceback if LIGHTNING_ATTENTION_TRACEBACK=1."""
    with suppress(OSError):  # standard error is closed; the exit code remains
        if os.environ.get(TRACEBACK, "") not in ("", "0"):
            traceback.print_exception(error)
        print(f"{program}: {describe(error)}", file=sys.stderr, flush=True)


def describe(error: Exception) -> str:
    """Describe an error in one line; for a bug, with how to see the traceback."""
    # Missing or unknown options; some versions of typer raise copies of click's classes.
    to_message = getattr(error, "format_message", None)
    message = " ".join((to_message() if to_message else str(error)).split())
    if message and (to_message or isinstance(error, EXPECTED)):
        return message
    kind = type(error).__name__
    return f"unexpected {f'{kind}: {message}' if message else kind} (set {TRACEBACK}=1 for the traceback)"


def is_out_of_memory(error: Exception) -> bool:
    """True if memory of the CPU or a GPU was exhausted."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    )
