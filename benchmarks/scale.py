"""What a search's driver pays for a trial, with the real study and trials that take no time: does it stay flat?

    python benchmarks/scale.py --trials 1000 --sampler tpe

One category, its study code, Optuna and MLflow as in a search, each in a file; the worker groups are replaced by an
actor that answers at once. Every `--window` ended trials a row tells CPU seconds of this process per trial: in all,
of `suggest`, of what is written to MLflow, and of the rest (Ray Tune, the trials' records). Tune's relays and Ray's own
processes are not in it. The wall time per trial says how many such trials one driver can drive.
"""

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import optuna
import ray
import tyro

from dskd.data.datasets import find_categories
from tune.runtime.relay import relayed
from tune.settings.plan import plan_search, resolve_addresses
from tune.settings.search import SamplerName, SearchSettings
from tune.settings.workers import Workers
from tune.storage.files import Storage
from tune.study.budget import Share, Shares
from tune.study.category import search_category
from tune.study.hooks import Searcher
from tune.tracking.events import CategoryContinued, Event, TrialEnded
from tune.tracking.tracker import Tracker
from tune.trial.assignment import News, Training
from tune.trial.spec import CHECKPOINT, EPOCH, OBJECTIVE, spec_of

_DISPATCHER = "answers-at-once"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    trials: int = 1000
    epochs: int = 3
    """Reports of a trial."""
    sampler: SamplerName = "random"
    at_once: int = 8
    """Trials at once."""
    window: int = 100
    """Ended trials of a row."""


@ray.remote(num_cpus=0)
class AnswersAtOnce:
    """In place of the dispatcher and its worker groups: each assignment is known, and all its reports are there."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._known: dict[str, float] = {}

    def submit(self, assignment: Training) -> None:
        rate = float(assignment.spec.config["train"]["learning_rate"])
        self._known[assignment.key] = 0.5 + min(rate, 0.01)

    def follow(self, key: str, after: int) -> News:
        if key not in self._known:
            return News(is_known=False)
        reports = tuple(
            {EPOCH: epoch, OBJECTIVE: self._known[key] + epoch / 100, CHECKPOINT: f"workers/{key}"}
            for epoch in range(max(after, 0) + 1, self._epochs + 1)
        )
        return News(reports=reports, is_over=True)

    def keep_only(self, category: str, keys: list[str]) -> None:
        self._known = {key: value for key, value in self._known.items() if key in keys}

    def drop(self, key: str) -> None:
        self._known.pop(key, None)


class Costs:
    """CPU seconds of this process, in all and of two of its parts."""

    def __init__(self) -> None:
        self.parts = {"suggest": 0.0, "MLflow": 0.0}
        self.num_ended = 0
        self._before = (time.process_time(), time.perf_counter(), dict(self.parts), 0)

    def counting(self, part: str, act: Callable[..., Any]) -> Callable[..., Any]:
        """`act`, whose CPU time in its own thread is added to a part."""

        def counted(*args: Any, **words: Any) -> Any:
            before = time.thread_time()
            try:
                return act(*args, **words)
            finally:
                self.parts[part] += time.thread_time() - before

        return counted

    def row(self) -> str:
        """Per trial since the last row, in milliseconds."""
        cpu, wall, parts, ended = self._before
        self._before = (time.process_time(), time.perf_counter(), dict(self.parts), self.num_ended)
        number = max(1, self.num_ended - ended)
        whole = (self._before[0] - cpu) / number * 1000
        of_parts = [(self.parts[name] - parts[name]) / number * 1000 for name in parts]
        took = (self._before[1] - wall) / number * 1000
        cells = [whole, *of_parts, whole - sum(of_parts), took]
        return f"| {self.num_ended} | {' | '.join(f'{cell:.0f}' for cell in cells)} |"


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, ray {ray.__version__}, optuna {optuna.__version__}")
    print(
        f"{options.trials} trials of {options.epochs} reports, sampler {options.sampler}, {options.at_once} at once\n"
    )
    print(
        "| trials ended | CPU ms a trial | suggest | MLflow | the rest | wall ms a trial |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(prefix="dskd-scale-") as folder:
        num_finished = drive(options, Path(folder))
    print(f"\n{num_finished} trials finished, the others were pruned", flush=True)


def drive(options: Options, folder: Path) -> int:
    """Search one category below `folder`, printing a row for every window; returns how many trials finished."""
    (folder / "data" / "bolt" / "train" / "good").mkdir(parents=True)
    (folder / "data" / "bolt" / "train" / "good" / "0.png").touch()
    asked = SearchSettings(
        data=str(folder / "data"), name="scale", storage=str(folder / "results"), teacher_weights="random",
        trials=options.trials, epochs=options.epochs, sampler=options.sampler, max_concurrent=options.at_once,
    )  # fmt: skip
    addresses = resolve_addresses(asked)
    assert list(find_categories(folder / "data")) == ["bolt"]
    plan = plan_search(asked, addresses, folder / "data")
    Storage(addresses.home)
    spec = spec_of(plan, "bolt", Workers(1, 1.0, 0.0), revision="")
    costs = Costs()
    Searcher.suggest = costs.counting("suggest", Searcher.suggest)  # type: ignore[method-assign]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    held = AnswersAtOnce.options(name=_DISPATCHER).remote(options.epochs)  # type: ignore[attr-defined]
    shares = ray.remote(Shares).options(num_cpus=0).remote(1, 1)
    Tracker._write = costs.counting("MLflow", Tracker._write)  # type: ignore[method-assign]
    tracker = Tracker(addresses.tracking, "scale", artifact_location=None, tags={}, unsent=folder / "unsent.jsonl")

    def handle(event: Event | CategoryContinued) -> None:
        if isinstance(event, CategoryContinued):
            return
        tracker.put(event)
        if isinstance(event, TrialEnded):
            costs.num_ended += 1
            if costs.num_ended % options.window == 0:
                print(costs.row(), flush=True)

    try:
        with relayed(handle, print) as events:
            found = search_category(
                plan.of_category("bolt", plan.spaces["bolt"]), spec, Share(shares), events, None, _DISPATCHER
            )
        if num_unsent := tracker.close(600):
            print(f"{num_unsent} events were not written to MLflow", file=sys.stderr)
    finally:
        ray.kill(cast(Any, held))
        ray.shutdown()
    return len(found.finished)


if __name__ == "__main__":
    main()
