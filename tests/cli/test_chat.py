"""`lightning-attention chat`, with messages on standard input."""

import json
from pathlib import Path

import pytest
from cli.test_cli import run
from tiny_model import save_checkpoint

from lightning_attention.inference import Conversation, SamplingOptions, load

MESSAGES = "hello\n\nwhy?\n/new\nhello\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint-7")


def test_lines_are_messages_and_answers_are_printed(monkeypatch, capsys, checkpoint):
    arguments = [
        "chat",
        "--checkpoint",
        checkpoint,
        "--max-new-tokens",
        12,
        "--temperature",
        0,
        "--system",
        "Be brief.",
    ]
    code, out, err = run(monkeypatch, capsys, *arguments, stdin=MESSAGES)
    assert (code, err) == (0, "")
    conversation = Conversation(
        *load(checkpoint), SamplingOptions(max_new_tokens=12, temperature=0), system="Be brief."
    )
    first = "".join(conversation.answer("hello"))
    second = "".join(conversation.answer("why?"))
    assert out == f"{first}\n{second}\n{first}\n"


def test_a_template_of_a_file_is_used(monkeypatch, capsys, checkpoint, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}")
    arguments = ["chat", "--checkpoint", checkpoint, "--max-new-tokens", 5, "--temperature", 0]
    code, out, err = run(monkeypatch, capsys, *arguments, "--chat-template", template, stdin="a\n")
    generated = run(monkeypatch, capsys, "generate", *arguments[1:], "--prompt", "[a]")[1]
    assert (code, err) == (0, "")
    assert "[a]" + out == generated


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "holds no chat template"),
        ("{% for %}", "the chat template is not valid"),
        ("{{ raise_exception('no') }}", "the chat template cannot render these messages: no"),
        (None, "No such file"),
    ],
    ids=["empty", "invalid", "raises", "missing"],
)
def test_a_bad_template_is_one_line(monkeypatch, capsys, checkpoint, tmp_path, template, message):
    file = tmp_path / "template.jinja"
    if template is not None:
        file.write_text(template)
    code, out, err = run(monkeypatch, capsys, "chat", "--checkpoint", checkpoint, "--chat-template", file, stdin="a\n")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_files_of_prompts_may_hold_messages(monkeypatch, capsys, checkpoint):
    lines = [
        {"messages": [{"role": "user", "content": "hello"}], "id": 3},
        {"messages": [{"role": "user", "content": "hello"}], "prompt": "a"},
        {"messages": [{"role": "robot", "content": "hello"}]},
        {"prompt": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"},
    ]
    arguments = ["generate", "--checkpoint", checkpoint, "--prompts", "-", "--max-new-tokens", 12, "--temperature", 0]
    code, out, _ = run(monkeypatch, capsys, *arguments, stdin="".join(json.dumps(line) + "\n" for line in lines))
    answers = {answer["index"]: answer for answer in map(json.loads, out.splitlines())}
    assert code == 1
    assert answers[0]["id"] == 3
    assert answers[0]["text"] == answers[3]["text"]
    assert answers[1]["error"] == "a line must have a prompt or messages, not both"
    assert answers[2]["error"].startswith("the role of a message must be one of system, user, assistant")
