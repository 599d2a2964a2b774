"""Entry: `python tune/pull.py CATEGORY…|all --name NAME --out DIR` downloads champions as detector folders."""

import sys

from dskd.arguments import parse_into
from tune.settings.entry import end_at_once, run_entry
from tune.settings.pull import PullSettings

EXAMPLES = (
    "python tune/pull.py all --name parts --out champions",
    "python tune/pull.py flange --alias champion --out registered",
    "python tune/pull.py flange --version 1 --out older",
)


def main() -> None:
    """Download the champions; bad input prints one line and exits with code 2."""
    run_entry("pull", _pull, when_interrupted="the same command continues it")


def _pull() -> int:
    settings = parse_into(PullSettings, sys.argv[1:], prog="tune/pull.py", examples=EXAMPLES)
    # Ray, MLflow and torch take seconds to import; --help and a mistyped flag need none of them.
    from tune.jobs.pull import pull

    return pull(settings)


if __name__ == "__main__":
    end_at_once(main)
