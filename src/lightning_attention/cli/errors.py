"""What the user is told of an error."""

import errno
import os
import sys
import traceback
from contextlib import suppress

TRACEBACK = "LIGHTNING_ATTENTION_TRACEBACK"
# What the library raises for what a user can mend; any other exception is a mistake of ours.
EXPECTED = ValueError, TypeError, FloatingPointError, OSError, ImportError, NotImplementedError, MemoryError
# Words of PyTorch's allocators and of CUDA's libraries, which raise RuntimeError.
NO_MEMORY = (
    "out of memory",
    "allocate memory",
    "not enough memory",
    "ALLOC_FAILED",
    "Storage size calculation overflowed",
)


def report(error: Exception, program: str) -> None:
    """Write an error as one line to standard error, after its traceback if LIGHTNING_ATTENTION_TRACEBACK=1."""
    with suppress(OSError):  # nobody reads standard error; the exit code tells
        if os.environ.get(TRACEBACK, "") not in ("", "0"):
            traceback.print_exception(error)
        print(f"{program}: {describe(error)}", file=sys.stderr, flush=True)


def describe(error: Exception) -> str:
    """An error in one line; for a mistake of ours, also how to see its traceback."""
    # A missing or unknown option. Depending on its version typer raises click's classes or its own copies of them.
    to_message = getattr(error, "format_message", None)
    message = " ".join((to_message() if to_message else str(error)).split())
    if message and (to_message or isinstance(error, EXPECTED)):
        return message
    kind = type(error).__name__
    return f"unexpected {f'{kind}: {message}' if message else kind} (set {TRACEBACK}=1 for the traceback)"


def is_out_of_memory(error: Exception) -> bool:
    """True if memory of the CPU or a GPU did not suffice."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    )
