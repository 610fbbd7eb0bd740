"""Checks of every request before its route: host, key, size; and counts."""

import hmac
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .service import Service

ROUTES = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
OPEN = ("/", "/health")  # without a key


class Counting:
    """Count requests, and refuse them once the server drains."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 500

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.service.in_flight += 1
        try:
            if self.service.is_draining:
                error = ApiError(503, "the server is about to stop", headers={"Connection": "close"})
                await error.response()(scope, receive, observed)
            else:
                await self.app(scope, receive, observed)
        finally:
            self.service.in_flight -= 1
            self.service.metrics.requests.labels(_route(scope["path"]), str(status)).inc()


class HostCheck:
    """Refuse requests for other hosts, which a page of another site can send by DNS rebinding.

    Args:
        app: the application.
        hosts: accepted names, without ports; None for all.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None):
        self.app, self.hosts = app, None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.hosts is not None:
            given = Headers(scope=scope).get("host", "")
            if _host_name(given) not in self.hosts:
                error = ApiError(400, "the Host header names another server", code="invalid_host")
                return await error.response()(scope, receive, send)
        await self.app(scope, receive, send)


class KeyCheck:
    """Refuse requests without the key, except for open routes.

    Args:
        app: the application.
        key: the key; None for no check.
    """

    def __init__(self, app: ASGIApp, key: str | None):
        self.app, self.key = app, None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.key is not None and scope["path"] not in OPEN:
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(given.strip().encode(), self.key)
            if scheme.lower() != "bearer" or not is_right:
                message = "this server needs its API key: send Authorization: Bearer KEY"
                headers = {"WWW-Authenticate": "Bearer"}
                error = ApiError(401, message, code="invalid_api_key", headers=headers)
                return await error.response()(scope, receive, send)
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuse bodies beyond a size, announced or not.

    Args:
        app: the application.
        limit: bytes, at most.
    """

    def __init__(self, app: ASGIApp, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self.limit:
            return await self._error().response()(scope, receive, send)
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise self._error()
            return message

        await self.app(scope, limited, send)

    def _error(self) -> ApiError:
        return ApiError(413, f"the body exceeds {self.limit} bytes", headers={"Connection": "close"})


def _route(path: str) -> str:
    """Route of a path, for metrics: paths that clients make up do not become labels."""
    return "/v1/models" if path.startswith("/v1/models/") else path if path in ROUTES else "other"


def _host_name(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
