"""All categories of a search: a process for each, one writer for what they report, the champions at the end."""

import dataclasses
import math
import shlex
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import ray
import ray.exceptions
from ray.util.queue import Empty, Queue

from tune.champions import Champion, crown, evaluate_on_test, fetch_figures, find_champion, note_best, note_run
from tune.notes import category_note
from tune.progress import Progress
from tune.settings import SearchSettings
from tune.storage import Storage, StorageError
from tune.study import Study, search_category
from tune.study_plots import draw_study
from tune.tracking import CategoryEnded, Tracker, TrackingAway, TrackingRefused, TrialEnded
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
    # One at a time and apart: a storage that is away must not hold up the events.
    noting = ThreadPoolExecutor(1, thread_name_prefix="best so far")

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
            if isinstance(event, TrialEnded) and event.detector:
                noting.submit(_note_best, settings, event, progress)

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
        noting.shutdown()


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


def _note_best(settings: SearchSettings, event: TrialEnded, progress: Progress) -> None:
    try:
        storage = Storage(settings.search_uri)
        note_best(storage, event.category, event.trial_id, event.objective, event.detector)
    except StorageError as error:
        progress.say(f"{event.category}: trial {event.trial_id} cannot be pulled before the search ends: {error}")


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
        _show_study(settings, category, tracker, progress)
        return Outcome(category, *counts, known, ""), {}
    progress.say(f"{category}: trial {trial_id} is the best, evaluating it once on the test images")
    resources = {"num_cpus": assignment.cpus_per_worker, "num_gpus": assignment.gpus_per_worker}
    threads = max(1, int(assignment.cpus_per_worker))
    tested = ray.get(evaluate_on_test.options(**resources).remote(detector, assignment.data, category, threads))
    with TemporaryDirectory(prefix="dskd-") as temporary:
        local = Path(temporary) / "detector"
        champion, record = crown(storage, category, trial_id, detector, tested, local)
        tags = {"dskd.champion_trial": trial_id}
        figures = fetch_figures(detector, Path(temporary) / "figures")
        try:
            registered = tracker.register_champion(
                category,
                trial_id,
                local,
                record.metrics,
                record.data_sha256,
                _TRACKING_PATIENCE,
                figures=figures,
                promote=settings.promote,
            )
        except (TrackingAway, TrackingRefused) as error:
            progress.say(f"{category}: {error}; the champion is in the storage, the same command registers it")
        else:
            champion = champion._replace(run_id=registered.run_id)
            note_run(storage, champion)
            tags["dskd.champion_model"] = f"{registered.model}/{registered.version}"
            if not registered.alias:
                why = "by --no-promote" if not settings.promote else "a better one of the same images has it"
                progress.say(f"{category}: {registered.model} version {registered.version} gets no alias, {why}")
            tags["mlflow.note.content"] = category_note(
                category=category,
                trial_id=trial_id,
                metrics=champion.metrics,
                counts=counts,
                registered=f"{registered.model} version {registered.version}"
                + (f", alias {registered.alias}" if registered.alias else ", no alias"),
                pull=f"python tune/pull.py {shlex.quote(category)} --name {settings.name} "
                f"--storage {shlex.quote(settings.storage)} --to detectors",
                remarks=[
                    *_show_study(settings, category, tracker, progress),
                    *([] if figures else ["validation: no pictures, an earlier version trained this trial"]),
                    *(["The teacher is untrained: these figures say nothing."] if record.is_untrained_teacher else []),
                ],
            )
    return Outcome(category, *counts, champion, ""), tags


def _show_study(settings: SearchSettings, category: str, tracker: Tracker, progress: Progress) -> tuple[str, ...]:
    """Log pictures of the category's study; what cannot be shown, and why."""
    with TemporaryDirectory(prefix="dskd-") as temporary:
        missing = draw_study(settings.studies, f"{settings.name}/{category}", Path(temporary))
        try:
            tracker.add_study(category, Path(temporary), _TRACKING_PATIENCE)
        except (TrackingAway, TrackingRefused) as error:
            progress.say(f"{category}: {error}; the study's pictures are not logged, the same command does so")
    return missing


def summary(outcomes: Sequence[Outcome]) -> list[Mapping[str, Any]]:
    """One plain document per category, for --json."""
    return [
        {**outcome._asdict(), "champion": outcome.champion._asdict() if outcome.champion else None}
        for outcome in outcomes
    ]
