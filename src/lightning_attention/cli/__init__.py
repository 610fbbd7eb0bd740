"""The command line: `lightning-attention train | generate | info | bench`."""

import sys

from ..extras import require


def main() -> None:
    """Run a command. What the user can mend is one line on stderr and exit code 2."""
    try:
        require("cli", "typer", "rich")
        _run()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, TypeError, ArithmeticError, OSError, ImportError, NotImplementedError) as error:
        _fail(" ".join(str(error).split()) or type(error).__name__)


def _run() -> None:
    from .app import app

    try:
        sys.exit(app(standalone_mode=False))
    except Exception as error:
        # A missing or unknown option. Depending on its version typer raises click's classes or its own copies of them.
        if message := getattr(error, "format_message", None):
            raise ValueError(message()) from error
        if type(error).__name__ == "Abort":
            raise KeyboardInterrupt from error
        raise


def _fail(message: str) -> None:
    print(f"lightning-attention: {message}", file=sys.stderr)
    sys.exit(2)
