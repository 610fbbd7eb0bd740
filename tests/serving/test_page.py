"""The conversation on the chat page, before a server whose answers the tests write; `make page` runs it."""

# Playwright is no dependency of `dev`, which the type checker runs with.
# pyright: reportMissingImports=false

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from serving.page_actions import button, contents, last_answer, messages, say
from serving.page_server import ChatServer, Drop, Pause, Reply, answer, delta, end, error, event

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make page")
if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
expect = sync_api.expect
HOSTILE = "<img src=x onerror=\"alert('image')\"><script>alert('script')</script><b style='color:red'>&amp;</b>"


def test_answer_is_shown_while_it_is_streamed(page: "Page", server: ChatServer) -> None:
    server.replies.append(Reply([delta("One line.\nTwo"), Pause, delta(" lines."), Pause, end(10, 7)]))
    say(page, "Go on")
    expect(last_answer(page)).to_have_text("One line.\nTwo")
    expect(page.locator("#length")).to_have_text("Conversation: 1+ tokens")
    page.evaluate("window.first = document.querySelector('.answer > div')")
    server.proceed()
    expect(last_answer(page)).to_have_text("One line.\nTwo lines.")
    expect(page.get_by_role("status")).to_be_empty()
    server.proceed()
    expect(page.get_by_role("status")).to_have_text("One line.\nTwo lines.")
    assert page.evaluate("first === document.querySelector('.answer > div')"), "a line is not rendered again"
    expect(page.locator(".foot")).to_have_text(re.compile(r"^7 tokens · [\d,.]+ tokens/sRegenerate$"))
    expect(page.locator("#length")).to_have_text("Conversation: 17 tokens")
    expect(page.locator("#state")).to_have_text("State: 12.5 MiB at any length")
    sent = server.chats[0].body
    assert sent == {
        "model": "tiny",
        "messages": messages("Go on"),
        "stream": True,
        "stream_options": {"include_usage": True},
    }


TEXT = "naïve 🦊 日本語\nend"
STREAM = delta(TEXT[:8]) + delta(TEXT[8:]) + end()
TWO_LINES = STREAM.replace(b', "choices"', b',\ndata: "choices"')
# A network joins chunks as it likes; these come as they are.
FETCH_CHUNKS = """(chunks) => {
  window.fetch = async () => new Response(new ReadableStream({
    pull: (stream) => chunks.length ? stream.enqueue(new Uint8Array(chunks.shift())) : stream.close(),
  }));
}"""


@pytest.mark.parametrize("size", [1 << 20, 7, 1], ids=["one-chunk", "chunks-of-7-bytes", "chunks-of-1-byte"])
@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(STREAM, id="LF"),
        pytest.param(TWO_LINES.replace(b"\n", b"\r\n"), id="CRLF"),
        pytest.param(b"\xef\xbb\xbf: ping\n\nevent: x\nid: 1\n" + STREAM.replace(b"data: ", b"data:"), id="comments"),
        pytest.param(TWO_LINES, id="data-in-two-lines"),
        pytest.param(STREAM.replace(b"data: [DONE]\n\n", b""), id="no-DONE-after-the-finish-reason"),
    ],
)
def test_stream_is_parsed(stream: bytes, size: int, page: "Page") -> None:
    expect(page.locator("#model")).to_have_text("tiny")
    page.evaluate(FETCH_CHUNKS, [list(stream[i : i + size]) for i in range(0, len(stream), size)])
    say(page, "Go on")
    expect(page.locator("#length")).to_have_text("Conversation: 15 tokens")
    assert last_answer(page).text_content() == TEXT


def test_html_is_text(page: "Page", server: ChatServer) -> None:
    server.model["id"] = HOSTILE
    page.reload()
    server.replies += [answer(HOSTILE), error(400, HOSTILE)]
    say(page, HOSTILE)
    expect(last_answer(page)).to_have_text(HOSTILE)
    say(page, "again")
    expect(page.locator(".failed p")).to_have_text(HOSTILE)
    expect(page.locator(".message").first).to_have_text(HOSTILE)
    assert page.title() == f"{HOSTILE} · Chat"
    assert page.evaluate("document.querySelectorAll('img, main script, main b, [style]').length") == 0
    assert {request.path for request in server.requests} == {"/", "/v1/models", "/v1/chat/completions"}


