"""Entry: `python tune/search.py --data DIR`, locally or as a Ray job; `--help` lists the flags."""

import sys

from dskd.arguments import UsageError, parse_into
from tune.settings.search import SearchSettings


def main() -> None:
    """Search as the flags say; bad input ends with one line and exit code 2."""
    try:
        settings = parse_into(SearchSettings, sys.argv[1:], prog="tune/search.py")
    except UsageError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except ValueError as error:
        print(f"search: error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    # Ray, MLflow and torch take seconds to import; --help and a mistyped flag need none of them.
    if settings.dry_run:
        from tune.preflight.dry_run import dry_run

        sys.exit(dry_run(settings))
    from tune.jobs.search import launch

    sys.exit(launch(settings))


if __name__ == "__main__":
    main()
