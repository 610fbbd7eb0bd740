"""What a reader does on the chat page, and what the server gets."""

# Playwright is no dependency of `dev`, which the type checker runs with.
# pyright: reportMissingImports=false

from typing import TYPE_CHECKING

from serving.page_server import ChatServer

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page


def say(page: "Page", text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def button(page: "Page", name: str) -> "Locator":
    return page.get_by_role("button", name=name, exact=True)


def last_answer(page: "Page") -> "Locator":
    return page.locator(".answer").last


def messages(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of users and assistants in turn."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def contents(server: ChatServer) -> list[list[dict[str, str]]]:
    return [request.body["messages"] for request in server.chats]
