"""A server of the chat page whose answers a test writes, byte by byte."""

import base64
import hashlib
import json
import re
import select
import socket
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parents[2] / "src/lightning_attention/serving/page.html"
WAIT_SECONDS = 20  # longest wait for a test that has failed meanwhile
MODEL = {"id": "tiny", "object": "model", "parameters": 385_000_000, "state_bytes": 13_107_200, "max_length": None}


class Pause:
    """In a reply: wait for `ChatServer.proceed`."""


class Drop:
    """In a reply: close the connection in the middle of it."""


Part = bytes | type[Pause] | type[Drop]


class Reply(NamedTuple):
    parts: Iterable[Part]
    status: int = 200
    content_type: str = "text/event-stream"


class Request(NamedTuple):
    method: str
    path: str
    key: str | None  # of the Authorization header
    body: Any


def delta(text: str, **choice: Any) -> bytes:
    """An event with some text of an answer."""
    chosen = {"index": 0, "delta": {"content": text}, "finish_reason": None} | choice
    return event({"object": "chat.completion.chunk", "choices": [chosen], "usage": None})


def event(data: Any) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def end(prompt_tokens: int = 10, completion_tokens: int = 5, reason: str = "stop") -> bytes:
    """The last events of an answer."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    last = {"index": 0, "delta": {}, "finish_reason": reason}
    return event({"choices": [last]}) + event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"


def answer(text: str) -> Reply:
    return Reply([delta(text), end()])


def error(status: int, message: str) -> Reply:
    return Reply([json.dumps({"error": {"message": message}}).encode()], status, "application/json")


def page_policy(page: str) -> str:
    """Content-Security-Policy that allows the script and the style of the page, and its own origin."""

    def source(tag: str) -> str:
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"

    sources = f"script-src {source('script')}; style-src {source('style')}; connect-src 'self'; img-src data:"
    return f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class ChatServer:
    """Serves the page, a model, and `replies` to the requests for answers in their order."""

    def __init__(self) -> None:
        self.replies: deque[Reply] = deque()
        self.requests: list[Request] = []
        self.model: dict[str, Any] = dict(MODEL)
        self.key: str | None = None  # that requests need
        self.client_left = threading.Event()
        self._pauses = threading.Semaphore(0)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/"

    @property
    def chats(self) -> list[Request]:
        return [request for request in self.requests if request.path == "/v1/chat/completions"]

    def proceed(self, pauses: int = 1) -> None:
        self._pauses.release(pauses)

    @contextmanager
    def running(self) -> Iterator["ChatServer"]:
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.proceed(1000)
            self._http.shutdown()
            self._http.server_close()
            thread.join()

    def wait_for_proceed(self, client: socket.socket) -> None:
        """Wait for `proceed`.

        Raises:
            ConnectionError: the client is gone.
        """
        for _ in range(WAIT_SECONDS * 50):
            if self._pauses.acquire(timeout=0.02):
                return
            if select.select([client], [], [], 0)[0] and not client.recv(1, socket.MSG_PEEK):
                raise ConnectionError
        raise TimeoutError


def _handler_of(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.requests.append(Request("GET", self.path, self.headers["Authorization"], None))
            if self.path == "/":
                page = PAGE.read_text(encoding="utf-8")
                self._send(page.encode(), "text/html; charset=utf-8", policy=page_policy(page))
            elif self.path == "/v1/models" and self._has_key():
                self._send(json.dumps({"object": "list", "data": [server.model]}).encode(), "application/json")
            elif self.path != "/v1/models":
                self._send(b"{}", "application/json", status=404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(Request("POST", self.path, self.headers["Authorization"], body))
            if not self._has_key():
                return
            reply = server.replies.popleft()
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.content_type)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                for part in reply.parts:
                    if isinstance(part, bytes):
                        self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                    elif part is Pause:
                        server.wait_for_proceed(self.connection)
                    else:
                        self.close_connection = True
                        return
                self.wfile.write(b"0\r\n\r\n")
            except ConnectionError:
                self.close_connection = True
                server.client_left.set()

        def _has_key(self) -> bool:
            if server.key is None or self.headers["Authorization"] == f"Bearer {server.key}":
                return True
            self._send(b'{"error": {"message": "The API key is missing or wrong."}}', "application/json", status=401)
            return False

        def _send(self, body: bytes, content_type: str, status: int = 200, policy: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            if policy:
                self.send_header("Content-Security-Policy", policy)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
