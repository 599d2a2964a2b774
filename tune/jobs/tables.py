"""Tables on stderr that break no word: where the terminal is too narrow for one, a block of lines per row."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from dskd.show.lines import fitted, fitted_command
from tune.storage.shown import printable

_PIPE_WIDTH = 200
"""Columns where stderr is no terminal."""


def stderr_console() -> Console:
    """A console as wide as the terminal, or wide enough for every table where there is none."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else _PIPE_WIDTH, highlight=False)


def print_rows(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their columns, the first naming the row; as blocks if the table does not fit."""
    table = Table(title=Text(title))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, map(printable, row)))  # no markup: a folder may have any name
    if Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width:
        console.print(table)
        return
    print_line(console, title, "italic")
    width = max(len(column) for column in columns[1:])
    for row in rows:
        console.print(Text(printable(row[0]), style="bold"), soft_wrap=True)
        for column, cell in zip(columns[1:], row[1:], strict=True):
            console.print(Text(f"  {column:{width}}  {printable(cell)}"), soft_wrap=True)


def print_line(console: Console, line: str, style: str = "") -> None:
    """Print a line, broken between words if it is wider than the terminal."""
    console.print(Text(fitted(printable(line), _width(console)), style=style), soft_wrap=True)


def print_command(console: Console, command: str) -> None:
    """Print a command below the line that introduces it; it can be copied however narrow the terminal is."""
    console.print(Text(fitted_command(f"  {command}", _width(console))), soft_wrap=True)


def _width(console: Console) -> int | None:
    return console.width if console.is_terminal else None
