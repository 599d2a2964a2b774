"""Overhead of a search over training: `python benchmarks/search_share.py --data DIR --category C --storage NEW_DIR`.

Runs one search, one trial at a time, by default with one worker. Prints how long a slot of the cluster is idle
between a trial's last report and the first optimiser step of the next trial, and the share of the time that was
training. All times come from the search's MLflow file: the time of each epoch's report, and the seconds that its
worker measured for training and for validation.
"""

import os
import platform
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import tyro
from mlflow.tracking import MlflowClient

from tune.jobs.search import search
from tune.settings.plan import resolve_addresses
from tune.settings.search import SearchSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    data: str
    category: str
    storage: str
    """A folder that does not exist yet."""
    teacher_weights: str = "hub"
    trials: int = 4
    epochs: int = 30
    image_size: int = 128
    batch_size: int = 8
    workers_per_trial: int = 1


class TrialTimes(NamedTuple):
    """Times of one trial: time stamps in seconds since 1970, durations in seconds."""

    first_step: float
    """Start of its first epoch."""
    last_report: float
    training: float
    validation: float
    num_epochs: int


def read_trials(storage: Path, name: str) -> list[TrialTimes]:
    """Times of the trials of a search, in the order of their start; `storage` is the folder of its MLflow file."""
    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None, f"no search {name} in {storage}"
    found = []
    for run in client.search_runs([experiment.experiment_id], "tags.`dskd.trial` != '-'"):
        training, validation = (
            client.get_metric_history(run.info.run_id, f"time/{part}_seconds") for part in ("train", "validation")
        )
        ends = [metric.timestamp / 1000 for metric in training]
        found.append(
            TrialTimes(
                first_step=min(ends) - training[0].value - validation[0].value,
                last_report=max(ends),
                training=sum(metric.value for metric in training),
                validation=sum(metric.value for metric in validation),
                num_epochs=len(training),
            )
        )
    return sorted(found)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    settings = SearchSettings(
        data=options.data,
        categories=options.category,
        name="share",
        trials=options.trials,
        epochs=options.epochs,
        image_size=options.image_size,
        batch_size=options.batch_size,
        teacher_weights=options.teacher_weights,
        storage=options.storage,
        workers_per_trial=options.workers_per_trial,
        max_concurrent=1,
    )
    started = time.time()
    code = search(settings)
    wall = time.time() - started
    if code != 0:
        raise SystemExit(code)
    trials = read_trials(Path(resolve_addresses(settings).storage), settings.name)
    gaps = [after.first_step - before.last_report for before, after in pairwise(trials)]
    span = trials[-1].last_report - trials[0].first_step
    training = sum(trial.training for trial in trials)
    validation = sum(trial.validation for trial in trials)
    print(
        f"python {platform.python_version()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; "
        f"{options.image_size} pixels, batches of {options.batch_size}, trials of "
        f"{[trial.num_epochs for trial in trials]} epochs and "
        f"{[round(trial.last_report - trial.first_step) for trial in trials]} s"
    )
    print(f"from a trial's end to the next one's first step: median {median(gaps):.2f} s, longest {max(gaps):.2f} s")
    for what, seconds in (("first step to last report", span), ("the whole command", wall)):
        print(
            f"{what}: {seconds:.1f} s; training {training / seconds:.1%}, validation {validation / seconds:.1%}, "
            f"the rest {1 - (training + validation) / seconds:.1%}"
        )


if __name__ == "__main__":
    main()
