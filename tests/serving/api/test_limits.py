"""Key, host, sizes, load, and clients that leave."""

import asyncio
import contextlib
import json
import random
import socket
import time
from typing import Any

import httpx
import openai
import pytest
from serving.api.live import NAME, Live, error_of, greedy, live_server, text_of, wait_until

from lightning_attention.inference import encode

COMPLETIONS = "/v1/completions"


def test_a_key_is_needed_except_for_open_routes(loaded):
    with live_server(*loaded, key="sesame") as live:
        for path in ("/health", "/"):
            assert httpx.get(live.url + path).status_code in (200, 404)
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic sesame"},
            {"Authorization": "é"},
        ):
            encoded = {name.encode(): value.encode() for name, value in headers.items()}
            for method, path in (
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
                ("POST", COMPLETIONS),
                ("GET", "/nothing"),
            ):
                response = httpx.request(method, live.url + path, headers=encoded)
                assert error_of(response)["code"] == "invalid_api_key"
                assert response.status_code == 401
        assert live.client.models.list().data[0].id == NAME
        with pytest.raises(openai.AuthenticationError):
            live.client.with_options(api_key="other").models.list()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("[::1]:8000", 200),
        ("evil.com", 400),
        ("localhost.evil.com", 400),
        ("evil.com@localhost.evil.com", 400),
        ("[", 400),
        ("", 400),
    ],
)
def test_other_hosts_are_refused_on_a_local_address(loaded, host, status):
    with live_server(*loaded, hosts=("localhost", "::1")) as live:
        response = httpx.get(live.url + "/v1/models", headers={"Host": host})
        assert response.status_code == status
        if status != 200:
            error_of(response)


def test_a_body_beyond_the_limit_is_refused(loaded):
    with live_server(*loaded, max_body_bytes=1000) as live:
        assert error_of(live.post(COMPLETIONS, prompt="a" * 1000))["status"] == 413
        chunks = (b'{"model": "tiny", "prompt": "' + b"a" * 600, b"a" * 600 + b'"}')
        response = live.http.post(COMPLETIONS, content=iter(chunks), headers={"Content-Type": "application/json"})
        assert error_of(response)["status"] == 413
        assert live.post(COMPLETIONS, prompt="a" * 100).status_code == 200


def test_more_choices_than_fit_are_refused(loaded):
    with live_server(*loaded, max_requests=1, max_waiting=2) as live:
        assert error_of(live.post(COMPLETIONS, prompt="a", n=4))["param"] == "n"
        streams = [start(live) for _ in range(3)]
        wait_until(lambda: live.service.engine.num_running == 1)
        response = live.post(COMPLETIONS, prompt="a")
        assert error_of(response)["status"] == 429
        assert response.headers["retry-after"] == "1"
        metrics = live.http.get("/metrics").text
        assert "lightning_attention_requests_running 1.0" in metrics
        assert "lightning_attention_requests_waiting 2.0" in metrics
        assert "lightning_attention_free_slots 0.0" in metrics
        for stream in streams:
            stream.close()
        wait_until(live.is_idle)
        assert live.post(COMPLETIONS, prompt="a").status_code == 200


def start(live: Live, **options: Any) -> socket.socket:
    """Start a request that takes long; closing the socket is leaving."""
    before, url = live.service.worker.num_active, httpx.URL(live.url)
    body = json.dumps({"model": NAME, "prompt": "a", "temperature": 0, "max_tokens": 16_000, **options})
    lines = f"POST {COMPLETIONS} HTTP/1.1", f"Host: {url.host}", "Content-Type: application/json"
    opened = socket.create_connection((url.host, url.port))
    opened.sendall("\r\n".join([*lines, f"Content-Length: {len(body)}", "", body]).encode())
    wait_until(lambda: live.service.worker.num_active == before + options.get("n", 1))
    return opened


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}], ids=str)
@pytest.mark.parametrize("waits", [False, True], ids=["runs", "waits"])
def test_a_client_that_leaves_frees_its_slots(loaded, options, waits):
    with live_server(*loaded, max_requests=1 if waits else 4) as live:
        others = [start(live)] if waits else []
        opened = start(live, **options)
        if not waits:
            wait_until(lambda: live.service.engine.num_running > 0)
            if options.get("stream"):
                assert opened.recv(1000)
        opened.close()
        wait_until(lambda: live.service.worker.num_active == len(others))
        for other in others:
            other.close()
        wait_until(live.is_idle)
        assert live.service.in_flight == 0


