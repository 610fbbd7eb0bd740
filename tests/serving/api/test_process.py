"""The command in processes of its own: signals, and vLLM in its place."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from serving.api.live import wait_until
from tiny_model import save_checkpoint

SERVE = [sys.executable, "-m", "lightning_attention", "serve"]
RECORDER = """
import json, os, sys
print(json.dumps({"arguments": sys.argv[1:], "key": os.environ.get("VLLM_API_KEY"), "process": os.getpid()}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_checkpoint(folder / "run" / "checkpoint-7")
    (folder / "chat.jinja").write_text("{{ messages[0].content }}")
    module = folder / "fake" / "vllm" / "entrypoints" / "openai"
    module.mkdir(parents=True)
    for package in (module, *module.parents[:2]):
        (package / "__init__.py").touch()
    (module / "api_server.py").write_text(RECORDER)
    return folder


@contextmanager
def process(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the command on a free port; yield the process and its address."""
    words = [*SERVE, "--checkpoint", "run", "--port", "0", *options]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout is not None
            line = started.stdout.readline()
            found = re.fullmatch(
                r"lightning-attention: the engine of lightning-attention serves run at (http://127.0.0.1:\d+)\n", line
            )
            assert found is not None, line or started.communicate()[1]
            yield started, found[1]
        finally:
            started.kill()


def body(count: int) -> dict:
    return {"model": "run", "prompt": "a", "max_tokens": count, "temperature": 0, "stream": True}


def test_sigterm_lets_requests_end_and_refuses_new_ones(run):
    with process(run) as (server, url), httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=body(1500)) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{url}/v1/models").status_code == 503)
            refused = httpx.post(f"{url}/v1/completions", json=body(1))
            assert refused.status_code == 503
            assert refused.json()["error"]["type"] == "server_error"
            last = [line for line in lines if line][-2:]
        assert json.loads(last[0].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert last[1] == "data: [DONE]"
        assert server.wait(30) == 0
        assert server.stderr is not None
        assert server.stderr.read() == ""


@pytest.mark.parametrize(
    "drain_seconds", ["0.2", pytest.param("60", marks=pytest.mark.slow)], ids=["limit", "second signal"]
)
def test_ctrl_c_ends_requests_after_the_drain_seconds_or_a_second_one(run, drain_seconds):
    with (
        process(run, "--drain-seconds", drain_seconds) as (server, url),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        with client.stream("POST", "/v1/completions", json=body(16_000)) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(signal.SIGINT)
            if drain_seconds == "60":
                wait_until(lambda: httpx.get(f"{url}/v1/models").status_code == 503)
                server.send_signal(signal.SIGINT)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is about to stop"
        assert server.wait(30) == 130
        assert server.stderr is not None
        assert server.stderr.read() == ""


def test_vllm_takes_the_place_of_the_process(run):
    options = ["--served-model-name", "mine", "--tensor-parallel", "2", "--bf16", "--max-requests", "8"]
    options += ["--max-length", "4096", "--chat-template", "chat.jinja"]
    words = [*SERVE, "--checkpoint", "run", "--port", "8765", *options]
    environment = dict(os.environ) | {"PYTHONPATH": str(run / "fake"), "LIGHTNING_API_KEY": "sesame"}
    with subprocess.Popen(
        words, cwd=run, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        out, err = started.communicate(timeout=60)
    assert (started.returncode, err) == (0, "")
    line, recorded = out.splitlines()
    assert line == "lightning-attention: vLLM serves mine at http://127.0.0.1:8765"
    assert json.loads(recorded) == {
        "arguments": [
            *("--model", "run/checkpoint-7", "--served-model-name", "mine", "--host", "127.0.0.1", "--port", "8765"),
            *("--dtype", "bfloat16", "--tensor-parallel-size", "2", "--max-num-seqs", "8", "--max-model-len", "4096"),
            *("--chat-template", "chat.jinja"),
        ],
        "key": "sesame",
        "process": started.pid,
    }
