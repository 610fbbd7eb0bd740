"""Checks of options that click accepts silently."""

from collections.abc import Iterable
from math import isfinite
from typing import Any

import typer
from typer.core import TyperCommand

from .errors import is_out_of_memory

MAY_BE_EMPTY = {"prompt"}
# Parameters that determine memory use.
SIZES = "batch_size", "max_requests", "prefix_slots", "sequence_length", "segment_length", "length", "heads", "head_dim"
SIZES += ("size",)


class Command(TyperCommand):
    """Command that refuses options given twice, empty options, and numbers that are not finite or exceed 64 bits.

    If memory runs out, the error names the options to lower.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, _, order = self.make_parser(ctx).parse_args(list(args))
        for param in order:
            takes_one = not (param.multiple or getattr(param, "is_flag", False))
            if takes_one and order.count(param) > 1:
                raise ValueError(f"{param.opts[-1]} is given {order.count(param)} times: give it once")
            if "" in (given[param.name] if param.multiple else [given[param.name]]) and param.name not in MAY_BE_EMPTY:
                raise ValueError(f"{param.opts[-1]} must not be empty")
        rest = super().parse_args(ctx, args)
        for param in order:
            for value in _values(ctx.params.get(param.name)):
                if isinstance(value, float) and not isfinite(value):
                    raise ValueError(f"{param.opts[-1]} must be a finite number, got {value}")
                if isinstance(value, int) and not -(2**63) <= value < 2**63:
                    raise ValueError(f"{param.opts[-1]} must be an integer of 64 bits")
        return rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            names = {param.name for param in self.params}
            lower = option_names(name for name in SIZES if name in names)
            parts = ["out of memory", f": lower {lower}" if lower else "", f" ({error})" if str(error) else ""]
            raise MemoryError("".join(parts)) from error


def check_at_least(least: int, **values: Any) -> None:
    """Check that options are at least `least`.

    Args:
        least: the lower bound.
        values: number, numbers, or None, which passes, by parameter.

    Raises:
        ValueError: a value is below the bound.
    """
    for name, value in values.items():
        for x in _values(value):
            if x is not None and not x >= least:
                raise ValueError(f"{option_names([name])} must be at least {least}, got {x}")


def given_options(context: typer.Context) -> set[str]:
    """Parameters that are given on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def option_names(parameters: Iterable[str]) -> str:
    """Options of parameters, for messages: `--batch-size, --size`."""
    return ", ".join("--" + name.replace("_", "-") for name in parameters)


def show_help_without_command(context: typer.Context) -> None:
    """Show the help of a group of commands if no command is given."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def _values(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else [value]
