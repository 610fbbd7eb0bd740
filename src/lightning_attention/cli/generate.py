"""`lightning-attention generate`: generate text with a trained model."""

import logging
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

from typer import Context, Exit, Option

from .imports import quick_imports
from .options import given_options, option_names

# Options that have no effect on a single prompt.
WITH_PROMPTS = "output", "max_requests", "prefix_slots", "chat_template"
INTERRUPTED = 130
LINES_FAILED = 1


def generate(
    context: Context,
    checkpoint: Annotated[Path, Option(help="Checkpoint, or output folder of a run.")],
    prompt: Annotated[str | None, Option(help="Text to continue. By default standard input.")] = None,
    prompts: Annotated[
        Path | None,
        Option(
            help="Instead of --prompt, a .jsonl file or pipe, or - for standard input. Each line has a text `prompt`, "
            "or `messages` with role and content, and optionally options (max_new_tokens, temperature, ..., and stop: "
            "one or more texts that end the answer). If a line cannot be answered, its answer has an `error`, and the "
            "exit code is 1."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        Option(
            help="With --prompts, a .jsonl file for the answers, by default standard output. Answers in the file are "
            "kept, so that the same command continues after an interruption."
        ),
    ] = None,
    max_requests: Annotated[int, Option(help="With --prompts, prompts answered at a time.")] = 64,
    prefix_slots: Annotated[int, Option(help="With --prompts, states in the prefix cache.")] = 16,
    chat_template: Annotated[
        Path | None,
        Option(help="With --prompts, file with a Jinja template for messages. By default the checkpoint's."),
    ] = None,
    max_new_tokens: Annotated[int, Option(help="Tokens to generate, at most.")] = 256,
    temperature: Annotated[float, Option(help="0 takes the most likely token.")] = 1.0,
    top_k: Annotated[int, Option(help="Sample from the k most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[float, Option(help="Sample from the most likely tokens with this total probability.")] = 1.0,
    repetition_penalty: Annotated[float, Option(help="Above 1 avoids tokens of the prompt and of the answer.")] = 1.0,
    seed: Annotated[int | None, Option(help="Makes sampling repeatable.")] = None,
    bf16: Annotated[bool, Option("--bf16", help="Run in bfloat16.")] = False,
) -> None:
    """Generate text after a prompt, or answer a file of prompts."""
    extra = [name for name in WITH_PROMPTS if name in given_options(context)]
    if prompts is None and extra:
        raise ValueError(f"{option_names(extra)} {'needs' if len(extra) == 1 else 'need'} --prompts")
    if prompt is not None and prompts is not None:
        raise ValueError("give --prompt or --prompts, not both")
    with quick_imports():
        from transformers.utils.logging import disable_progress_bar

        from ..inference import SamplingOptions

    disable_progress_bar()
    options = SamplingOptions(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    with _explaining_interruption(
        "interrupted" if output is None else f"interrupted: the same command continues {output}"
    ):
        if prompts is None:
            _continue_prompt(checkpoint, bf16, prompt, options)
        else:
            _answer_prompts(checkpoint, bf16, prompts, output, max_requests, prefix_slots, chat_template, options)


def _continue_prompt(checkpoint: Path, bf16: bool, prompt: str | None, options: Any) -> None:
    from ..inference import load, stream

    model, tokenizer = load(checkpoint, bf16=bf16)
    text = _standard_input() if prompt is None else _argument(prompt)
    generated = stream(model, tokenizer, text, options)
    first = next(generated, "")  # may fail, so that nothing is written before
    _write(text + first)
    for text in generated:
        _write(text)
    _write("\n")


def _answer_prompts(
    checkpoint: Path,
    bf16: bool,
    prompts: Path,
    output: Path | None,
    max_requests: int,
    prefix_slots: int,
    chat_template: Path | None,
    options: Any,
) -> None:
    from ..inference import Engine, load
    from ..inference.answers import arriving_lines, check_writable, read_answers, write_answers
    from ..inference.batch import answer_lines, to_json
    from ..inference.chat import read_template
    from ..inference.packing import can_pack

    # A pipe or device is written without reading or replacing its content.
    is_special = output is not None and output.exists() and not (output.is_file() or output.is_dir())
    kept = None if is_special else output
    answered = {}
    if kept is not None:
        if kept.exists() and prompts.exists() and kept.samefile(prompts):
            raise ValueError("--output would overwrite --prompts")
        check_writable(kept)
        answered = read_answers(kept)
    template = None if chat_template is None else read_template(chat_template)
    with _opened(prompts) as lines:
        total = _number_of_lines(lines)
        model, tokenizer = load(checkpoint, bf16=bf16)
        packs = can_pack(model)
        engine = Engine(model, max_requests=max_requests, prefix_slots=prefix_slots, pack_weights=packs)
        if kept is not None:
            write_answers(kept, answered)
        written, failed = len(answered), 0
        left = None if total is None else total - written
        arriving = arriving_lines(lines, can_wait=lambda: not engine.has_work)
        answers = answer_lines(engine, tokenizer, arriving, options, answered, chat_template=template)
        with without_engine_log(), _appending(output) as file:
            for answer in _with_progress(answers, left):
                file.write(to_json(answer))
                file.flush()
                written, failed = written + 1, failed + ("error" in answer)
    if failed:
        print(f"{failed} of {written} lines could not be answered: their `error` says why", file=sys.stderr)
        raise Exit(LINES_FAILED)


@contextmanager
def _explaining_interruption(line: str) -> Iterator[None]:
    """Write a line to standard error on Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"lightning-attention: {line}", file=sys.stderr)
        raise Exit(INTERRUPTED) from None


def _standard_input() -> str:
    content = _bytes_of(sys.stdin).read()
    try:
        return content if isinstance(content, str) else content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8: {error}") from error


def _argument(text: str) -> str:
    """Decode an argument as UTF-8, in every locale."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"--prompt is not UTF-8: {error}") from error


def _write(text: str) -> None:
    file = _bytes_of(sys.stdout)
    file.write(text if file is sys.stdout else text.encode("utf-8"))
    file.flush()


def _bytes_of(stream: Any) -> IO[Any]:
    """Byte stream under a text stream, whose encoding depends on the locale; the stream itself if it has none."""
    return getattr(stream, "buffer", stream)


@contextmanager
def _opened(prompts: Path) -> Iterator[IO[Any]]:
    if prompts == Path("-"):
        yield _bytes_of(sys.stdin)
    else:
        with prompts.open("rb") as file:
            yield file


def _number_of_lines(file: IO[Any]) -> int | None:
    """Count the lines that are not blank; None for a pipe, which can be read only once."""
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return None
    except OSError:  # not a file of the operating system
        return None
    start = file.tell()
    count = sum(1 for line in file if line.strip())
    file.seek(start)
    return count


@contextmanager
def _appending(output: Path | None) -> Iterator[IO[bytes]]:
    if output is None:
        yield _bytes_of(sys.stdout)
    else:
        with output.open("ab") as file:
            yield file


@contextmanager
def without_engine_log() -> Iterator[None]:
    """Silence the log of failed requests: the `error` of an answer says the same."""
    logger = logging.getLogger("lightning_attention.inference.requests")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _with_progress(answers: Iterable[dict], total: int | None) -> Iterator[dict]:
    """Yield the answers, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(answers, "answering", total=total, console=console, disable=not console.is_terminal)
