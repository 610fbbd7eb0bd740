"""The chat page before our server; `make page` runs it."""

# Playwright is no dependency of `dev`, which the type checker runs with.
# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from serving.api.live import NAME, live_server, wait_until
from serving.page_actions import button, last_answer, say
from tiny_model import save_checkpoint

from lightning_attention.inference import load

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make page")
if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
expect = sync_api.expect
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Model whose answers end at their limit of tokens only, and its tokenizer."""
    model, tokenizer = load(save_checkpoint(tmp_path_factory.mktemp("run")))
    model.config.eos_token_id = model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    return model, tokenizer


def test_conversation_with_our_server(open_page: Callable[..., "Page"], model_and_tokenizer: Any) -> None:
    with live_server(*model_and_tokenizer, key="secret key", chat_template=TEMPLATE) as live:
        page = open_page(f"{live.url}/")
        page.get_by_label("API key").fill("secret key")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text(NAME)
        button(page, "Options").click()
        page.get_by_label("Max tokens").fill("40")
        page.get_by_label("Seed").fill("1")
        say(page, "hi")
        expect(page.locator(".foot p")).to_contain_text("40 tokens · ")
        expect(page.locator(".foot p")).to_contain_text("cut at the limit of tokens")
        messages: list[Any] = [{"role": "user", "content": "hi"}]
        whole = live.client.chat.completions.create(model=NAME, messages=messages, max_tokens=40, seed=1)
        assert last_answer(page).text_content() == whole.choices[0].message.content
        assert whole.usage
        expect(page.locator("#length")).to_have_text(f"Conversation: {whole.usage.total_tokens} tokens")
        page.get_by_label("Max tokens").fill("10000")
        say(page, "again")
        expect(last_answer(page)).not_to_be_empty()
        button(page, "Stop").click()
        expect(page.locator(".foot p").last).to_have_text("Stopped.")
        wait_until(live.is_idle)


def test_missing_chat_template_is_shown(
    open_page: Callable[..., "Page"], model_and_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_and_tokenizer[1], "chat_template", None)
    with live_server(*model_and_tokenizer) as live:
        page = open_page(f"{live.url}/")
        say(page, "hi")
        expect(page.locator(".failed p")).to_contain_text("no chat template: give one by --chat-template")
        expect(button(page, "Retry")).to_be_visible()
