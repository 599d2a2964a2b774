"""Entry: `python tune/score.py DETECTOR --images DIR --out DIR` inspects many images on a Ray cluster."""

import sys

from dskd.arguments import parse_into
from tune.settings.entry import end_at_once, run_entry
from tune.settings.score import ScoringSettings

EXAMPLES = ("python tune/score.py detectors/flange --images my-images/flange/test --out scored",)


def main() -> None:
    """Inspect the images; bad input prints one line and exits with code 2."""
    run_entry("score", _score)


def _score() -> int:
    settings = parse_into(ScoringSettings, sys.argv[1:], prog="tune/score.py", examples=EXAMPLES)
    # Ray, MLflow and torch take seconds to import; --help and a mistyped flag need none of them.
    from tune.jobs.score import score

    return score(settings)


if __name__ == "__main__":
    end_at_once(main)
