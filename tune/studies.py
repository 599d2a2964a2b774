"""All categories of a search: a process for each, one writer for what they report, the champions at the end."""

import dataclasses
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import ray
import ray.exceptions
from ray.util.queue import Empty, Queue

from tune.champions import Champion, crown, evaluate_on_test, find_champion, note_run
from tune.progress import Progress
from tune.settings import SearchSettings
from tune.storage import Storage
from tune.study import Study, search_category
from tune.tracking import CategoryEnded, Tracker, TrackingAway
from tune.worker import Assignment

# A decorated function would be pickled by value and lose its module's state; this one goes by reference.
_search_category = ray.remote(num_cpus=0, max_retries=3)(search_category)

_TRACKING_PATIENCE = 300.0
"""Seconds that a finished category waits for a tracking server that is away."""


class Outcome(NamedTuple):
    """How the search of one category ended."""

    category: str
    num_trials: int
    num_pruned: int
    num_failed: int
    champion: Champion | None
    """None where no trial finished."""
    error: str
    """Why there is no champion; empty where there is one."""


def run_search(
    settings: SearchSettings, categories: Sequence[str], assignment: Assignment, tracker: Tracker, progress: Progress
) -> list[Outcome]:
    """Search every category, as many side by side as the cluster holds trials; outcomes in their order.

    An error in one category is its outcome and does not stop the others.
    """
    slots = settings.max_concurrent or concurrent_trials(assignment)
    side_by_side = min(len(categories), slots)
    concurrency = max(1, slots // side_by_side)
    events = Queue(actor_options={"num_cpus": 0})
    all_done = threading.Event()

    def relay() -> None:
        while True:
            try:
                event = events.get(timeout=1)
            except Empty:
                if all_done.is_set():
                    return
                continue
            tracker.put(event)
            progress.show(event)

    def search(category: str) -> Outcome:
        mine = dataclasses.replace(
            assignment, category=category, workers_uri=f"{settings.search_uri}/workers/{category}"
        )
        try:
            study = ray.get(_search_category.remote(settings, mine, concurrency, events))
            outcome, tags = _conclude(settings, mine, study, tracker, progress)
        except Exception as error:  # whatever it was, the other categories go on
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            outcome, tags = Outcome(category, 0, 0, 0, None, reason), {}
        if outcome.champion is None:
            tags = {"dskd.error": outcome.error}
        # Through the queue of the trials' events, which it must not overtake.
        events.put(CategoryEnded(category, "finished" if outcome.champion else "failed", {}, tags))
        return outcome

    relaying = threading.Thread(target=relay, name="events")
    relaying.start()
    try:
        with ThreadPoolExecutor(side_by_side, thread_name_prefix="category") as pool:
            return list(pool.map(search, categories))
    finally:
        all_done.set()
        relaying.join()


def concurrent_trials(assignment: Assignment) -> int:
    """How many trials the cluster can hold at once, at least 1."""
    have: dict[str, float] = ray.cluster_resources()
    needs = {"CPU": assignment.cpus_per_worker, "GPU": assignment.gpus_per_worker}
    return max(
        1,
        min(
            math.floor(have.get(name, 0) / (need * assignment.num_workers) + 1e-9)
            for name, need in needs.items()
            if need > 0
        ),
    )


def _conclude(
    settings: SearchSettings, assignment: Assignment, study: Study, tracker: Tracker, progress: Progress
) -> tuple[Outcome, dict[str, str]]:
    """What a category's trials came to, and tags for its run in MLflow."""
    category, counts = assignment.category, (study.num_trials, study.num_pruned, len(study.errors))
    if study.best is None:
        reason = study.errors[-1] if study.errors else "no trial reached its last epoch"
        return Outcome(category, *counts, None, reason), {}
    trial_id, detector = study.best
    storage = Storage(settings.search_uri)
    known = find_champion(storage, category)
    if known is not None and known.trial_id == trial_id and known.run_id:
        progress.say(f"{category}: trial {trial_id} is the champion already")
        return Outcome(category, *counts, known, ""), {}
    progress.say(f"{category}: trial {trial_id} is the best, evaluating it once on the test images")
    resources = {"num_cpus": assignment.cpus_per_worker, "num_gpus": assignment.gpus_per_worker}
    threads = max(1, int(assignment.cpus_per_worker))
    evaluation = evaluate_on_test.options(**resources)
    tested = ray.get(evaluation.remote(detector, assignment.data, category, threads, assignment.cache_gb))
    with TemporaryDirectory(prefix="dskd-") as temporary:
        local = Path(temporary) / "detector"
        champion, record = crown(storage, category, trial_id, detector, tested, local)
        tags = {"dskd.champion_trial": trial_id}
        try:
            registered = tracker.register_champion(
                category, trial_id, local, record.metrics, record.data_sha256, _TRACKING_PATIENCE
            )
        except TrackingAway as error:
            progress.say(f"{category}: {error}; the champion is in the storage, the same command registers it")
        else:
            champion = champion._replace(run_id=registered.run_id)
            note_run(storage, champion)
            tags["dskd.champion_model"] = f"{registered.model}/{registered.version}"
    return Outcome(category, *counts, champion, ""), tags


def summary(outcomes: Sequence[Outcome]) -> list[Mapping[str, Any]]:
    """One plain document per category, for --json."""
    return [
        {**outcome._asdict(), "champion": outcome.champion._asdict() if outcome.champion else None}
        for outcome in outcomes
    ]
