"""Entry: `python tune/train.py --data DIR --category C --out DIR` trains one detector, locally or as a Ray job."""

import dataclasses
import functools
import sys
from collections.abc import Sequence

from dskd.arguments import ConfigSource, parse_into, parse_known
from dskd.config import RunConfig
from tune.settings.entry import end_at_once, run_entry
from tune.settings.train import training_settings
from tune.tracking.runs import tracked_run, tracking_store

EXAMPLES = ("python tune/train.py --data my-images --category flange --preset stfpm --out detectors/flange",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Defaults(ConfigSource):
    """The flags that set the defaults of the configuration's flags."""

    from_run: str | None = None
    tracking_uri: str | None = None
    storage: str | None = None


def _config_of(arguments: Sequence[str]) -> RunConfig:
    """Defaults of the configuration's flags: those of the run to repeat, the preset or the file."""
    chosen = parse_known(_Defaults, arguments, prog="tune/train.py")
    if chosen.from_run is None or not {"-h", "--help"}.isdisjoint(arguments):
        return chosen.read()
    if other := [flag for flag in ("preset", "config") if getattr(chosen, flag) is not None]:
        raise ValueError(f"--from-run and --{other[0]} exclude each other: both set the configuration.")
    run = tracked_run(tracking_store(chosen.tracking_uri, chosen.storage), chosen.from_run)
    return chosen.with_length(run.config)


def main() -> None:
    """Train one detector; bad input prints one line and exits with code 2."""
    run_entry("train", _train, when_interrupted="the same command continues it")


def _train() -> int:
    flags = functools.partial(training_settings, settings=_config_of(sys.argv[1:]))
    settings = parse_into(flags, sys.argv[1:], prog="tune/train.py", examples=EXAMPLES)
    # Ray, MLflow and torch take seconds to import; --help and a mistyped flag need none of them.
    from tune.jobs.train import train

    return train(settings)


if __name__ == "__main__":
    end_at_once(main)
