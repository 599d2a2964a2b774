"""Entry: `python tune/serve.py CATEGORY…|all --name NAME` serves champions over HTTP, with the inspector's page."""

import sys

from dskd.arguments import parse_into
from tune.settings.entry import end_at_once, run_entry
from tune.settings.serve import ServeSettings

EXAMPLES = (
    "python tune/serve.py all --name parts",
    "python tune/serve.py flange --alias champion --replicas 2",
)


def main() -> None:
    """Serve until Ctrl-C; bad input prints one line and exits with code 2."""
    run_entry("serve", _serve)


def _serve() -> int:
    settings = parse_into(ServeSettings, sys.argv[1:], prog="tune/serve.py", examples=EXAMPLES)
    # Ray, MLflow and torch take seconds to import; --help and a mistyped flag need none of them.
    from tune.jobs.serve import serve_champions

    return serve_champions(settings)


if __name__ == "__main__":
    end_at_once(main)
