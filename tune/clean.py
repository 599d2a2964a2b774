"""Entry: `python tune/clean.py --name NAME` says what of a search's storage nobody needs; --delete removes it."""

import sys

from dskd.arguments import parse_into
from tune.settings.clean import CleanSettings
from tune.settings.entry import end_at_once, run_entry

EXAMPLES = (
    "python tune/clean.py --name parts",
    "python tune/clean.py --name parts --delete",
)


def main() -> None:
    """List or remove; bad input prints one line and exits with code 2."""
    run_entry("clean", _clean, when_interrupted="the same command continues it")


def _clean() -> int:
    settings = parse_into(CleanSettings, sys.argv[1:], prog="tune/clean.py", examples=EXAMPLES)
    # Optuna, which records need, takes a second to import; --help and a mistyped flag do not need it.
    from tune.jobs.clean import clean

    return clean(settings)


if __name__ == "__main__":
    end_at_once(main)
