"""The commands together."""

import typer

from . import bench, generate, info, train

app = typer.Typer(
    name="lightning-attention",
    help="Language models with Lightning Attention: constant time per token, constant memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.train)
app.command("generate")(generate.generate)
app.command("info")(info.info)
app.add_typer(bench.app, name="bench")
