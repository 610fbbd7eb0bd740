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
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        _fail(" ".join(str(error).split()) or type(error).__name__)


def _run() -> None:
    from click import Abort, ClickException

    from .app import app

    try:
        app(standalone_mode=False)
    except ClickException as error:  # a missing or unknown option
        raise ValueError(error.format_message()) from error
    except Abort as error:
        raise KeyboardInterrupt from error


def _fail(message: str) -> None:
    print(f"lightning-attention: {message}", file=sys.stderr)
    sys.exit(2)
