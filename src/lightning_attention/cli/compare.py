"""`lightning-attention compare`: losses of several runs."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Argument, Option

from .imports import quick_imports

WIDTH = 160  # room for the table, also on a narrower terminal


def compare(
    runs: Annotated[list[Path], Argument(help="Output folders of runs, two or more.")],
    output: Annotated[Path, Option(help="PNG to write.")] = Path("compare.png"),
) -> None:
    """Plot the losses of training runs over each other, and print their last losses."""
    with quick_imports():
        from ..training.comparison import read_runs, remarks, table_of_runs
        from ..training.plots import plot_runs

    found = read_runs(runs)
    plot_runs(found, output)
    width = max(Console().width, WIDTH)
    console = Console(width=width, soft_wrap=True, markup=False, emoji=False, highlight=False)
    console.print(table_of_runs(found))
    for remark in remarks(runs):
        console.print(remark)
    console.print(f"plot  {output}")
