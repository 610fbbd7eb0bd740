"""A server in a thread of this process, and clients for it."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import torch
import uvicorn
from openai import OpenAI

from lightning_attention.serving import ServerOptions, bind, create_app
from lightning_attention.serving.service import Service

NAME = "tiny"
Message = dict[str, str]


class Live(NamedTuple):
    """Server that runs.

    Attributes:
        url: address, without the path.
        service: what the server is made of.
        client: OpenAI's client, which does not try again.
        http: plain client.
    """

    url: str
    service: Service
    client: OpenAI
    http: httpx.Client

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Send a request with the name of the model."""
        return self.http.post(path, json={"model": NAME, **body})

    def is_idle(self) -> bool:
        """True if no request waits or runs, and every slot is free or in the prefix cache."""
        engine = self.service.engine
        free = engine.pool.num_free + len(engine.prefixes)
        return not engine.has_work and not self.service.worker.num_active and free == engine.pool.num_slots


@contextmanager
def live_server(model: Any, tokenizer: Any, key: str | None = None, **options: Any) -> Iterator[Live]:
    """Serve a model until the end of the block."""
    app = create_app(model, tokenizer, ServerOptions(NAME, api_key=key, **options))
    opened = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{opened.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, args=([opened],))
    thread.start()
    try:
        wait_until(lambda: server.started)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        with (
            OpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0, timeout=60) as client,
            httpx.Client(base_url=url, timeout=60, headers=headers) as http,
        ):
            yield Live(url, app.state.service, client, http)
    finally:
        server.should_exit = True
        thread.join()
        opened.close()


@contextmanager
def scripted(model: Any, answer: bytes) -> Iterator[None]:
    """Let a model of bytes write an answer to the one request that it gets."""
    position = 0

    def script(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        nonlocal position
        chosen = torch.full_like(logits, -9)
        chosen[..., answer[position]] = 9
        position += 1
        return chosen

    hook = model.lm_head.register_forward_hook(script)
    try:
        yield
    finally:
        hook.remove()


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Fail unless a condition becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """New tokens of transformers' `generate()`."""
    inputs = torch.tensor([ids])
    return model.generate(inputs, max_new_tokens=count, do_sample=False)[0, len(ids) :].tolist()


def text_of(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def events_of(response: httpx.Response) -> list[Any]:
    """Decode the events of a stream; the last one is "[DONE]"."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Check the form of an error, and return its fields with the status."""
    content = response.json()
    assert content.keys() == {"error"}
    assert content["error"].keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return content["error"] | {"status": response.status_code}
