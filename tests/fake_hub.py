"""The Hugging Face Hub on localhost: the routes that huggingface_hub needs for pushes and downloads of models."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER, USER = "hf_token_of_a_writer", "hf_token_of_a_reader", "someone"
MODEL = r"/api/models/(?P<name>[^/]+/[^/]+)"
MISSING = {"X-Error-Code": "RepoNotFound"}


@dataclass
class Repository:
    """A repository: its files by their paths."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"


@dataclass
class Answer:
    """An answer to a request: JSON, or the content of a file."""

    status: int = 200
    content: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class FakeHub:
    """A server and its state.

    Attributes:
        repositories: by their names.
        blobs: large files, by SHA-256.
        requests: method and path of every request.
        refused: expression of the requests that are answered with 403.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refused: str | None = None

    def environment(self, folder: Path, token: str | None = WRITER) -> dict[str, str]:
        """Variables of a process that uses this Hub, and keeps its files in `folder`."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
        others = {name: x for name, x in os.environ.items() if not name.startswith("HF_")}
        return others | own | ({} if token is None else {"HF_TOKEN": token})

    def answer(self, request: str, token: str, body: bytes) -> Answer:
        self.requests.append(request)
        if self.refused and re.search(self.refused, request):
            return Answer(403, {"error": "You are not allowed to do that"})
        if request == "POST /api/validate-yaml":
            is_known = "license: unknown-license" not in json.loads(body)["content"]
            errors = [] if is_known else [{"message": '"license" must be one of [apache-2.0, ...]'}]
            return Answer(200 if is_known else 400, {"errors": errors, "warnings": []})
        if token not in (WRITER, READER):
            return Answer(401, {"error": "Invalid credentials in Authorization header"})
        for route, action in ROUTES.items():
            if found := re.fullmatch(route, request):
                return action(self, body, token, **found.groupdict())
        return Answer(404, {"error": f"no such route: {request}"})

    def whoami(self, body: bytes, token: str) -> Answer:
        role = "write" if token == WRITER else "read"
        return Answer(content={"name": USER, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create(self, body: bytes, token: str) -> Answer:
        given = json.loads(body)
        name = f"{given.get('organization') or USER}/{given['name']}"
        is_new = name not in self.repositories
        is_private = given.get("visibility") == "private" or bool(given.get("private"))  # by version of huggingface_hub
        self.repositories.setdefault(name, Repository(private=is_private))
        return Answer(200 if is_new else 409, {"url": f"{self.url}/{name}", "error": "" if is_new else "exists"})

    def information(self, body: bytes, token: str, name: str) -> Answer:
        if name not in self.repositories:
            return Answer(404, {"error": "Repository not found"}, MISSING)
        found = self.repositories[name]
        siblings = [{"rfilename": path} for path in found.files]
        return Answer(content={"id": name, "private": found.private, "sha": found.sha, "siblings": siblings})

    def tree(self, body: bytes, token: str, name: str) -> Answer:
        files = self.repositories[name].files
        return Answer(content=[{"type": "file", "path": x, "size": len(y), "oid": _oid(y)} for x, y in files.items()])

    def preupload(self, body: bytes, token: str, name: str) -> Answer:
        modes = {True: "lfs", False: "regular"}
        paths = [file["path"] for file in json.loads(body)["files"]]
        files = [{"path": x, "uploadMode": modes[x.endswith(".safetensors")], "shouldIgnore": False} for x in paths]
        return Answer(content={"files": files})

    def batch(self, body: bytes, token: str, name: str) -> Answer:
        def upload(x: dict[str, Any]) -> dict[str, Any]:
            return x | {"actions": {"upload": {"href": f"{self.url}/blobs/{x['oid']}"}}}

        return Answer(content={"transfer": "basic", "objects": [upload(x) for x in json.loads(body)["objects"]]})

    def blob(self, body: bytes, token: str, oid: str) -> Answer:
        assert hashlib.sha256(body).hexdigest() == oid
        self.blobs[oid] = body
        return Answer()

    def commit(self, body: bytes, token: str, name: str) -> Answer:
        repository = self.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commits += 1
        url = f"{self.url}/{name}/commit/{repository.sha}"
        return Answer(content={"commitUrl": url, "commitOid": repository.sha, "pullRequestUrl": None})

    def resolve(self, body: bytes, token: str, name: str, path: str) -> Answer:
        repository = self.repositories.get(name)
        if repository is None:
            return Answer(404, {"error": "Repository not found"}, MISSING)
        headers = {"X-Repo-Commit": repository.sha}
        if path not in repository.files:
            return Answer(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
        content = repository.files[path]
        return Answer(content=content, headers=headers | {"ETag": f'"{_oid(content)}"'})


ROUTES = {
    "GET /api/whoami-v2": FakeHub.whoami,
    "POST /api/repos/create": FakeHub.create,
    f"GET {MODEL}(/revision/.+)?": FakeHub.information,
    f"GET {MODEL}/tree/.+": FakeHub.tree,
    f"POST {MODEL}/preupload/main": FakeHub.preupload,
    r"POST /(?P<name>.+)\.git/info/lfs/objects/batch": FakeHub.batch,
    "PUT /blobs/(?P<oid>.+)": FakeHub.blob,
    f"POST {MODEL}/commit/main": FakeHub.commit,
    r"(GET|HEAD) /(?P<name>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)": FakeHub.resolve,
}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Run the server on a free port."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if self.path.startswith("/blobs/"):
                token = WRITER  # addresses of large files are signed
            answer = hub.answer(f"{self.command} {unquote(urlsplit(self.path).path)}", token, body)
            is_file = isinstance(answer.content, bytes)
            content = answer.content if is_file else json.dumps(answer.content).encode()
            self.send_response(answer.status)
            headers = {"Content-Type": "application/octet-stream" if is_file else "application/json"}
            for name, value in (headers | answer.headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = respond  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