@pytest.mark.parametrize(
    ("text", "code", "rest"),
    [
        pytest.param("a\n```py\nx = 1\n\n<b>\n```\nb", "x = 1\n\n<b>\n", "a\nb", id="block"),
        pytest.param("````\n```\n````", "```\n", "", id="longer-fence"),
        pytest.param("```\nopen", "open", "", id="unclosed"),
        pytest.param("a ``` b\n``two\n```py", None, "a ``` b\n``two\n```py", id="no-fence"),
    ],
)
def test_fenced_code_is_preformatted(text: str, code: str | None, rest: str, page: "Page", server: ChatServer) -> None:
    server.replies.append(Reply([*map(delta, text), end()]))
    say(page, "Code")
    expect(button(page, "Regenerate")).to_be_visible()
    assert page.locator(".answer pre").all_text_contents() == ([] if code is None else [code])
    assert "".join(page.locator(".answer > div").all_text_contents()) == rest


@pytest.mark.parametrize("key", [True, False], ids=["Escape", "button"])
def test_stopped_answer_stays_in_the_conversation(key: bool, page: "Page", server: ChatServer) -> None:
    server.replies += [Reply([delta("Half an"), Pause, delta(" answer"), end()]), answer("Fine.")]
    say(page, "Go on")
    expect(last_answer(page)).to_have_text("Half an")
    page.get_by_label("Message", exact=True).fill("And")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape") if key else button(page, "Stop").click()
    expect(page.locator(".foot")).to_have_text("Stopped.Regenerate")
    assert server.client_left.wait(10), "the server goes on"
    expect(page.get_by_label("Message", exact=True)).to_have_value("And")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    expect(last_answer(page)).to_have_text("Fine.")
    assert contents(server)[1] == messages("Go on", "Half an", "And")


def test_new_conversation_forgets_the_old_one(page: "Page", server: ChatServer) -> None:
    server.replies += [answer("One."), Reply([delta("Two"), Pause]), answer("Three.")]
    say(page, "1")
    expect(button(page, "Regenerate")).to_be_visible()
    say(page, "2")
    expect(last_answer(page)).to_have_text("Two")
    page.get_by_label("Message", exact=True).fill("3")
    button(page, "New conversation").click()
    expect(page.locator("article")).to_have_count(0)
    expect(page.get_by_text("Say something to the model.")).to_be_visible()
    expect(page.locator("#length")).to_have_text("Conversation: 0 tokens")
    assert server.client_left.wait(10), "the server goes on"
    page.keyboard.press("Enter")
    expect(last_answer(page)).to_have_text("Three.")
    assert contents(server) == [messages("1"), messages("1", "One.", "2"), messages("3")]


def test_regenerated_answer_replaces_the_last(page: "Page", server: ChatServer) -> None:
    server.replies += [answer("One."), Reply([Pause, *error(500, "Full").parts], 500, "application/json")]
    server.replies += [answer("Two."), answer("Three.")]
    say(page, "Go on")
    button(page, "Regenerate").click()
    expect(last_answer(page)).to_have_text("One.")
    server.proceed()
    button(page, "Retry").click()
    expect(last_answer(page)).to_have_text("Two.")
    say(page, "More")
    expect(last_answer(page)).to_have_text("Three.")
    expect(button(page, "Regenerate")).to_have_count(1)
    assert contents(server) == [messages("Go on")] * 3 + [messages("Go on", "Two.", "More")]


@pytest.mark.parametrize(
    ("reply", "shown", "partial"),
    [
        pytest.param(error(503, "The queue is full."), "The queue is full.", "", id="error"),
        pytest.param(error(400, "no chat template: give one"), "no chat template: give one", "", id="no-template"),
        pytest.param(Reply([b"<html>"], 502, "text/html"), "HTTP 502 Bad Gateway", "", id="proxy"),
        pytest.param(None, "The server does not answer.", "", id="network"),
        pytest.param(
            Reply([delta("Half"), Pause, Drop]),
            "The connection was lost before the end of the answer.",
            "Half",
            id="drop",
        ),
        pytest.param(
            Reply([delta("Half"), Pause]), "The connection was closed before the end of the answer.", "Half", id="short"
        ),
        pytest.param(
            Reply([delta("Half"), Pause, event({"error": {"message": "NaN"}})]), "NaN", "Half", id="error-in-the-stream"
        ),
        pytest.param(Reply([b"data: {\n\n"]), "The server sent an event that is not JSON.", "", id="no-JSON"),
    ],
)
def test_failure_is_shown_and_retried(
    reply: Reply | None, shown: str, partial: str, page: "Page", server: ChatServer
) -> None:
    if reply is None:
        page.route("**/v1/chat/completions", lambda route: route.abort(), times=1)
    server.replies += [*([reply] if reply else []), answer("Fine."), answer("More.")]
    say(page, "Go on")
    expect(last_answer(page)).to_have_text(partial)
    server.proceed()
    expect(page.locator(".failed p")).to_have_text(shown)
    expect(page.get_by_role("status")).to_have_text(f"Error: {shown}")
    expect(last_answer(page)).to_have_text(partial)
    button(page, "Retry").click()
    expect(last_answer(page)).to_have_text("Fine.")
    say(page, "On")
    expect(last_answer(page)).to_have_text("More.")
    expect(page.locator(".message")).to_have_text(["Go on", "On"])
    assert contents(server)[-2:] == [messages("Go on"), messages("Go on", "Fine.", "On")]


