"""Entry: `python tune/search.py --data DIR`, locally or as a Ray job; `--help` lists the flags."""

import sys

from dskd.arguments import parse_into
from tune.settings.entry import end_at_once, run_entry
from tune.settings.search import SearchSettings

EXAMPLES = (
    "python tune/search.py --data my-images --name parts --trials 8 --dry-run",
    "python tune/search.py --data my-images --name parts --trials 8",
    "python tune/search.py --data my-images --name parts-2 --start-from parts",
)


def main() -> None:
    """Run the search; bad input prints one line per error and exits with code 2."""
    run_entry("search", _search, when_interrupted="the same command continues it")


def _search() -> int:
    settings = parse_into(SearchSettings, sys.argv[1:], prog="tune/search.py", examples=EXAMPLES)
    # Ray, MLflow and torch take seconds to import; --help and a mistyped flag need none of them.
    if settings.dry_run:
        from tune.preflight.dry_run import dry_run

        return dry_run(settings)
    from tune.jobs.search import search

    return search(settings)


if __name__ == "__main__":
    end_at_once(main)