def test_metrics_count_tokens_and_requests(loaded):
    with live_server(*loaded) as live:
        for _ in range(2):
            assert live.post(COMPLETIONS, prompt="abc", max_tokens=5, n=2, temperature=0).status_code == 200
        assert live.post(COMPLETIONS).status_code == 400
        lines = live.http.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    expected = {
        'requests_total{route="/v1/completions",status="200"}': 2,
        'requests_total{route="/v1/completions",status="400"}': 1,
        "prompt_tokens_total": 2 * 4,
        "generated_tokens_total": 2 * 2 * 5,
        "time_to_first_token_seconds_count": 4,
        "time_per_token_seconds_count": 4,
        "requests_running": 0,
        "requests_waiting": 0,
        "free_slots": 64,
    }
    assert {name: float(values[f"lightning_attention_{name}"]) for name in expected} == expected


def test_no_output_is_lost_where_the_engine_is_faster_than_submit(loaded, monkeypatch):
    with live_server(*loaded) as live:
        engine, other = live.service.engine, start(live)  # keeps the engine busy
        submit = engine.submit

        def slow(*arguments: Any, **options: Any) -> int:
            request = submit(*arguments, **options)
            time.sleep(0.2)
            return request

        with monkeypatch.context() as patch:
            patch.setattr(engine, "submit", slow)
            answer = live.post(COMPLETIONS, prompt="a", temperature=0, max_tokens=3).json()
        assert answer == live.post(COMPLETIONS, prompt="a", temperature=0, max_tokens=3).json() | {
            "id": answer["id"],
            "created": answer["created"],
        }
        other.close()
        wait_until(live.is_idle)


def test_the_thread_of_the_engine_waits_without_a_load(loaded):
    with live_server(*loaded) as live:
        live.post(COMPLETIONS, prompt="a")
        wait_until(live.is_idle)
        before = time.process_time()
        time.sleep(1)
        assert time.process_time() - before < 0.2


async def send(client: httpx.AsyncClient, kind: str, prompt: str, number: int) -> Any:
    """Send a request of a kind; return the text of an answer, or the status."""
    body = {"model": NAME, "prompt": prompt, "temperature": 0, "max_tokens": 24}
    if kind == "bad":
        return (await client.post(COMPLETIONS, json=body | {"top_p": -number - 1})).status_code
    if kind == "whole":
        response = await client.post(COMPLETIONS, json=body)
        return response.json()["choices"][0]["text"]
    if kind == "hang-up":
        with contextlib.suppress(httpx.TimeoutException):
            await client.post(COMPLETIONS, json=body | {"max_tokens": 10_000}, timeout=httpx.Timeout(60, read=0.3))
        return None
    text = ""
    async with client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as response:
        async for line in response.aiter_lines():
            if kind == "hang-up in a stream":
                return None
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return text


def test_256_requests_at_once_with_bad_ones_and_hang_ups(loaded):
    model, tokenizer = loaded
    prompts = [f"prompt {i} " * (1 + i % 5) for i in range(16)]
    expected = [text_of(tokenizer, greedy(model, encode(tokenizer, prompt), 24)) for prompt in prompts]
    kinds = ["whole", "stream"] * 4 + ["bad", "hang-up", "hang-up in a stream"]
    chosen = random.Random(0).choices(kinds, k=256)

    async def send_all(url: str) -> list[Any]:
        limits = httpx.Limits(max_connections=256)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            tasks = [send(client, kind, prompts[i % 16], i) for i, kind in enumerate(chosen)]
            return await asyncio.gather(*tasks)

    with live_server(model, tokenizer, max_requests=32, prefix_slots=8) as live:
        results = asyncio.run(send_all(live.url))
        wait_until(live.is_idle)
        assert live.service.in_flight == 0
        for i, (kind, result) in enumerate(zip(chosen, results, strict=True)):
            wanted = {"bad": 400, "hang-up": None, "hang-up in a stream": None}.get(kind, expected[i % 16])
            assert result == wanted, (i, kind)
