"""Commands in forked processes, a few milliseconds each: the parent has imported all modules.

As a script this is the parent: it reads one request per line and prints the exit code, None after a timeout.
"""

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """Command to run; a stream is a path to open, or None for a closed stream."""

    arguments: list[str]
    folder: str
    stdin: str | None = os.devnull
    stdout: str | None = os.devnull
    stderr: str | None = os.devnull
    environment: dict[str, str] = field(default_factory=dict)
    timeout: float = 30.0
    max_file_bytes: int = resource.RLIM_INFINITY  # larger files fail, as on a full disk


class Forks:
    """Process whose forks run commands of `lightning-attention` or of `python -m benchmarks`."""

    def __init__(self, program: str = "lightning-attention") -> None:
        command = [sys.executable, __file__, program]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, request: Request) -> int | None:
        """Exit code of a command, negative for a signal; None after the timeout."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(asdict(request)), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        with self._server:
            self._server.wait(timeout=30)


@dataclass(frozen=True)
class Result:
    code: int | None
    out: str
    err: str


def run_command(forks: Forks, arguments: list[str], folder: Path, scratch: Path, **options: Any) -> Result:
    """Run a command in a folder; its output goes to files in `scratch`."""
    out, err = scratch / "stdout", scratch / "stderr"
    for stream in (out, err):
        stream.write_bytes(b"")
    streams: dict[str, Any] = {"stdout": str(out), "stderr": str(err)}
    code = forks.run(Request(arguments, str(folder), **streams | options))
    return Result(code, *(stream.read_text(errors="backslashreplace") for stream in (out, err)))


kept: list[Any] = []  # streams of the parent, which would close the descriptors of the fork if collected


def serve(program: str) -> None:
    from lightning_attention.cli import app, errors, main  # noqa: F401

    if program == "lightning-attention":
        from lightning_attention.inference import batch  # noqa: F401
        from lightning_attention.training import TrainingOptions  # noqa: F401

        commands, command = app.app, "info"
    else:
        sys.path.insert(0, str(Path(__file__).parents[2]))
        from benchmarks import decode_engine, decode_kernel, decode_model, op, plot, train  # noqa: F401
        from benchmarks.commands import app as commands

        main, command = partial(main, program, "benchmarks.commands"), "scaling"
    with redirect_stdout(StringIO()):
        app.run(commands, program, [command])  # imports what typer needs for a command
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if pid := os.fork():
            print(json.dumps(_wait(pid, request["timeout"])), flush=True)
        else:
            _become(request)
            os._exit(_exit_code(main))  # a normal exit would take a second


def _exit_code(main: Callable[[], None]) -> int:
    """Exit code of a process that runs `main`, as at the exit of Python."""
    code: object = 0
    try:
        main()
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        return 120
    return code if isinstance(code, int) else 0 if code is None else 1


def _become(request: dict[str, Any]) -> None:
    """Turn this fork into the process of a command."""
    kept.extend((sys.stdin, sys.stdout, sys.stderr))
    os.setsid()
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (request["max_file_bytes"],))
    names = {"stdin": os.O_RDONLY, "stdout": os.O_WRONLY | os.O_APPEND, "stderr": os.O_WRONLY | os.O_APPEND}
    opened = {name: None if request[name] is None else os.open(request[name], flags) for name, flags in names.items()}
    for descriptor, (name, source) in enumerate(opened.items()):
        stream = None
        if source is None:
            os.close(descriptor)
        else:
            os.dup2(source, descriptor)
            os.close(source)
            encoding = request["environment"].get("PYTHONIOENCODING", "utf-8")
            mode, errors = ("r", None) if name == "stdin" else ("w", "backslashreplace" if name == "stderr" else None)
            stream = os.fdopen(descriptor, mode, encoding=encoding, errors=errors)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = ["lightning-attention", *request["arguments"]]


def _wait(pid: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


if __name__ == "__main__":
    serve(sys.argv[1])
