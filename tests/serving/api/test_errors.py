"""Requests that are refused, in the form of OpenAI's errors."""

import json
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving.api.live import NAME, Live, error_of, live_server
from tiny_model import make_config

from lightning_attention.models import LightningForCausalLM
from lightning_attention.serving.protocol import ABOUT_CALLER, NEUTRAL, ChatRequest, CompletionRequest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", {"a": 1}),
        ("prompt", [True]),
        ("prompt", [1.5]),
        ("prompt", [-1]),
        ("prompt", [259]),
        ("prompt", [10**30]),
        ("max_tokens", 0),
        ("max_tokens", 16_385),
        ("max_tokens", "3"),
        ("max_tokens", 10**30),
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("repetition_penalty", 0),
        ("seed", 10**30),
        ("seed", 1.5),
        ("n", 0),
        ("n", 129),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", ""),
        ("stop", 3),
        ("logprobs", 21),
        ("logprobs", True),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("best_of", 2),
        ("suffix", "end"),
        ("presence_penalty", 0.1),
        ("frequency_penalty", -1),
        ("logit_bias", {"3": 1}),
        ("min_p", 0.1),
        ("tools", [{}]),
        ("response_format", {"type": "json_object"}),
        ("wings", 2),
        ("messages", USER),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_field_that_is_not_supported_is_named(live, field, value):
    if (field, value) == ("prompt", ""):
        value = {"text": ""}
    body = {"prompt": "a", "max_tokens": 2, field: value}
    error = error_of(live.post(COMPLETIONS, **body))
    assert (error["status"], error["type"], error["param"]) == (400, "invalid_request_error", field)
    assert field in error["message"] or error["message"].startswith("this server generates at most")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_schema"}),
        ("reasoning_effort", "high"),
        ("modalities", ["audio"]),
        ("top_logprobs", 3),
        ("prompt", "a"),
        ("logprobs", 3),
        ("store", True),
        ("echo", True),
    ],
)
def test_a_field_of_chat_that_is_not_supported_is_named(live, field, value):
    error = error_of(live.post(CHAT, messages=USER, **{field: value}))
    assert (error["status"], error["param"]) == (400, field)


@pytest.mark.parametrize(
    "body",
    [b"{", b"", b"3", b"[]", b'"a"', b"\xff", b"[" * 100_000, b'{"model": "tiny", "prompt": NaN}', b'{"\\ud800": 1}'],
    ids=["cut", "empty", "number", "list", "text", "not UTF-8", "deep", "NaN", "surrogate"],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_body_that_is_no_json_object_is_refused(live, path, body):
    response = live.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert error_of(response)["status"] == 400


FIELDS = [*CompletionRequest.model_fields, *ChatRequest.model_fields, *NEUTRAL, *ABOUT_CALLER, "model", "wings"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "a"]), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([COMPLETIONS, CHAT]), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
def test_no_body_is_an_error_of_the_server(live, path, fields):
    body = {"model": NAME, "prompt" if path == COMPLETIONS else "messages": "a" if path == COMPLETIONS else USER}
    content = json.dumps(body | {"max_tokens": 2} | fields)
    response = live.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        error_of(response)


def test_a_page_of_another_site_cannot_send_requests_without_asking(live):
    """Browsers send text/plain to other sites without asking them first."""
    content = b'{"model": "tiny", "prompt": "a"}'
    response = live.http.post(COMPLETIONS, content=content, headers={"Content-Type": "text/plain"})
    assert "application/json" in error_of(response)["message"]
    assert "access-control-allow-origin" not in live.http.get("/health", headers={"Origin": "http://a.com"}).headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/other/model", 404),
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
    ],
)
def test_a_route_or_method_that_does_not_exist_is_refused(live, method, path, status):
    response = live.http.request(method, path)
    assert error_of(response)["status"] == status
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_another_model_is_not_found(live, path):
    error = error_of(live.post(path, model="gpt-4", prompt="a") if path == COMPLETIONS else other_chat(live))
    assert (error["status"], error["code"], error["param"]) == (404, "model_not_found", "model")


def other_chat(live: Live) -> Any:
    return live.post(CHAT, model="gpt-4", messages=USER)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_failure_of_the_model_is_one_error(loaded, monkeypatch, caplog, stream):
    model, tokenizer = loaded
    with live_server(model, tokenizer) as live:

        def fail(*_: Any) -> None:
            raise RuntimeError("secret")

        with monkeypatch.context() as patch:
            patch.setattr(model.lm_head, "forward", fail)
            response = live.post(COMPLETIONS, prompt="a", stream=stream)
            assert error_of(response)["status"] == 500
            assert "secret" not in response.text
        assert live.post(COMPLETIONS, prompt="a").status_code == 200
        assert live.is_idle()
    assert "secret" in caplog.text


def test_a_failure_within_a_stream_is_an_event(loaded, monkeypatch, caplog):
    model, tokenizer = loaded
    count, forward = 0, model.lm_head.forward

    def fail_later(x: Any) -> Any:
        nonlocal count
        count += 1
        if count == 8:
            raise RuntimeError("secret")
        return forward(x)

    monkeypatch.setattr(model.lm_head, "forward", fail_later)
    with live_server(model, tokenizer) as live:
        stream = live.client.completions.create(model=NAME, prompt="a", temperature=0, max_tokens=30, stream=True)
        with stream, pytest.raises(openai.APIError, match="failed to answer"):
            for _ in stream:
                pass


def test_a_failed_step_of_the_engine_ends_all_requests_and_the_next_are_answered(loaded, monkeypatch, caplog):
    with live_server(*loaded) as live:
        engine = live.service.engine
        with monkeypatch.context() as patch:
            patch.setattr(engine, "step", lambda: 1 / 0)
            assert error_of(live.post(COMPLETIONS, prompt="a"))["status"] == 500
        assert live.post(COMPLETIONS, prompt="a").status_code == 200
        assert live.is_idle()
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("limit", ["model", "option"])
def test_a_request_beyond_the_longest_length_is_refused(loaded, limit):
    model, tokenizer = loaded
    options: dict[str, Any] = {"max_length": 41}
    if limit == "model":
        config = make_config(vocab_size=259, eos_token_id=257, linear_attention="cosformer", max_position_embeddings=40)
        model, options = LightningForCausalLM(config), {}
    with live_server(model, tokenizer, **options) as live:
        assert live.http.get("/v1/models").json()["data"][0]["max_length"] == 41
        error = error_of(live.post(COMPLETIONS, prompt="a" * 30, max_tokens=11))
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        assert live.post(COMPLETIONS, prompt="a" * 30, max_tokens=10).status_code == 200
        assert error_of(live.post(COMPLETIONS, prompt="a" * 60))["code"] == "context_length_exceeded"
        assert error_of(live.post(CHAT, messages=USER))["code"] == "context_length_exceeded"


def test_an_answer_of_chat_takes_what_fits(loaded):
    with live_server(*loaded, max_length=60) as live:
        usage = live.post(CHAT, messages=USER, temperature=0).json()["usage"]
        assert usage["total_tokens"] == 60
