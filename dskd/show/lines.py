"""Lines for people: as wide as the terminal, broken between words and never within one."""

import os
import textwrap
from typing import IO

_USUAL_WIDTH = 80


def line_width(stream: IO[str]) -> int | None:
    """Columns of the terminal that `stream` writes to, or $COLUMNS; None if it is no terminal but a file or a pipe."""
    if not stream.isatty():
        return None
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    try:
        return os.get_terminal_size(stream.fileno()).columns or _USUAL_WIDTH
    except (OSError, ValueError):
        return _USUAL_WIDTH


def fitted(text: str, width: int | None, indent: int = 2) -> str:
    """The text with each line broken between words, further ones indented; None leaves it as it is.

    A word that is longer than the width, such as a path, stays whole and has a line of its own.

    >>> print(fitted("one two three", 8))
    one two
      three
    """
    if width is None:
        return text
    return "\n".join(_broken(line, width, indent) if len(line) > width else line for line in text.split("\n"))


def fitted_command(text: str, width: int | None) -> str:
    """As `fitted`, for a command that is copied: a line that goes on ends with a backslash, as a shell wants it."""
    if width is None or len(text) <= width:
        return text
    return " \\\n".join(_broken(text, width - 2, 4).split("\n"))


def _broken(line: str, width: int, indent: int) -> str:
    margin = " " * (len(line) - len(line.lstrip()))
    further = margin + " " * indent
    lines = textwrap.wrap(
        line, max(width, len(further) + 1), subsequent_indent=further, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)
