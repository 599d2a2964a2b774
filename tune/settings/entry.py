"""What the entries of `tune` share: how a run ends, whatever happens in it."""

import sys
from collections.abc import Callable
from typing import NoReturn

from dskd.arguments import UsageError


def run_entry(name: str, act: Callable[[], int], *, when_interrupted: str = "") -> NoReturn:
    """Exit with the code that `act` returns.

    Bad input (ValueError, OSError) is printed on stderr, each of its lines as an error of `name`, with exit
    code 2; Ctrl-C ends with `when_interrupted` and code 130. `act` parses the command line too.
    """
    try:
        sys.exit(act())
    except UsageError as error:  # names the program and its --help itself
        say(str(error))
        sys.exit(2)
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            say(f"{name}: error: {line}")
        sys.exit(2)
    except KeyboardInterrupt:
        say(f"{name}: interrupted{when_interrupted and f'; {when_interrupted}'}")
        sys.exit(130)


def say(line: str) -> None:
    """A line for the person at the terminal; stdout is for results."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201
