"""Command lines to commands, with bad usage answered in one line.

tyro makes the flags from the signatures and the help from the docstrings. What it prints about a mistake is a
framed text of many lines, which no log and no script wants; here it becomes `UsageError`.
"""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

# tyro 1.0.17 has no public way to get a mistake as data: `console_outputs=False` drops the message, and all else
# prints it framed. This module is private but documented for this use, so pyproject.toml holds tyro below 1.1.
# An event that is unknown here is printed by tyro as it is.
from tyro import _errors as mistakes
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from dskd.config import RunConfig, TeacherSource
from dskd.presets import PRESETS, Preset, read_config, with_backbone

_ALWAYS_KNOWN = ("help", "tyro-print-completion", "tyro-write-completion")

Result = TypeVar("Result")

_UNSET = "unset"
"""What the help shows as the default of a flag that may be left out."""
_registry = ConstructorRegistry()


@_registry.primitive_rule
def _optional(kind: PrimitiveTypeInfo) -> "PrimitiveConstructorSpec[Any] | None":
    """A flag that may be left out takes what it takes: the help says STR and not {None}|STR."""
    alternatives = typing.get_args(kind.type)
    if kind.type_origin not in (types.UnionType, typing.Union) or type(None) not in alternatives:
        return None
    others = [each for each in alternatives if each is not type(None)]
    if len(others) != 1:
        return None
    inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(others[0], kind.markers))
    if not isinstance(inner, PrimitiveConstructorSpec):
        return None
    return dataclasses.replace(
        inner,
        is_instance=lambda value: value is None or inner.is_instance(value),
        str_from_instance=lambda value: [_UNSET] if value is None else inner.str_from_instance(value),
    )


class UsageError(ValueError):
    """A command line that cannot be understood; the message is one line that says what to change."""


def parse(
    commands: Mapping[str, Callable[..., None]],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str,
    version: str,
    examples: Mapping[str, Sequence[str]],
) -> Callable[[], None]:
    """The command named by the first of `arguments`, ready to be called with what the others say.

    The help of a command ends with its `examples`, that of all with the first of each. Prints help or the version and
    exits where that is asked for. Raises UsageError, also for the ValueError of a configuration that is out of range.
    """
    name = arguments[0] if arguments else ""
    if name not in commands and not name.startswith("-"):
        what = f"unknown command {name}{_near(name, commands)}" if name else "no command given"
        raise UsageError(f"{prog}: error: {what}; there are: {', '.join(commands)}")
    if name == "--version":
        print(prog, version)  # noqa: T201 - beside the help, which tyro prints
        sys.exit(0)
    known = _flags(commands[name]) if name in commands else [*_ALWAYS_KNOWN, "version"]
    shown = examples[name] if name in commands else [lines[0] for lines in examples.values()]
    with (
        _ending_with(shown, arguments),
        mistakes.on_parse_error(_one_line(f"{prog} {name}" if name in commands else prog, known)),
    ):
        command: Callable[[], None] = tyro.extras.subcommand_cli_from_dict(
            {name: deferred(command) for name, command in commands.items()},
            prog=prog,
            description=f"{description}\n\n{prog} {version}; --version prints this.",
            args=arguments,
            registry=_registry,
        )
    return command


def parse_into(
    target: Callable[..., Result], arguments: Sequence[str], *, prog: str, examples: Sequence[str]
) -> Result:
    """The result of `target`, a dataclass or a `deferred` function, with the arguments; for programs of one command.

    Prints help, with the `examples` at its end, and exits where that is asked for. Raises UsageError, also for the
    ValueError of a value that is out of range.
    """
    with _ending_with(examples, arguments), mistakes.on_parse_error(_one_line(prog, _flags(target))):
        return tyro.cli(target, prog=prog, args=arguments, registry=_registry)


@contextlib.contextmanager
def _ending_with(examples: Sequence[str], arguments: Sequence[str]) -> Iterator[None]:
    """Print the examples after the help, if that is what `arguments` ask for; tyro has no place for them."""
    try:
        yield
    except SystemExit as end:
        if not end.code and not {"-h", "--help"}.isdisjoint(arguments):
            print("\nexamples:")  # noqa: T201 - beside the help, which tyro prints
            for example in examples:
                print(f"  {example}")  # noqa: T201
        raise


