"""All categories of a search: a process for each, one writer for what they report, the champions at the end."""

import dataclasses
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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dskd.checkpoint import RECORD_FILE, DetectorRecord
from tune.runtime.cluster import concurrent_trials
from tune.settings.search import SearchSettings
from tune.settings.space import Space
from tune.storage.champions import Champion, fetch_figures, find_champion, note_best, note_run, save_champion
from tune.storage.files import Storage, StorageError, open_search
from tune.study.budget import BudgetSpentError, Share, Shares, TimeBudget
from tune.study.category import StudyResult, search_category
from tune.study.progress import SearchProgress
from tune.tracking.category_page import category_note, draw_study
from tune.tracking.events import CategoryEnded, TrialEnded
from tune.tracking.tracker import Tracker, TrackingRefusedError, TrackingUnavailableError
from tune.trial.spec import TrialSpec
from tune.trial.trainable import driver_resources
from tune.trial.worker import evaluate_on_test

# A decorated function would be pickled by value and lose its module's state; this one goes by reference.
# A cluster that loses nodes for days may lose this one's again and again; it goes on from Tune's last snapshot.
_search_category = ray.remote(num_cpus=0, max_retries=100)(search_category)

_Shares = ray.remote(num_cpus=0)(Shares)

_TRACKING_PATIENCE = 300.0
"""Seconds that a finished category waits for a tracking server that is away."""


class CategoryResult(NamedTuple):
    """How the search of one category ended."""

    category: str
    num_trials: int
    num_pruned: int
    num_failed: int
    champion: Champion | None
    """None where no trial finished."""
    error: str
    """Why there is no champion; empty where there is one."""
    num_cut: int = 0
    """Trials that the time budget ended; the same command goes on with them."""


def run_search(
    settings: SearchSettings,
    spaces: Mapping[str, Space],
    spec: TrialSpec,
    tracker: Tracker,
    progress: SearchProgress,
) -> list[CategoryResult]:
    """Search every category of `spaces`, as many side by side as the cluster now holds trials; outcomes in their order.

    An error in one category is its outcome and does not stop the others.
    """
    categories = tuple(spaces)
    slots = settings.max_concurrent or concurrent_trials(spec)
    side_by_side = min(len(categories), slots)
    budget = TimeBudget(settings.budget_seconds, len(categories), side_by_side)
    # On the driver's node: with another one, the events on their way and the search itself would be lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    shares: Any = _Shares.options(scheduling_strategy=here).remote(len(categories), side_by_side)
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

    def search(category: str) -> CategoryResult:
        mine = dataclasses.replace(spec, category=category, workers_uri=f"{settings.search_uri}/workers/{category}")
        try:
            try:
                deadline = budget.begin_category()
                space = with_winners(settings, category, spaces[category], progress)
                task = _search_category.options(resources=driver_resources())
                study = ray.get(task.remote(settings, mine, Share(shares), events, space, deadline))
            finally:
                shares.end_category.remote()  # what comes after takes no trial's place
            outcome, tags = _conclude(settings, mine, study, tracker, progress)
        except BudgetSpentError as error:
            known = find_champion(Storage(settings.search_uri), category)
            outcome, tags = CategoryResult(category, 0, 0, 0, known, "" if known else str(error)), {}
            progress.say(f"{category}: {error}")
        except Exception as error:  # whatever it was, the other categories go on
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            outcome, tags = CategoryResult(category, 0, 0, 0, None, reason), {}
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


def with_winners(settings: SearchSettings, category: str, space: Space, progress: SearchProgress) -> Space:
    """The space with the champions that earlier searches found for the category; one line for each left out."""
    winners = list(space.winners)
    for name in settings.earlier_searches:
        storage = open_search(settings.storage, name)
        champion = find_champion(storage, category)
        document = storage.read_json(f"{champion.folder}/{RECORD_FILE}") if champion else None
        if document is None:
            progress.say(f"{category}: search {name} has no champion of it to start from")
            continue
        try:
            winners.append(space.point_of(DetectorRecord.from_document(document).config))
        except (ValueError, KeyError, TypeError) as error:
            progress.say(f"{category}: the champion of {name} is not tried: {error}")
    return dataclasses.replace(space, winners=tuple(winners))


def _note_best(settings: SearchSettings, event: TrialEnded, progress: SearchProgress) -> None:
    try:
        storage = Storage(settings.search_uri)
        note_best(storage, event.category, event.trial_id, event.objective, event.detector)
    except StorageError as error:
        progress.say(f"{event.category}: trial {event.trial_id} cannot be pulled before the search ends: {error}")


def _conclude(
    settings: SearchSettings, spec: TrialSpec, study: StudyResult, tracker: Tracker, progress: SearchProgress
) -> tuple[CategoryResult, dict[str, str]]:
    """What a category's trials came to, and tags for its run in MLflow."""
    category, counts = spec.category, (study.num_trials, study.num_pruned, len(study.errors))
    if study.num_cut:
        progress.say(f"{category}: {study.num_cut} trials cut by the time budget; the same command goes on with them")
    if study.best is None:
        reason = study.errors[-1] if study.errors else "no trial reached its last epoch"
        if study.num_cut:
            reason += f" within the time budget, which cut {study.num_cut}; the same command goes on with them"
        return CategoryResult(category, *counts, None, reason, study.num_cut), {}
    trial_id, detector = study.best
    storage = Storage(settings.search_uri)
    known = find_champion(storage, category)
    if known is not None and known.trial_id == trial_id and known.run_id:
        progress.say(f"{category}: trial {trial_id} is the champion already")
        _show_study(settings, category, tracker, progress)
        return CategoryResult(category, *counts, known, "", study.num_cut), {}
    progress.say(f"{category}: trial {trial_id} is the best, evaluating it once on the test images")
    resources = {"num_cpus": spec.cpus_per_worker, "num_gpus": spec.gpus_per_worker}
    threads = max(1, int(spec.cpus_per_worker))
    evaluation = evaluate_on_test.options(**resources)
    tested = ray.get(evaluation.remote(detector, spec.data, category, threads, spec.cache_gb))
    with TemporaryDirectory(prefix="dskd-") as temporary:
        local = Path(temporary) / "detector"
        champion, record = save_champion(storage, category, trial_id, detector, tested, local)
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
        except (TrackingUnavailableError, TrackingRefusedError) as error:
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
                f"--storage {shlex.quote(settings.storage)} --out detectors",
                remarks=[
                    *_show_study(settings, category, tracker, progress),
                    *([] if figures else ["validation: no pictures, an earlier version trained this trial"]),
                    *(["The teacher is untrained: these figures say nothing."] if record.is_untrained_teacher else []),
                ],
            )
    return CategoryResult(category, *counts, champion, "", study.num_cut), tags


def _show_study(settings: SearchSettings, category: str, tracker: Tracker, progress: SearchProgress) -> tuple[str, ...]:
    """Log pictures of the category's study; what cannot be shown, and why."""
    with TemporaryDirectory(prefix="dskd-") as temporary:
        missing = draw_study(settings.studies, f"{settings.name}/{category}", Path(temporary))
        try:
            tracker.add_study(category, Path(temporary), _TRACKING_PATIENCE)
        except (TrackingUnavailableError, TrackingRefusedError) as error:
            progress.say(f"{category}: {error}; the study's pictures are not logged, the same command does so")
    return missing


def summary(outcomes: Sequence[CategoryResult]) -> list[Mapping[str, Any]]:
    """One plain document per category, for --json."""
    return [
        {**outcome._asdict(), "champion": outcome.champion._asdict() if outcome.champion else None}
        for outcome in outcomes
    ]
