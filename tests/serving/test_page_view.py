"""The chat page for every reader: keyboard, phone, dark mode, contrast; `make page` runs it."""

# Playwright is no dependency of `dev`, which the type checker runs with.
# pyright: reportMissingImports=false

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from serving.page_actions import button, contents, last_answer, messages, say
from serving.page_server import ChatServer, Pause, Reply, answer, delta, end, error

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make page")
if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
expect = sync_api.expect
PHONE = {"viewport": {"width": 320, "height": 568}, "has_touch": True, "is_mobile": True}


def test_page_works_with_the_keyboard_alone(page: "Page", server: ChatServer) -> None:
    server.replies += [answer("One."), answer("Two."), answer("Three.")]
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("First")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Second")
    enter = "{key: 'Enter', isComposing: true, bubbles: true, cancelable: true}"
    composing = f"document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {enter}))"
    assert page.evaluate(composing), "Enter ends a composition of an input method"
    assert not server.chats
    page.keyboard.press("Enter")
    expect(last_answer(page)).to_have_text("One.")
    assert contents(server) == [messages("First\nSecond")]
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "[document.activeElement.ariaLabel || document.activeElement.textContent || document.activeElement.id,"
            " getComputedStyle(document.activeElement).outlineStyle]"
        )
        reached.append(name)
        assert outline == "solid" or name.startswith("\n"), f"{name} shows the focus"  # the body, at the end of a round
    assert {"Options", "New conversation", "Conversation", "Regenerate", "message", "Send"} <= set(reached)
    button(page, "Regenerate").focus()
    page.keyboard.press("Enter")
    expect(last_answer(page)).to_have_text("Two.")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    button(page, "Options").focus()
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Temperature")).to_be_focused()


def test_every_field_and_button_has_a_name(page: "Page") -> None:
    unnamed = """[...document.querySelectorAll('input, textarea, button')].filter((x) =>
        !x.ariaLabel && !(x.tagName === 'BUTTON' ? x : x.labels[0])?.textContent).map((x) => x.outerHTML)"""
    assert page.evaluate(unnamed) == []


def test_view_follows_only_a_reader_at_the_end(page: "Page", server: ChatServer) -> None:
    lines = delta("line\n" * 60)
    server.replies.append(Reply([lines, Pause, lines, Pause, lines, Pause, lines, end()]))
    main = page.locator("main")
    gap = "main => Math.round(main.scrollHeight - main.scrollTop - main.clientHeight)"
    say(page, "Go on")
    expect(page.locator(".answer > div")).to_have_count(60)
    assert main.evaluate(gap) <= 1
    server.proceed()
    expect(page.locator(".answer > div")).to_have_count(120)
    assert main.evaluate(gap) <= 1
    main.hover()
    page.mouse.wheel(0, -300)
    expect(button(page, "To the end")).to_be_visible()
    top = main.evaluate("main => main.scrollTop")
    server.proceed()
    expect(page.locator(".answer > div")).to_have_count(180)
    assert main.evaluate("main => main.scrollTop") == top
    button(page, "To the end").click()
    expect(button(page, "To the end")).to_be_hidden()
    server.proceed()
    expect(button(page, "Regenerate")).to_be_visible()
    assert main.evaluate(gap) <= 1


def show_everything(page: "Page", server: ChatServer) -> None:
    """Bring answers, code, a failure, a wrong option and the field for the key onto the page."""
    wide = "word" * 100
    server.model["id"] = wide
    page.reload()
    server.replies += [answer(f"{wide}\n\n```\n{wide}\n```\n"), error(500, wide)]
    say(page, wide)
    expect(button(page, "Regenerate")).to_be_visible()
    server.key = "secret"
    say(page, "again")
    expect(page.get_by_label("API key")).to_be_visible()
    button(page, "Options").click()
    page.get_by_label("Top k").fill("x")


def test_page_fits_a_phone(open_page: Callable[..., "Page"], server: ChatServer) -> None:
    page = open_page(**PHONE)
    show_everything(page, server)
    overflowing = """[...document.querySelectorAll('body, body *:not(.unseen, h1 *, pre *)')]
        .map((element) => [element.outerHTML.slice(0, 80), element.getBoundingClientRect()])
        .filter(([, box]) => box.right > 320.5 || box.left < -0.5)"""
    assert page.evaluate(overflowing) == []
    assert (
        page.evaluate("[document.documentElement, document.querySelector('main')].map((x) => x.scrollWidth)")
        == [320] * 2
    )
    sizes = """[...document.querySelectorAll('button, input, textarea')].filter((x) => x.checkVisibility()).map((x) =>
        [x.id || x.textContent, x.offsetWidth, x.offsetHeight, parseFloat(getComputedStyle(x).fontSize)])"""
    for name, width, height, font in page.evaluate(sizes):
        assert min(width, height) >= 44, f"{name}: {width} × {height} is too small to touch"
        assert font >= 16 or page.locator(f"#{name}").count() == 0, f"{name}: iOS zooms in on fields below 16 px"
    button(page, "Options").click()
    expect(page.get_by_label("Message", exact=True)).to_be_in_viewport(ratio=1)


# Contrast of every visible text with the nearest background that is not transparent (WCAG 2.2, 1.4.3).
CONTRASTS = """() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => numbers(color).slice(0, 3).map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return (numbers(color)[3] ?? 1) > 0 ? color : behind(element.parentElement);
  };
  const contrast = (element, pseudo) => {
    const lights = [getComputedStyle(element, pseudo).color, behind(element)].map(luminance).sort((a, b) => b - a);
    return (lights[0] + 0.05) / (lights[1] + 0.05);
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    if (!element.checkVisibility()) continue;
    const label = `${element.tagName}.${element.className}#${element.id}`;
    if (element.placeholder) found.push([`${label} placeholder`, contrast(element, '::placeholder')]);
    if (element.value || [...element.childNodes].some((x) => x.nodeType === 3 && x.data.trim())) {
      found.push([label, contrast(element)]);
    }
  }
  return found;
}"""


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)], ids=["light", "dark"])
def test_text_has_contrast(scheme: str, is_dark: bool, open_page: Callable[..., "Page"], server: ChatServer) -> None:
    page = open_page(color_scheme=scheme)
    found = page.evaluate(CONTRASTS)
    show_everything(page, server)
    found += page.evaluate(CONTRASTS)
    labels = {label for label, _ in found}
    assert {"BUTTON.#send", "P.wrong#option-top_k-wrong", "P.#key-note", "DIV.message#", "CODE.#"} <= labels
    assert [(label, contrast) for label, contrast in found if contrast < 4.5] == []
    red, green, blue = map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))
    assert (max(red, green, blue) < 64) == is_dark


def test_reduced_motion_stops_animations(open_page: Callable[..., "Page"], server: ChatServer) -> None:
    names = []
    for motion in ("no-preference", "reduce"):
        page = open_page(reduced_motion=motion)
        server.replies.append(Reply([Pause, end()]))
        say(page, "Go on")
        waiting = page.locator(".waiting")
        names.append(waiting.evaluate("x => getComputedStyle(x, '::after').animationName"))
        server.proceed()
    assert names == ["breathe", "none"]
