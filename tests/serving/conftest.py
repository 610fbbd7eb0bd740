"""The chat page in a headless browser."""

# Playwright is no dependency of `dev`, which the type checker runs with.
# pyright: reportMissingImports=false

import os
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from serving.page_server import ChatServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make page")
    names = (os.environ["CHROMIUM"],) if "CHROMIUM" in os.environ else BROWSERS
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.fail(f"no browser: install chromium, or name one in CHROMIUM (looked for {', '.join(names)})")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer().running() as server:
        yield server


@pytest.fixture
def open_page(browser: "Browser", server: ChatServer) -> Iterator[Callable[..., "Page"]]:
    """Opens the page; at the end nothing has been requested elsewhere, and the console has no errors.

    Chromium logs the answers 401, 500, ... of the server as errors; those are meant.
    """
    contexts: list[Any] = []
    origins, faults = ["data:"], []

    def note_request(request: Any) -> None:
        if not request.url.startswith(tuple(origins)):
            faults.append(f"request: {request.url}")

    def note_console(message: Any) -> None:
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            faults.append(f"console: {message.text}")

    def note_dialog(dialog: Any) -> None:
        faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open_page(url: str = server.url, **options: Any) -> "Page":
        origins.append(url)
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("request", note_request)
        page.on("console", note_console)
        page.on("dialog", note_dialog)
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


@pytest.fixture
def page(open_page: Callable[..., "Page"]) -> "Page":
    return open_page()
