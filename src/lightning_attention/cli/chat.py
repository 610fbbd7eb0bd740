"""`lightning-attention chat`: a conversation in the terminal."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

from typer import Exit, Option

from .generate import without_engine_log
from .imports import quick_imports

INTERRUPTED = 130
COMMANDS = "/new begins a new conversation, Ctrl-C stops an answer, Ctrl-D ends"


def chat(
    checkpoint: Annotated[Path, Option(help="Checkpoint, or output folder of a run.")],
    system: Annotated[str | None, Option(help="System message, before the conversation.")] = None,
    chat_template: Annotated[
        Path | None, Option(help="File with a Jinja template. By default the template of the checkpoint.")
    ] = None,
    max_new_tokens: Annotated[int, Option(help="Tokens of an answer, at most.")] = 1024,
    temperature: Annotated[float, Option(help="0 takes the most likely token.")] = 1.0,
    top_k: Annotated[int, Option(help="Sample from the k most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[float, Option(help="Sample from the most likely tokens with this total probability.")] = 1.0,
    repetition_penalty: Annotated[float, Option(help="Above 1 avoids tokens of the conversation.")] = 1.0,
    seed: Annotated[int | None, Option(help="Makes sampling repeatable.")] = None,
    bf16: Annotated[bool, Option("--bf16", help="Run in bfloat16.")] = False,
) -> None:
    """Talk to a model; every line of standard input is a message."""
    with quick_imports():
        from transformers.utils.logging import disable_progress_bar

        from ..inference import Conversation, SamplingOptions, load
        from ..inference.chat import read_template

    disable_progress_bar()
    options = SamplingOptions(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    template = None if chat_template is None else read_template(chat_template)
    model, tokenizer = load(checkpoint, bf16=bf16)
    conversation = Conversation(model, tokenizer, options, chat_template=template, system=system)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        print(f"{checkpoint}: {COMMANDS}", file=sys.stderr)
        import readline  # noqa: F401  # lines can be edited
    with without_engine_log():
        while (message := _read(is_terminal)) is not None:
            if message == "/new":
                conversation.restart()
            elif message:
                _answer(conversation, message, is_terminal)


def _read(is_terminal: bool) -> str | None:
    """Read a message; None at the end."""
    try:
        return input("> " if is_terminal else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8: {error}") from error


def _answer(conversation: Any, message: str, is_terminal: bool) -> None:
    start = time.monotonic()
    answer = conversation.answer(message)
    try:
        for text in answer:
            sys.stdout.write(text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        answer.close()
        if not is_terminal:
            raise Exit(INTERRUPTED) from None
    print(flush=True)
    if is_terminal:
        last = conversation.last
        speed = last.tokens / max(time.monotonic() - start, 1e-9)
        length, size = last.prompt_tokens + last.tokens, conversation.state_bytes
        state = f"{size / 2**20:.3g} MiB" if size >= 2**20 else f"{size / 2**10:.3g} KiB"
        print(f"[{last.tokens} tokens, {speed:.0f} a second; {length} in all, in a state of {state}]", file=sys.stderr)
