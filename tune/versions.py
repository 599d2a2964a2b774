"""Entry: `python tune/versions.py CATEGORY` shows a category's registered detectors and their champion."""

import sys

from dskd.arguments import parse_into
from tune.settings.entry import end_at_once, run_entry
from tune.settings.versions import VersionsSettings

EXAMPLES = (
    "python tune/versions.py flange",
    'python tune/versions.py flange --champion 1 --reason "version 2 misses rust on line 3"',
)


def main() -> None:
    """Show the versions; bad input prints one line and exits with code 2."""
    run_entry("versions", _versions)


def _versions() -> int:
    settings = parse_into(VersionsSettings, sys.argv[1:], prog="tune/versions.py", examples=EXAMPLES)
    # MLflow takes seconds to import; --help and a mistyped flag need none of it.
    from tune.jobs.versions import versions

    return versions(settings)


if __name__ == "__main__":
    end_at_once(main)