def parse_known(target: type[Result], arguments: Sequence[str], *, prog: str) -> Result:
    """The dataclass `target` with the flags that it knows; all other arguments are left to a later `parse`.

    For what decides the defaults of other flags, which the help shows. Raises UsageError.
    """
    with mistakes.on_parse_error(_one_line(prog, _flags(target))):
        found, _ = tyro.cli(
            target, prog=prog, args=arguments, return_unknown_args=True, add_help=False, registry=_registry
        )
    return found


def deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The same signature and docstring, but a call only takes the arguments."""
    if isinstance(command, functools.partial):
        return functools.partial(deferred(command.func), *command.args, **command.keywords)

    @functools.wraps(command)
    def take(*given: object, **named: object) -> Callable[[], None]:
        return functools.partial(command, *given, **named)

    return take


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigSource:
    """The flags that say where the values of a configuration's other flags come from."""

    config: Path | None = None
    preset: Preset | None = None
    backbone: str | None = None
    teacher_weights: str | None = None
    steps: int | None = None
    epochs: int | None = None

    def read(self) -> RunConfig:
        """The configuration of the file, or of the preset, with what goes with the teacher and length of the flags.

        Raises ValueError as `read_config`, and if two lengths are given.
        """
        backbone = self.backbone or TeacherSource(self.teacher_weights or "hub").backbone
        if self.config is not None:
            return self.with_length(read_config(self.config, self.preset, backbone))
        usual = PRESETS[self.preset or "dskd"]
        return self.with_length(usual if backbone is None else with_backbone(usual, backbone))

    def with_length(self, config: RunConfig) -> RunConfig:
        """The configuration with the length that the flags give.

        Raises ValueError if they give two.
        """
        return config.with_values(given_length(self.steps, self.epochs))


def given_length(steps: int | None, epochs: int | None) -> dict[str, int]:
    """The one of `--steps` and `--epochs` that is given, by name; nothing if neither is.

    Raises ValueError if both are.
    """
    if steps is not None and epochs is not None:
        raise ValueError("--steps and --epochs exclude each other: both say how long to train; leave one out.")
    return {name: length for name, length in (("steps", steps), ("epochs", epochs)) if length is not None}


def _one_line(prog: str, known_flags: Iterable[str]) -> mistakes.ParseErrorHook:
    """A hook that raises a mistake in the arguments of `prog` as UsageError."""

    def raise_it(event: mistakes.ParseErrorEvent, /) -> None:
        if message := _message(event, [f"--{flag}" for flag in known_flags]):
            raise UsageError(f"{prog}: error: {' '.join(message.split()).rstrip('.')}; see {prog} --help")

    return raise_it


def _message(event: mistakes.ParseErrorEvent, known: Sequence[str]) -> str | None:
    """What is wrong, in one line; None for what only tyro knows how to say."""
    match event:
        case mistakes.UnrecognizedArgs(tokens=tokens):
            return _unexpected(tokens, known)
        case mistakes.MissingArgs(unrecognized_tokens=tokens) if any(word.startswith("--") for word in tokens):
            # A required flag that is only mistyped.
            return _unexpected(tokens, known)
        case mistakes.MissingArgs(missing_arguments=missing):
            words = [
                str(each.arg.lowered.metavar)
                if each.arg.is_positional()
                else f"{each.arg.display_name()} {each.arg.lowered.metavar}"
                for each in missing
            ]
            return f"missing {', '.join(words)}"
        case mistakes.BadValue(reason="too_few_values", argument=argument):
            return f"Missing value for argument '{argument.display_name()}'"
        case mistakes.InvalidChoice(value=value, argument=argument, choices=choices):
            return f"invalid choice '{value}' for argument '{argument.display_name()}', there are: {', '.join(choices)}"
        case mistakes.InstantiationFailure(message=message, argument=argument):
            if argument is None:
                return message  # a configuration's own message names its field
            if "Got errors:" in message:  # of each type that the flag can have, the one beside None last
                message = message.rpartition(">: ")[2]
            return f"{argument.lowered.metavar if argument.is_positional() else argument.display_name()}: {message}"
    return None


def _unexpected(words: Sequence[str], known: Sequence[str]) -> str:
    for word in words:
        if word.startswith("--"):
            flag = word.partition("=")[0].replace("_", "-")
            return f"unknown flag {flag}{_near(flag, known)}"
    return f"unexpected {' '.join(words)}"


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
    bare = {name.lstrip("-"): name for name in known}  # the two dashes must not count as likeness
    close = difflib.get_close_matches(word.lstrip("-"), bare, n=1)
    return f", did you mean {bare[close[0]]}?" if close else ""
