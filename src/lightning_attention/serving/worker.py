"""The thread that steps the engine, and the way of its outputs to the handlers of requests."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from threading import Condition, Thread

from ..inference import Engine, Output
from .choices import Choice, Piece
from .metrics import Metrics

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0  # after an exception that the engine does not contain


class Answer:
    """Choices of a request, and their pieces as they come.

    Args:
        worker: to which the choices are submitted.
        choices: numbered from 0.
    """

    def __init__(self, worker: "Worker", choices: list[Choice]):
        self.choices = choices
        self._worker = worker
        self._queue: asyncio.Queue[Piece] = asyncio.Queue()
        self._open = {choice.index: choice for choice in choices}

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Yield the pieces that have come, one for each choice, until every choice is complete or has failed."""
        while self._open:
            found = [await self._queue.get()]
            while not self._queue.empty():
                found.append(self._queue.get_nowait())
            by_choice: dict[int, list[Piece]] = {}
            for piece in found:
                by_choice.setdefault(piece.index, []).append(piece)
                if piece.is_last:
                    self._open.pop(piece.index, None)
            yield [Piece.joined(pieces) for pieces in by_choice.values()]

    def put(self, piece: Piece) -> None:
        """Add a piece, in the event loop."""
        self._queue.put_nowait(piece)

    def close(self) -> None:
        """Cancel the choices that are not complete."""
        for choice in self._open.values():
            self._worker.cancel(choice)
        self._open = {}


class Worker:
    """Thread that steps an engine while there is work, and waits otherwise.

    Args:
        engine: no other thread steps it.
        metrics: counts tokens and times.
    """

    def __init__(self, engine: Engine, metrics: Metrics):
        self.engine = engine
        self._metrics = metrics
        self._condition = Condition()  # guards the next five attributes
        self._active: dict[int, tuple[Choice, Answer]] = {}
        self._num_reserved = 0
        self._num_submitting = 0  # the engine may be faster than `submit`, which takes long for a long prompt
        self._early: list[Output] = []  # outputs of choices that are not in `_active` yet
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    @property
    def num_active(self) -> int:
        """Number of choices that are prepared, wait or run."""
        return self._num_reserved

    def start(self) -> None:
        """Start the thread; the event loop that runs gets the pieces."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Cancel all choices, and end the thread."""
        with self._condition:
            self._is_closed = True
            for request in self._active:
                self.engine.cancel(request)
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()

    def reserve(self, count: int, limit: int) -> bool:
        """Reserve places for choices, until they end; False if there would be more than `limit`."""
        with self._condition:
            if self._num_reserved + count > limit:
                return False
            self._num_reserved += count
            return True

    def release(self, count: int) -> None:
        """Free the places of choices that are not submitted."""
        with self._condition:
            self._num_reserved -= count

    def submit(self, choice: Choice, answer: Answer) -> None:
        """Submit a choice that has a place, from any thread; its pieces go to the answer.

        Raises:
            TypeError, ValueError: see `Engine.submit`.
            RuntimeError: the thread has been stopped.
        """
        with self._condition:
            if self._is_closed:
                raise RuntimeError("the server has stopped")
            self._num_submitting += 1
        request = -1
        try:
            request = self.engine.submit(
                choice.prompt, choice.options, is_finished=choice.is_finished, logprobs=choice.logprobs
            )
        finally:
            with self._condition:
                self._num_submitting -= 1
                if request >= 0:
                    choice.request = request
                    self._active[request] = choice, answer
                if self._is_closed:
                    self.engine.cancel(request)
                self._condition.notify()

    def cancel(self, choice: Choice) -> None:
        """Cancel a choice, from any thread."""
        with self._condition:
            self.engine.cancel(choice.request)
            self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._has_work() or (self._is_closed and not self._num_submitting))
                if not self._has_work():
                    return
            try:
                self._deliver(self.engine.step())
            except Exception as error:  # of the engine itself: it contains those of requests
                log.error("a step of the engine failed", exc_info=error)
                self._fail_all()

    def _has_work(self) -> bool:
        return self.engine.has_work or bool(self._early)

    def _deliver(self, outputs: list[Output]) -> None:
        """Give the pieces of a step to the event loop, at once."""
        pieces: list[tuple[Answer, Piece]] = []
        with self._condition:
            outputs, self._early = [*self._early, *outputs], []
        for output in outputs:
            with self._condition:
                found = self._active.get(output.request)
                if found is None and self._num_submitting:
                    self._early.append(output)
                if found is not None and output.finish_reason is not None:
                    del self._active[output.request]
                    self._num_reserved -= 1
            if found is not None:
                choice, answer = found
                piece = choice.advance(output)
                self._metrics.count(choice, piece)
                pieces.append((answer, piece))
        self._send(pieces)

    def _fail_all(self) -> None:
        with self._condition:
            failed = list(self._active.values())
            self._active.clear()
            self._num_reserved -= len(failed)
            for choice, _ in failed:
                self.engine.cancel(choice.request)
        self._send([(answer, Piece(choice.index, failure="failed")) for choice, answer in failed])
        with self._condition:
            self._condition.wait_for(lambda: self._is_closed, RETRY_SECONDS)

    def _send(self, pieces: list[tuple[Answer, Piece]]) -> None:
        def put() -> None:
            for answer, piece in pieces:
                answer.put(piece)

        if pieces and self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads
                self._loop.call_soon_threadsafe(put)
