"""The file of the chat page."""

import re

from serving.page_server import PAGE


def test_file_has_one_script_and_one_style_and_loads_nothing() -> None:
    """The server allows these two by their hashes, and nothing else."""
    text = PAGE.read_text(encoding="utf-8")
    markup = re.sub(r"<(script|style)>.*?</\1>", r"<\1></\1>", text, flags=re.S)
    assert re.findall(r"<(?:script|style)\b[^>]*>", markup) == ["<style>", "<script>"]
    assert not re.findall(r"\s(?:style|on\w+|src)\s*=", markup)
    assert all(target.startswith("data:") for target in re.findall(r'href="(.*?)"', markup))
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|@import|url\(", text)
