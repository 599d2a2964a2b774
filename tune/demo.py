"""Entry: `python tune/demo.py` shows the whole system on one machine, with no flag, server or data set.

It draws three product categories, searches them on a local Ray, pulls the champions and inspects
test images with one of them. The teacher's weights come from the hub. If the hub cannot be reached,
an untrained teacher is used and every output is marked so. `--help` lists the flags.
"""

import sys

from dskd.arguments import parse_into
from tune.settings.demo import DemoSettings
from tune.settings.entry import end_at_once, run_entry

EXAMPLES = ("python tune/demo.py --out demo --trials 2",)


def main() -> None:
    """Run the demonstration; bad input prints one line and exits with code 2."""
    run_entry("demo", _demo, when_interrupted="the same command continues it")


def _demo() -> int:
    settings = parse_into(DemoSettings, sys.argv[1:], prog="tune/demo.py", examples=EXAMPLES)
    # Ray, MLflow and torch take seconds to import; --help and a mistyped flag need none of them.
    from tune.jobs.demo import demo

    return demo(settings)


if __name__ == "__main__":
    end_at_once(main)
