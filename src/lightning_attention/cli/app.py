"""The command line application, with all commands."""

from collections.abc import Sequence
from typing import Annotated

import typer

from ..version import __version__
from . import chat, compare, generate, info, merge, push, serve, tokenizer, train
from .options import Command, show_help_without_command

app = typer.Typer(
    name="lightning-attention",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train", cls=Command)(train.train)
app.command("merge", cls=Command)(merge.merge)
app.command("push", cls=Command)(push.push)
app.add_typer(tokenizer.tokenizer, name="tokenizer")
app.command("compare", cls=Command)(compare.compare)
app.command("generate", cls=Command)(generate.generate)
app.command("chat", cls=Command)(chat.chat)
app.command("serve", cls=Command)(serve.serve)
app.command("info", cls=Command)(info.info)


def run(commands: typer.Typer, program: str, arguments: Sequence[str]) -> int:
    """Run a command without handling its errors.

    Args:
        commands: the application.
        program: name of the program in its help.
        arguments: arguments of the command line, without the program.

    Returns:
        The exit code.
    """
    command = typer.main.get_command(commands)
    try:
        # Not `command()`, which takes EOFError for an interruption and writes to standard error.
        with command.make_context(program, list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as exit:
        return exit.exit_code
    except typer.Abort as abort:
        raise KeyboardInterrupt from abort
    return 0


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Language models with Lightning Attention: constant time per token and constant state size."""
    if version:
        print(__version__)
        raise typer.Exit
    show_help_without_command(context)


@app.command("bench", hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench() -> None:
    """Say where the benchmarks are."""
    raise ValueError("bench has moved: run python -m benchmarks in a clone of the repository")
