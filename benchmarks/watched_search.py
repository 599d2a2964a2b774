"""A search that is watched from outside: its driver's process, and what storage, study and MLflow hold of it."""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from mlflow.tracking import MlflowClient

from dskd.detector import Detector
from tune.storage.files import Storage
from tune.trial.checkpoints import newest_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def environment(folder: Path) -> dict[str, str]:
    """Environment of all processes: servers of this process's environment if any, a token, a checkpoint every epoch."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DSKD_CHECKPOINT"))}
    embedded = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "DSKD_STUDY_STORAGE": f"sqlite:///{folder}/optuna.db",
        "DSKD_STORAGE": str(folder / "results"),
    }
    return embedded | kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "DSKD_CHECKPOINT_SECONDS": "0",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


@dataclass
class Search:
    """The driver process of one search, restarted whenever it was killed."""

    name: str
    words: list[str]
    env: dict[str, str]
    folder: Path
    code: Path = ROOT
    """Folder of the project whose code the driver runs."""
    driver: "subprocess.Popen[bytes]" = field(init=False)

    def start(self, prefix: Sequence[str] = ()) -> "Search":
        """Start the driver; `prefix` is put before its command."""
        with (
            (self.folder / f"{self.name}.json").open("wb") as out,
            (self.folder / f"{self.name}.log").open("ab") as log,
        ):
            self.driver = subprocess.Popen(
                [*prefix, *self.command], cwd=self.code, env=self.env, stdout=out, stderr=log, start_new_session=True,
            )  # fmt: skip
        return self

    @property
    def command(self) -> list[str]:
        return [sys.executable, "tune/search.py", "--name", self.name, *self.words]

    @property
    def said(self) -> str:
        """All that its drivers have said."""
        return (self.folder / f"{self.name}.log").read_text()

    def kill(self) -> None:
        os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.wait()

    def end(self) -> None:
        """Leave nothing running."""
        if not self.has_ended:
            self.kill()

    @property
    def has_ended(self) -> bool:
        return self.driver.poll() is not None

    def checkpoints(self) -> dict[str, str]:
        """The last checkpoint of every trial."""
        workers = Storage(f"{self.env['DSKD_STORAGE']}/{self.name}/workers")
        trials = [(f"{workers.uri}/{name}", each) for name in workers.names("") for each in workers.names(name)]
        return {f"{place}/{trial}": newest_checkpoint(place, trial) for place, trial in trials}

    def outcome(self, seconds: float) -> dict[str, Any]:
        """The first category's result in the search's JSON document.

        Raises RuntimeError with the end of its log if it failed.
        """
        return self.outcomes(seconds)[0]

    def outcomes(self, seconds: float) -> list[dict[str, Any]]:
        """Those of all categories, by name; errors as `outcome`."""
        code = self.driver.wait(seconds)
        if code != 0:
            raise RuntimeError(f"{self.name} ended with exit code {code}:\n{self.said[-3000:]}")
        document = (self.folder / f"{self.name}.json").read_text()
        found: list[dict[str, Any]] = json.loads(document)["categories"]
        return sorted(found, key=lambda each: str(each["category"]))


class Account(NamedTuple):
    """State of a search's trials, as recorded by MLflow and Optuna."""

    statuses: Counter[str]
    doubled: int
    """Extra runs of the same trial, and extra finished trials of the study."""
    redone: int
    """Epochs that were reported twice."""
    untracked: int
    """Epochs before a trial's last that are missing in MLflow."""
    champion: tuple[tuple[str, str], ...]
    """Configuration and objective of the best finished trial."""


def study_of(url: str, name: str, category: str) -> optuna.Study:
    """The study of a search's category, whose name in a shared database has a part of its own at its end."""
    (found,) = [known for known in optuna.get_all_study_names(url) if known.split("/")[:2] == [name, category]]
    return optuna.load_study(study_name=found, storage=url)


def account(env: Mapping[str, str], name: str, category: str, trials: int) -> Account:
    """Count a category's trials in a search that has ended."""
    client = MlflowClient(tracking_uri=env["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None, name
    runs = [
        run
        for run in client.search_runs([experiment.experiment_id], max_results=5000)
        if "mlflow.parentRunId" in run.data.tags and run.data.tags["dskd.category"] == category
    ]
    known = [run for run in runs if run.data.tags["dskd.status"] != "lost"]
    redone = untracked = 0
    for run in known:
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
        redone += len(steps) - len(set(steps))
        untracked += max(steps, default=0) - len(set(steps))
    names = Counter(run.data.tags["dskd.trial"] for run in runs)
    study = study_of(env["DSKD_STUDY_STORAGE"], name, category)
    complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    best = max(
        (run for run in known if run.data.tags["dskd.status"] == "finished"),
        key=lambda run: float(run.data.metrics["val/best_objective"]),
    )
    return Account(
        statuses=Counter(run.data.tags["dskd.status"] for run in runs),
        doubled=sum(count - 1 for count in names.values()) + max(0, len(complete) - trials),
        redone=redone,
        untracked=untracked,
        champion=(*sorted(best.data.params.items()), ("objective", f"{best.data.metrics['val/best_objective']:.6f}")),
    )


def pull(env: dict[str, str], name: str, folder: Path) -> list[str]:
    """Pull every champion of a search; returns the categories whose detector loads."""
    subprocess.run(
        [sys.executable, "tune/pull.py", "all", "--name", name, "--storage", env["DSKD_STORAGE"], "--out", str(folder)],
        cwd=ROOT, env=env, check=True, capture_output=True,
    )  # fmt: skip
    arrived = sorted(each for each in folder.iterdir() if each.is_dir())
    return [each.name for each in arrived if Detector.load(each)]
