"""Command lines to commands, with bad usage answered in one line.

tyro makes the flags from the signatures and the help from the docstrings. Its answer to a mistake is a framed
text of many lines, though, which no log and no script wants; here it becomes `UsageError`.
"""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from dskd.config import RunConfig
from dskd.presets import PRESETS

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_ALWAYS_KNOWN = ("help", "tyro-print-completion", "tyro-write-completion")


Result = TypeVar("Result")


class UsageError(ValueError):
    """A command line that cannot be understood; the message is one line that says what to change."""


def parse(
    commands: Mapping[str, Callable[..., None]], arguments: Sequence[str], *, prog: str, description: str
) -> Callable[[], None]:
    """The command named by the first of `arguments`, ready to be called with what the others say.

    Prints help and exits where that is asked for. Raises UsageError, and the ValueError of a configuration
    that is out of range.
    """
    name = arguments[0] if arguments else ""
    if name not in commands and not name.startswith("-"):
        what = f"unknown command {name}{_near(name, commands)}" if name else "no command given"
        raise UsageError(f"{prog}: error: {what}; there are: {', '.join(commands)}")
    if name in commands:
        prog = f"{prog} {name}"
        _refuse_unknown(arguments[1:], _flags(commands[name]), prog)
    with _one_line_of_mistakes(prog, arguments):
        command: Callable[[], None] = tyro.extras.subcommand_cli_from_dict(
            {name: deferred(command) for name, command in commands.items()},
            prog=prog.split()[0],
            description=description,
            args=arguments,
        )
    return command


def parse_into(target: Callable[..., Result], arguments: Sequence[str], *, prog: str) -> Result:
    """What `target`, a dataclass or a `deferred` function, gives with the arguments: a program of one command.

    Prints help and exits where that is asked for. Raises UsageError, and the ValueError of a value that is
    out of range.
    """
    _refuse_unknown(arguments, _flags(target), prog)
    with _one_line_of_mistakes(prog, arguments):
        return tyro.cli(target, prog=prog, args=arguments)


@contextlib.contextmanager
def _one_line_of_mistakes(prog: str, arguments: Sequence[str]) -> Iterator[None]:
    said = io.StringIO()
    try:
        # Only what tyro says of a mistake: help goes to stdout, and the command itself runs later.
        wants_help = not {"-h", "--help"}.isdisjoint(arguments)
        with contextlib.redirect_stderr(said), contextlib.nullcontext() if wants_help else _wide_lines():
            yield
    except SystemExit as end:
        if not end.code:
            raise
        raise UsageError(f"{prog}: error: {_unframed(said.getvalue())}; see {prog} --help") from None
    sys.stderr.write(said.getvalue())


def deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The same signature and docstring, but a call only takes the arguments."""
    if isinstance(command, functools.partial):
        return functools.partial(deferred(command.func), *command.args, **command.keywords)

    @functools.wraps(command)
    def take(*given: object, **named: object) -> Callable[[], None]:
        return functools.partial(command, *given, **named)

    return take


def _refuse_unknown(words: Sequence[str], flags: Iterable[str], prog: str) -> None:
    known = {f"--{flag}" for flag in flags}
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            raise UsageError(f"{prog}: error: unknown flag {flag}{_near(flag, known)}; see {prog} --help")


def _flags(command: Callable[..., Any]) -> list[str]:
    """Names of the flags that a command takes, those of a configuration's fields included."""
    flags = list(_ALWAYS_KNOWN)
    if dataclasses.is_dataclass(command):
        return flags + _spellings("", command)
    hints = typing.get_type_hints(getattr(command, "func", command))
    for name, parameter in inspect.signature(command).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            flags += _spellings(name, hints[name])
    return flags


def _spellings(name: str, kind: Any) -> list[str]:
    if dataclasses.is_dataclass(kind):
        return [flag for field, inner in typing.get_type_hints(kind).items() for flag in _spellings(field, inner)]
    flag = name.replace("_", "-")
    return [flag, f"no-{flag}"] if kind is bool else [flag]


def _near(word: str, known: Iterable[str]) -> str:
    bare = {name.lstrip("-"): name for name in known}  # two dashes in common are no likeness
    close = difflib.get_close_matches(word.lstrip("-"), bare, n=1)
    return f", did you mean {bare[close[0]]}?" if close else ""


def _unframed(box: str) -> str:
    """The message in tyro's box, in one line; what does not look like one comes whole.

    The box is drawn with lines above and below the message, in ASCII where stdout is not UTF-8.
    """
    blocks: list[list[str]] = [[]]
    for line in _ANSI.sub("", box).splitlines():
        if line.startswith("╭") or re.fullmatch(r"[│ ]*[─-]+[│ ]*", line):
            blocks.append([])
        else:
            blocks[-1].append(line[2:].strip("│").rstrip())
    message = blocks[1] if len(blocks) > 1 else box.splitlines()
    if message and message[0].startswith("Missing from"):
        # Each missing argument is indented by four, its help by eight.
        return f"missing {', '.join(line.strip() for line in message if re.match(r' {4}[^ ]', line))}"
    text = " ".join(line.strip() for line in message if line.strip()).rstrip(".")
    text = re.sub(r"^Error parsing (__tyro\S*|[A-Z]\w*): ", "", text)  # a configuration's own message names its field
    text = re.sub(r"^Error parsing (\S+): ", r"\1: ", text)
    return re.sub(r"^Unrecognized options: ", "unexpected ", text) or "cannot be understood"


@contextlib.contextmanager
def _wide_lines() -> Iterator[None]:
    """tyro asks for the terminal's width; in a line without end it breaks no word."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def default_config(arguments: Sequence[str]) -> RunConfig:
    """What the flags of a configuration stand at unless given, as the preset and the file in the arguments say.

    They are looked up before all flags are parsed, since the help shows these values.
    """
    preset = value_of("--preset", arguments)
    if preset not in PRESETS:
        preset = None  # the parser refuses a bad name, and says which there are
    if file := value_of("--config", arguments):
        from dskd.presets import read_config

        return read_config(Path(file), preset)
    return PRESETS[preset or "dskd"]


def value_of(wanted: str, arguments: Sequence[str]) -> str | None:
    """The last value given for a flag, as the parser takes it."""
    found = None
    for position, word in enumerate(arguments):
        flag, equals, value = word.partition("=")
        if flag == wanted:
            found = value if equals else "".join(arguments[position + 1 : position + 2])
    return found
