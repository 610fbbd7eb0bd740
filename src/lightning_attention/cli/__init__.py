"""The command line: `lightning-attention train | push | generate | serve | info, ...`."""

import os
import sys
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper

from ..extras import require

INTERRUPTED, BROKEN_PIPE, FAILED = 130, 1, 2


def main(program: str = "lightning-attention", commands: str = "lightning_attention.cli.app") -> None:
    """Run the command in `sys.argv`, and exit with its code.

    An error is one line on standard error and code 2; LIGHTNING_ATTENTION_TRACEBACK=1 in the environment adds the
    traceback before it. Ctrl-C exits with code 130. If the reader of standard output has left, as in `| head`, the
    command exits with code 1 and no message.

    Args:
        program: name at the start of error lines.
        commands: module whose `app` defines the commands.
    """
    code, failure = 0, None
    try:
        _prepare_streams()
        require("cli", "typer", "rich")
        from .app import run

        code = run(import_module(commands).app, program, sys.argv[1:])
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as exit:
        code = exit.code
    except Exception as error:
        failure = error
    # Or Python prints a traceback at exit. A failed flush is also the cause of an earlier error.
    failure = _flush_output() or failure
    if isinstance(failure, BrokenPipeError):
        code = BROKEN_PIPE
    elif failure is not None:
        from .errors import report

        report(failure, program)
        code = FAILED
    sys.exit(code)


def _prepare_streams() -> None:
    """Use UTF-8 in every locale, and open closed streams, whose descriptors the next file would take.

    Raises:
        OSError: standard output is closed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        raise OSError("standard output is closed: send it to /dev/null if it is not wanted")
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


def _flush_output() -> OSError | None:
    """Flush standard output; on an error discard the output and return the error."""
    if sys.stdout is None:
        return None
    try:
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return error
        return OSError(error.errno, error.strerror, "standard output")
    return None
