"""`lightning-attention tokenizer`: tokenizers for training."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Context, Option

from .imports import quick_imports
from .options import Command, check_at_least, show_help_without_command

tokenizer = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@tokenizer.callback(invoke_without_command=True)
def main(context: Context) -> None:
    """Make tokenizers."""
    show_help_without_command(context)


@tokenizer.command("train", cls=Command)
def train(
    data: Annotated[list[Path], Option(help="File or folder, as for train. Repeat for more.")],
    output: Annotated[Path, Option(help="Folder for the tokenizer; it must be empty or not exist.")],
    vocab_size: Annotated[int, Option(help="Number of tokens.")] = 32768,
    text_field: Annotated[
        str | None, Option(help="Field of a .jsonl line, or column of a .parquet file. By default text, or messages.")
    ] = None,
    max_bytes: Annotated[int, Option(help="Bytes of text to read, at most.")] = 1 << 30,
    seed: Annotated[int, Option(help="Seed of the order of the files.")] = 0,
) -> None:
    """Train a byte-level BPE on text, for train --tokenizer."""
    check_at_least(1, max_bytes=max_bytes)
    with quick_imports():
        from rich.console import Console
        from rich.progress import Progress

        from ..training.bpe import LEAST, check_free, save_tokenizer, train_bpe
        from ..training.documents import Sources

    check_at_least(LEAST, vocab_size=vocab_size)
    check_free(output)
    sources = Sources.find(data, text_field, seed)
    total = min(max_bytes, sum(file.stat().st_size for file in sources.files))
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("reading", total=total)
        found = train_bpe(sources, vocab_size, max_bytes=max_bytes, progress=lambda count: progress.advance(bar, count))
    print(f"tokenizer  {save_tokenizer(found, output)}: {len(found):,} tokens")
