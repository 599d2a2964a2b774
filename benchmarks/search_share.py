"""A whole search against plain Ray Tune, side by side: `python benchmarks/search_share.py --data DIR --category C`.

Runs one search, one trial at a time, and then the same trainings as Ray's documentation has them (plain_search.py),
each as a command of its own. Prints for both: seconds until the first optimiser step, between two trials, and after
the last report; the whole, and the CPU seconds of all processes; and the ratios.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import psutil
import tyro
from mlflow.tracking import MlflowClient

from tune.tracking.runs import tracked_run

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    data: Path
    category: str
    teacher_weights: str = "hub"
    preset: str = "dskd"
    trials: int = 12
    epochs: int = 3
    image_size: int = 64
    batch_size: int = 16
    score_candidates: int = 0
    """Free trials of score parameters after a training; plain Ray Tune has none."""
    workers_per_trial: tuple[int, ...] = (1, 2)
    """Measured one after the other."""
    rounds: int = 1
    """How often both sides are run, in turn; medians are printed."""
    plain: bool = True
    """Run plain Ray Tune as well."""


class TrialTimes(NamedTuple):
    """Times of one trial: time stamps in seconds since 1970, durations in seconds."""

    first_step: float
    """Start of its first epoch."""
    last_report: float
    computing: float
    """Training and validation."""


class Command(NamedTuple):
    """What a whole command took."""

    first_step: float
    """Seconds after its start."""
    gaps: tuple[float, ...]
    """Seconds between the last report of a trial and the first step of the next one."""
    end: float
    """Seconds after the last report."""
    wall: float
    cpu: float
    """CPU seconds of all its processes."""
    computing: float
    """Seconds of training and validation."""


class Measured(NamedTuple):
    started: float
    ended: float
    cpu: float


def measured(words: Sequence[str], env: dict[str, str], log: Path) -> Measured:
    """Run a command, and add up the CPU time of all processes that it starts.

    Raises RuntimeError with the end of its output if it fails.
    """
    started, seen = time.time(), dict[tuple[int, float], float]()
    with log.open("w") as file:
        process = psutil.Popen([sys.executable, *words], cwd=ROOT, env=env, stdout=file, stderr=file)
    has_ended = threading.Event()

    def watch() -> None:
        while not has_ended.wait(0.25):
            for each in [process, *_descendants(process)]:
                try:
                    times = each.cpu_times()
                    seen[each.pid, each.create_time()] = times.user + times.system
                except psutil.Error:  # it has ended
                    continue

    watching = threading.Thread(target=watch)
    watching.start()
    code = process.wait()
    ended = time.time()
    has_ended.set()
    watching.join()
    if code != 0:
        raise RuntimeError(f"{words[0]} ended with {code}: {log.read_text()[-2000:]}")
    return Measured(started, ended, sum(seen.values()))


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = process.children(recursive=True)
        return found
    except psutil.Error:
        return []


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
                computing=sum(metric.value for metric in (*training, *validation)),
            )
        )
    return sorted(found)


def summary(command: Measured, trials: Sequence[TrialTimes]) -> Command:
    return Command(
        first_step=trials[0].first_step - command.started,
        gaps=tuple(after.first_step - before.last_report for before, after in pairwise(trials)),
        end=command.ended - trials[-1].last_report,
        wall=command.ended - command.started,
        cpu=command.cpu,
        computing=sum(trial.computing for trial in trials),
    )


def run_search(options: Options, workers: int, folder: Path, env: dict[str, str]) -> Command:
    """Run `tune/search.py`."""
    words = [
        "tune/search.py", "--data", str(options.data), "--categories", options.category, "--name", "share",
        "--trials", str(options.trials), "--epochs", str(options.epochs), "--image-size", str(options.image_size),
        "--batch-size", str(options.batch_size), "--teacher-weights", options.teacher_weights, "--folds", "0",
        "--preset", options.preset, "--score-candidates", str(options.score_candidates),
        "--storage", str(folder / "results"), "--workers-per-trial", str(workers),
        "--max-concurrent", "1",
    ]  # fmt: skip
    command = measured(words, env, folder / "search.log")
    return summary(command, read_trials(folder / "results", "share"))


def run_plain(options: Options, workers: int, folder: Path, env: dict[str, str]) -> Command:
    """Run the trainings of the search in `folder` again, by plain Ray Tune."""
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/results/mlflow.db")
    experiment = client.get_experiment_by_name("share")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`dskd.trial` != '-'")
    request = {
        "shared": {
            "data": str(options.data.absolute()), "category": options.category, "teacher": options.teacher_weights,
            "workers": workers, "storage": str(folder / "plain"),
        },
        "configs": [
            tracked_run(f"sqlite:///{folder}/results/mlflow.db", run.info.run_id).config.to_dict() for run in runs
        ],
        "out": str(folder / "times.json"),
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request))
    command = measured(["benchmarks/plain_search.py", str(folder / "request.json")], env, folder / "plain.log")
    epochs = json.loads((folder / "times.json").read_text())
    trials = []
    for number in {number for *_, number in epochs}:
        mine = [(began, ended) for began, ended, of in epochs if of == number]
        trials.append(TrialTimes(min(mine)[0], max(mine)[1], sum(ended - began for began, ended in mine)))
    return summary(command, sorted(trials))


def table(workers: int, ours: Sequence[Command], plain: Sequence[Command]) -> list[str]:
    """Lines of Markdown: medians over the rounds, and ratios."""

    def middle(commands: Sequence[Command], name: str) -> float:
        return float(statistics.median(getattr(command, name) for command in commands))

    def gap(commands: Sequence[Command]) -> float:
        return statistics.median(seconds for command in commands for seconds in command.gaps)

    lines = [f"| {workers} worker{'s' if workers > 1 else ''} | plain Ray | search | ratio |", "|---|---|---|---|"]
    rows = [
        ("command to first step, s", middle(plain, "first_step") if plain else None, middle(ours, "first_step")),
        ("between two trials, s", gap(plain) if plain else None, gap(ours)),
        ("last report to end, s", middle(plain, "end") if plain else None, middle(ours, "end")),
        ("training and validation, s", middle(plain, "computing") if plain else None, middle(ours, "computing")),
        ("**whole, s**", middle(plain, "wall") if plain else None, middle(ours, "wall")),
        ("**CPU seconds**", middle(plain, "cpu") if plain else None, middle(ours, "cpu")),
    ]
    for what, theirs, mine in rows:
        compared = "–" if theirs is None else f"{theirs:.2f}"
        ratio = "–" if theirs is None else f"{theirs / mine:.2f}"
        lines.append(f"| {what} | {compared} | {mine:.2f} | {ratio} |")
    return lines


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    print(
        f"python {platform.python_version()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; {options.preset}, "
        f"{options.trials} trials of {options.epochs} epochs, {options.image_size} pixels"
    )
    for workers in options.workers_per_trial:
        ours: list[Command] = []
        plain: list[Command] = []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory(prefix="share-") as temporary:
                folder = Path(temporary)
                env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DSKD_"))}
                env |= {
                    "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1",
                    "RAY_AUTH_MODE": "disabled",
                }  # fmt: skip
                ours.append(run_search(options, workers, folder, env))
                if options.plain:
                    plain.append(run_plain(options, workers, folder, env))
        print("\n".join(table(workers, ours, plain)), flush=True)


if __name__ == "__main__":
    main()
