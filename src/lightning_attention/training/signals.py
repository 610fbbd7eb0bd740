"""Signals to a training run: the first asks for a checkpoint and the end, a second ends the process at once."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch.distributed as dist

from .processes import LOST, is_started_by_torchrun

SIGNALS = signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])
# Seconds in which torchrun forwards a signal that the terminal has sent to its processes too.
FORWARDED = 3.0
# Seconds, beyond two steps, after which a signalled process that waits for a lost one is ended.
PATIENCE = 5.0


class Interrupted(KeyboardInterrupt):
    """Raised when a signal ends the run; the message says when, and how to resume.

    Attributes:
        signal: number of the signal; the exit code of a command is 128 more.
    """

    def __init__(self, number: int, when: str = "outside of the training loop"):
        super().__init__(f"stopped by {signal.Signals(number).name} {when}")
        self.signal = signal.Signals(number)


class StopRequest:
    """Request by a signal to end the run.

    Attributes:
        signal: number of the first signal to this process, 0 for none.
        answered: number of the signal that ends the run, to this process or another; 0 for none.
        is_deferred: wait for the end of the step, instead of raising `Interrupted` at once.
        step_seconds: duration of a step.
    """

    def __init__(self) -> None:
        self.signal = self.answered = 0
        self.is_deferred = False
        self.step_seconds = 5.0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer the answer to a signal to the end of a step."""
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred = False

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Answer a signal in the main thread."""
        if not (self.is_deferred or self.answered):
            self.answered = number
            raise Interrupted(number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Handle signals in the main thread, except ignored ones, such as SIGHUP under nohup.

    A thread watches for signals, because handlers do not run while the main thread waits in a collective.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, request.handle) for number in handled}
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reader, request), daemon=True)
    thread.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)
        thread.join()
        os.close(reader)


def _watch(reader: int, request: StopRequest) -> None:
    """Record the first signal; end the process at the second, or if no step ends in time."""
    first = 0.0
    while True:
        deadline = first + PATIENCE + 2 * request.step_seconds
        is_limited = request.signal and not request.answered and dist.is_initialized()
        timeout = max(deadline - time.monotonic(), 0) if is_limited else None
        if not select.select([reader], [], [], timeout)[0]:
            if not request.answered:
                name = signal.Signals(request.signal).name
                _end(request.signal, f"ended by {name}, as torchrun does when {LOST}")
            continue
        number = os.read(reader, 1)
        if not number:  # the writer is closed
            return
        if number[0] not in SIGNALS:
            continue
        if not request.signal:
            request.signal, first = number[0], time.monotonic()
        elif not is_started_by_torchrun() or time.monotonic() - first > FORWARDED:
            _end(number[0], f"ended by a second {signal.Signals(number[0]).name}, without a checkpoint of this step")


def _end(number: int, message: str) -> None:
    print(f"lightning-attention: {message}", file=sys.stderr, flush=True)
    os._exit(128 + number)