def test_message_without_an_answer_is_left_out(page: "Page", server: ChatServer) -> None:
    server.replies += [error(503, "Full"), answer("Fine.")]
    say(page, "One")
    expect(button(page, "Retry")).to_be_visible()
    say(page, "Two")
    expect(last_answer(page)).to_have_text("Fine.")
    expect(page.locator(".foot").first).to_have_text("FullLeft out of the conversation.")
    assert contents(server)[1] == messages("Two")


def test_answer_cut_at_the_limit_says_so(page: "Page", server: ChatServer) -> None:
    server.model["max_length"] = 4096
    page.reload()
    server.replies += [Reply([delta("Cut"), end(1000, 1, reason="length")]), Reply([end(1002, 1)])]
    say(page, "Go on")
    expect(page.locator(".foot p")).to_have_text("1 token · cut at the limit of tokens")
    expect(page.locator("#length")).to_have_text("Conversation: 1,001 tokens of at most 4,096")
    say(page, "On")
    expect(page.locator(".foot p").last).to_have_text("The model ended its answer at once. · 1 token")


def test_options_are_sent_and_kept(page: "Page", server: ChatServer) -> None:
    values = {"Temperature": "0,7", "Top p": "0.9", "Top k": "40", "Max tokens": "64", "Seed": "-3"}
    button(page, "Options").click()
    for label, value in (values | {"System message": "Be brief."}).items():
        page.get_by_label(label).fill(value)
    page.reload()
    expect(button(page, "Options")).to_have_attribute("aria-expanded", "false")
    server.replies += [answer("Fine."), answer("Fine.")]
    say(page, "Go on")
    expect(button(page, "Regenerate")).to_be_visible()
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "max_tokens": 64, "seed": -3}
    assert server.chats[0].body.items() >= options.items()
    assert contents(server) == [messages("Go on", system="Be brief.")]
    button(page, "Options").click()
    button(page, "Reset to defaults").click()
    button(page, "Regenerate").click()
    expect(button(page, "Regenerate")).to_be_visible()
    assert not options.keys() & server.chats[1].body.keys()
    assert contents(server)[1] == messages("Go on")


@pytest.mark.parametrize(
    ("label", "value", "shown"),
    [
        ("Temperature", "-1", "A number of at least 0."),
        ("Temperature", "warm", "A number of at least 0."),
        ("Top p", "0", "A number above 0 and at most 1."),
        ("Top p", "1.1", "A number above 0 and at most 1."),
        ("Top k", "2.5", "A whole number of at least 0."),
        ("Max tokens", "0", "A whole number of at least 1."),
        ("Max tokens", "Infinity", "A whole number of at least 1."),
        ("Seed", "1e30", "A whole number of at most 15 digits."),
    ],
)
def test_wrong_option_is_named_and_not_sent(
    label: str, value: str, shown: str, page: "Page", server: ChatServer
) -> None:
    button(page, "Options").click()
    page.get_by_label(label).fill(value)
    expect(page.locator(".wrong:not(:empty)")).to_have_text([shown])
    button(page, "Options").click()
    say(page, "Go on")
    expect(page.get_by_label(label)).to_be_focused()
    expect(page.get_by_label(label)).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("Message", exact=True)).to_have_value("Go on")
    assert not server.chats


def test_key_is_asked_for_and_kept_in_the_tab(page: "Page", server: ChatServer) -> None:
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.get_by_label("API key")).to_be_hidden()
    server.key = "secret"
    server.replies.append(answer("Fine."))
    say(page, "Go on")
    expect(page.locator(".failed p")).to_have_text("The API key is missing or wrong.")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-note")).to_have_text("The server refused this key.")
    page.get_by_label("API key").fill("ключ")
    page.keyboard.press("Enter")
    expect(page.locator("#key-note")).to_contain_text("ASCII")
    page.get_by_label("API key").fill("secret")
    button(page, "Use key").click()
    expect(last_answer(page)).to_have_text("Fine.")
    expect(page.get_by_label("API key")).to_be_hidden()
    page.reload()
    expect(page.locator("#model")).to_have_text("tiny")
    assert page.evaluate("Object.values(sessionStorage)") == ["secret"]
    assert "secret" not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location")
    assert [request.key for request in server.chats] == [None, "Bearer wrong", "Bearer secret"]


def test_key_is_asked_for_at_the_start(open_page: Callable[..., "Page"], server: ChatServer) -> None:
    server.key = "secret"
    page = open_page()
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
