"""The process of the server: its socket, its signals, and how it ends."""

import asyncio
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

CLOSING_SECONDS = 5  # for connections after the requests have ended


def bind(host: str, port: int) -> socket.socket:
    """Open a socket that listens.

    Args:
        host: name or address.
        port: port; 0 for any that is free.

    Raises:
        OSError: the host has no address, or the port is in use.

    Example:
        >>> from lightning_attention.serving import bind
        >>> with bind("127.0.0.1", 0) as opened:
        ...     port = opened.getsockname()[1]
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"host {host}: {error.strerror or error}") from error
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(2048)
    except OSError as error:
        opened.close()
        raise OSError(f"host {host}, port {port}: {error.strerror or error}") from error
    return opened


def serve(app: FastAPI, opened: socket.socket, *, drain_seconds: float = 30.0) -> int | None:
    """Serve an application until a signal ends it.

    The first SIGTERM or SIGINT drains: new requests get status 503, and those that run may end. A second one ends those
    that run with an error, and a third one the server at once.

    Args:
        app: see `create_app`.
        opened: socket that listens, see `bind`; it is closed.
        drain_seconds: time for the requests that run.

    Returns:
        The number of the signal that ended the server.
    """
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=CLOSING_SECONDS
    )
    server = Server(config, app, drain_seconds)
    try:
        server.run(sockets=[opened])
    finally:
        opened.close()
        app.state.service.close()
    return server.signal


class Server(uvicorn.Server):
    """Server that drains at the first signal, while it still answers new requests."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_seconds: float):
        super().__init__(config)
        self.signal: int | None = None
        self._service, self._drain_seconds = app.state.service, drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None = None) -> None:
        """Answer a signal."""
        if self._loop is None or self._service.is_hurried:
            self.should_exit = self.force_exit = True
        elif self.signal is not None:
            self._service.is_hurried = True
        else:
            self.signal = signal.Signals(sig)
            self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        try:
            await self._service.drain(self._drain_seconds)
        finally:
            self.should_exit = True
