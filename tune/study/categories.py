"""All categories of a search: a process for each, one writer for their events, the champions at the end."""

import dataclasses
import logging
import math
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.queue import Queue

from dskd.checkpoint import RECORD_FILE, DetectorRecord
from tune.runtime.cluster import cluster_nodes, count_trials
from tune.runtime.relay import relayed, this_node
from tune.settings.plan import SearchPlan
from tune.settings.space import Space, describe_changes
from tune.settings.workers import Workers
from tune.storage.champions import Champion, fetch_figures, find_champion, note_best, note_run
from tune.storage.files import Storage, StorageError, open_search
from tune.storage.inputs import TrainedOn
from tune.storage.lease import LeaseLostError, wait_for_the_end
from tune.storage.shown import command, shown, without_secrets
from tune.storage.temporary import temporary_folder
from tune.study.budget import BudgetSpentError, Share, Shares, TimeBudget
from tune.study.category import StudyResult, search_category
from tune.study.database import StudyStorage
from tune.study.finalists import CommonWinner, find_common_winner
from tune.study.progress import SearchProgress
from tune.study.repair import Trial, deliver_again, find_fault, has_detector, readable_champion, train_again
from tune.study.selection import FoldTrainings, select_champion
from tune.tracking.category_page import category_note, champion_note, draw_study
from tune.tracking.events import CategoryContinued, CategoryEnded, Event, Status, TrialEnded
from tune.tracking.outbox import TrackingRefusedError, TrackingUnavailableError
from tune.tracking.registry import evaluation_key, model_name
from tune.tracking.tracker import Delivered, Tracker
from tune.trial.evaluation import TABLE_RATE, evaluated, save_evaluated_champion
from tune.trial.follower import AssignmentFailedError
from tune.trial.groups import Groups
from tune.trial.spec import TrialSpec, spec_of
from tune.trial.trainable import driver_resources

logger = logging.getLogger(__name__)

# A decorated function would be pickled by value and lose its module's state; this one is pickled by reference.
# Many retries, because its node may be lost often on a spot cluster; it continues from the trials' records.
search_task = ray.remote(num_cpus=0, max_retries=100)(search_category)

_Shares = ray.remote(num_cpus=0)(Shares)

_TRACKING_PATIENCE = 300.0
"""Seconds to wait for an absent tracking server after a category has finished."""


class CategoryResult(NamedTuple):
    """How the search of one category ended."""

    category: str
    num_trials: int = 0
    num_pruned: int = 0
    num_failed: int = 0
    champion: Champion | None = None
    """None if no trial finished."""
    error: str = ""
    """Why there is no champion; empty if there is one."""
    num_interrupted: int = 0
    """Trials interrupted by the time budget; the same command continues them."""
    decision: str = ""
    """Why this champion, in one sentence."""
    earlier_search: str = ""
    """The first search of --start-from with a champion of this category; empty: none."""
    earlier_figures: Mapping[str, float] = {}
    """`test/…` figures of that champion on the test images of today."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for --json."""
        return {**self._asdict(), "champion": self.champion._asdict() if self.champion else None}


def run_search(
    plan: SearchPlan, groups: Groups, workers: Workers, revision: str, tracker: Tracker, progress: SearchProgress
) -> list[CategoryResult]:
    """Search every category of the plan, at most as many at once as the cluster can hold trials; results in plan order.

    An error in one category becomes its result and does not stop the others.
    """
    search = SharedSearch(plan, groups, workers, revision, tracker, progress)
    slots = plan.max_concurrent or count_trials(cluster_nodes(), search.workers)
    side_by_side = min(len(plan.categories), slots)
    budget = TimeBudget(plan.budget_seconds, len(plan.categories), side_by_side)
    shares: Any = _Shares.options(scheduling_strategy=this_node()).remote(len(plan.categories), side_by_side)
    # In a thread of its own: a storage that does not answer must not delay the events.
    with ThreadPoolExecutor(1, thread_name_prefix="best so far") as noting:

        def handle(event: Event | CategoryContinued) -> None:
            progress.show(event)
            if isinstance(event, CategoryContinued):
                return
            tracker.put(event)
            if isinstance(event, TrialEnded) and event.detector:
                noting.submit(_note_best, search, event)

        with (
            relayed(handle, groups.on_loss) as events,
            ThreadPoolExecutor(side_by_side, thread_name_prefix="category") as pool,
        ):
            studied = list(pool.map(lambda each: study_one(search, each, budget, shares, events), plan.categories))
            common = _common_winner(search, studied)
            return list(pool.map(lambda each: conclude_one(search, each, common, budget, events), studied))


class Studied(NamedTuple):
    """A category whose trials have ended, or the reason why there are none."""

    category: str
    study: StudyResult | None = None
    spec: TrialSpec | None = None
    space: Space | None = None
    error: str = ""
    is_unstarted: bool = False
    """Whether the time budget ended before it could start."""


class SharedSearch(NamedTuple):
    """What all categories of a search share in the driver."""

    plan: SearchPlan
    groups: Groups
    workers: Workers
    revision: str
    tracker: Tracker
    progress: SearchProgress

    @property
    def storage(self) -> Storage:
        return Storage(self.plan.addresses.home)


def study_one(search: SharedSearch, category: str, budget: TimeBudget, shares: Any, events: Queue) -> Studied:
    """Run the trials of one category; an error becomes a part of the result."""
    try:
        try:
            deadline = budget.begin_category()
            spec = spec_of(search.plan, category, search.workers, search.revision)
            space = with_winners(search.plan, category, search.progress)
            task = search_task.options(resources=driver_resources())
            running = task.remote(
                search.plan.of_category(category, space),
                spec,
                Share(shares),
                events,
                deadline,
                search.groups.dispatcher,
            )
            return Studied(category, _outcome(running, search.groups), spec, space)
        finally:
            shares.end_category.remote()  # the steps below use no trial's slot
    except LeaseLostError as error:
        wait_for_the_end()
        return Studied(category, error=_reason(category, error))
    except BudgetSpentError as error:
        return Studied(category, error=str(error), is_unstarted=True)
    except Exception as error:  # the other categories continue after any error
        search.groups.end_if_lost()
        return Studied(category, error=_reason(category, error))


def conclude_one(
    search: SharedSearch, studied: Studied, common: CommonWinner | None, budget: TimeBudget, events: Queue
) -> CategoryResult:
    """Choose the category's champion, and close its run in MLflow."""
    category = studied.category
    tags: dict[str, str] = {}
    if studied.is_unstarted:
        known = find_champion(search.storage, category)
        result = CategoryResult(category, champion=known, error="" if known else studied.error)
        search.progress.say(studied.error, category)
    elif studied.study is None:
        result = CategoryResult(category, error=studied.error)
    else:
        try:
            result, tags = _conclude(search, studied, common, budget, events)
            if result.champion and studied.spec:
                result = with_earlier(search, studied.spec, result)
        except LeaseLostError as error:
            wait_for_the_end()
            result = CategoryResult(category, error=_reason(category, error))
        except Exception as error:  # the other categories continue after any error
            search.groups.end_if_lost()
            result = CategoryResult(category, error=_reason(category, error))
    if result.champion is None:
        tags = {"dskd.error": result.error}
    # In the same queue as the trials' events, so that it comes after them.
    goes_on = studied.is_unstarted or result.num_interrupted > 0
    status: Status = "finished" if result.champion else "interrupted" if goes_on else "failed"
    before = {f"earlier/{name}": value for name, value in result.earlier_figures.items()}
    events.put(CategoryEnded(category, status, before, tags))
    return result


def _reason(category: str, error: Exception) -> str:
    """An error in one line; the traceback of one that is not the user's goes to the log."""
    if not isinstance(error, ValueError | OSError):
        logger.error("%s: %s", category, without_secrets("".join(traceback.format_exception(error))))
    return shown((str(error).strip().splitlines() or [type(error).__name__])[-1])


def _common_winner(search: SharedSearch, studied: Sequence[Studied]) -> CommonWinner | None:
    """The configuration that is best over all categories; told in a line."""
    known = [each for each in studied if each.study is not None and each.space is not None]
    finished = {each.category: each.study.finished for each in known if each.study is not None}
    shared = {each.category: each.space.shared for each in known if each.space is not None}
    found = find_common_winner(finished, shared) if search.plan.finalists else None
    if found is not None:
        left_out = f", {found.num_left_out} unfinished ones left out" if found.num_left_out else ""
        search.progress.say(
            f"best over {len(found.trials)} categories of {found.num_compared} common configurations: "
            f"{found.gain:+.4f} over the untuned preset in the mean{left_out}; it is a finalist in each"
        )
    return found


def _outcome(running: "ray.ObjectRef[StudyResult]", groups: Groups) -> StudyResult:
    """Wait for a category's study; ends it if no worker group can start, so that it can be continued later.

    Raises OSError with the reason.
    """
    fault = groups.fault()
    (first,), _ = ray.wait([running, fault], num_returns=1)
    if first is fault:
        ray.cancel(running, force=True)
        raise OSError(f"no worker can start: {ray.get(fault)}; the same command continues the search")
    return ray.get(running)


def with_winners(plan: SearchPlan, category: str, progress: SearchProgress) -> Space:
    """The category's space with its champions from earlier searches; prints a line for each that is left out."""
    space = plan.spaces[category]
    winners = list(space.winners)
    for name in plan.earlier_searches:
        storage = open_search(plan.addresses.storage, name)
        champion = find_champion(storage, category)
        document = storage.read_json(f"{champion.folder}/{RECORD_FILE}") if champion else None
        if document is None:
            progress.say(f"search {name} has no champion of this category to start from", category)
            continue
        try:
            winners.append(space.point_of(DetectorRecord.from_document(document).config))
        except (ValueError, KeyError, TypeError) as error:
            progress.say(f"the champion of {name} is not tried: {error}", category)
    return dataclasses.replace(space, winners=tuple(winners))


def with_earlier(search: SharedSearch, spec: TrialSpec, result: CategoryResult) -> CategoryResult:
    """The result with the figures of the earlier search's champion on today's test images, for a fair comparison.

    Unchanged if no search of --start-from has one, or if it cannot be evaluated, which is said.
    """
    category, plan = spec.category, search.plan
    for name in plan.earlier_searches:
        storage = open_search(plan.addresses.storage, name)
        if (champion := find_champion(storage, category)) is None:
            continue
        try:
            plan.inputs_of(category).verify()
            figures, remark = evaluated(
                spec, f"{name}-{champion.trial_id}", f"{storage.uri}/{champion.folder}", search.groups
            )
        except (ValueError, OSError, AssignmentFailedError) as error:  # the new champion is there all the same
            figures, remark = {}, str(error)
        if remark:
            search.progress.say(f"the champion of {name} is not compared: {remark}", category)
            return result
        known = {figure: value for figure, value in figures.items() if math.isfinite(value)}
        return result._replace(earlier_search=name, earlier_figures=known)
    return result


def _note_best(search: SharedSearch, event: TrialEnded) -> None:
    try:
        generation = search.plan.generation
        note_best(search.storage, event.category, event.trial_id, event.objective, event.detector, generation)
    except (StorageError, LeaseLostError) as error:
        cannot = f"trial {event.trial_id} cannot be pulled before the search ends: {error}"
        search.progress.say(cannot, event.category, event.trial_id)


def _conclude(
    search: SharedSearch, studied: Studied, common: CommonWinner | None, budget: TimeBudget, events: Queue
) -> tuple[CategoryResult, dict[str, str]]:
    """Choose and register a category's champion; returns the result and tags for its MLflow run."""
    study, spec, space = studied.study, studied.spec, studied.space
    assert study is not None and spec is not None and space is not None
    category, progress = spec.category, search.progress
    result = CategoryResult(
        category, study.num_trials, study.num_pruned, len(study.errors), num_interrupted=study.num_interrupted
    )
    if study.num_interrupted:
        progress.say(
            f"the time budget interrupted {study.num_interrupted} trials; the same command continues them", category
        )
    if not study.finished:
        reason = study.errors[-1] if study.errors else "no trial reached its last epoch"
        if study.num_interrupted:
            reason += (
                f" within the time budget, which interrupted {study.num_interrupted}; the same command continues them"
            )
        return result._replace(error=reason), {}
    search.plan.inputs_of(category).verify()
    num_finalists = search.plan.finalists
    if num_finalists and budget.is_spent():
        num_finalists = 0
        progress.say("the time budget ended before the finalists were compared; the same command does so", category)
    chosen = select_champion(
        study.finished,
        FoldTrainings(spec, search.groups, events.put, TrainedOn(search.storage, category)),
        space.configuration,
        num_finalists=num_finalists,
        min_errors=search.plan.min_gain_errors,
        common=common.trials.get(category) if common else None,
        say=lambda line: progress.say(line, category),
    )
    result = result._replace(decision=chosen.sentence)
    trial_id, known = chosen.trial_id, readable_champion(search.storage, category, progress.say)
    trial = Trial(trial_id, chosen.detector, spec.with_config(chosen.config))
    with temporary_folder() as temporary, ThreadPoolExecutor(1) as beside:
        pictures = beside.submit(_draw_study, search, category, temporary / "study")
        if known is not None and known.trial_id == trial_id and known.run_id and known.decision == chosen.sentence:
            if fault := find_fault(search.storage, known):
                progress.say(f"the champion's detector is not whole, delivering it again: {fault}", category)
                tracking = search.plan.addresses.tracking
                known, source = deliver_again(
                    search.storage, trial, known, search.groups, tracking, change=chosen.applied
                )
                progress.say(f"delivered again from {source}", category)
            else:
                progress.say(f"trial {trial_id} is the champion already", category)
            _log_study(search, category, pictures.result())
            return result._replace(champion=known), {}
        detector = chosen.detector
        if not has_detector(detector):
            progress.say(f"the detector of trial {trial_id} is gone, training it again", category)
            detector = train_again(trial, search.groups)
        progress.say(chosen.sentence, category)
        progress.say(f"trial {trial_id} is chosen, evaluating it once on the test images", category)
        search.plan.inputs_of(category).verify()
        local = temporary / "detector"
        champion, record, remark = save_evaluated_champion(
            search.storage,
            spec,
            trial_id,
            detector,
            local,
            search.groups,
            change=chosen.applied,
            decision=chosen.sentence,
            beats=study.finished[0].objective,
        )
        if remark:
            progress.say(remark, category)
        figures = fetch_figures(detector, temporary / "figures")
        champion, tags = _register(search, result._replace(champion=champion), record, local, figures, pictures)
    tags = {"dskd.champion_trial": trial_id, "dskd.decision": chosen.sentence, **tags}
    return result._replace(champion=champion), tags


def _register(
    search: SharedSearch,
    result: CategoryResult,
    record: DetectorRecord,
    detector: Path,
    figures: Path | None,
    pictures: "Future[_Pictures]",
) -> tuple[Champion, dict[str, str]]:
    """Register the champion in MLflow; returns it with its run, and tags. Unchanged if MLflow is away.

    `pictures`: those of the category's study, being drawn.
    """
    plan, progress, category, champion = search.plan, search.progress, result.category, result.champion
    assert champion is not None
    try:
        registered = search.tracker.register_champion(
            category,
            champion.trial_id,
            detector,
            {**record.metrics, **threshold_figures(record)},
            record.data_sha256,
            _TRACKING_PATIENCE,
            figures=figures,
            promote=plan.promote,
            evaluation_sha256=evaluation_key(record),
            detector_version=record.detector_version,
            delivered=_delivered(plan, record),
        )
    except (TrackingUnavailableError, TrackingRefusedError) as error:
        progress.say(f"{error}; the champion is in the storage, the same command registers it", category)
        return champion, {}
    champion = champion._replace(run_id=registered.run_id)
    note_run(search.storage, champion)
    alias = f"alias {registered.alias}" if registered.alias else "no alias"
    if registered.reason:
        name = f"{registered.model} version {registered.version}"
        progress.say(f"{name} gets {alias}: {registered.reason}", category)
    note = category_note(
        category=category,
        trial_id=champion.trial_id,
        metrics=champion.metrics,
        counts=(result.num_trials, result.num_pruned, result.num_failed),
        registered=f"{registered.model} version {registered.version}, {alias}",
        pull=pull_command(plan, category),
        remarks=[
            *_log_study(search, category, pictures.result()),
            *([result.decision] if result.decision else []),
            *_suspects(record),
            *([] if figures else ["validation: no pictures, an earlier version trained this trial"]),
        ],
        caveats=_caveats(record),
    )
    model = f"{registered.model}/{registered.version}"
    return champion, {"dskd.champion_model": model, "mlflow.note.content": note}


def threshold_figures(record: DetectorRecord) -> dict[str, float]:
    """The threshold at the rate of all tables, and the false alarms that go with it, as metrics."""
    rates = record.rates(TABLE_RATE)
    known = {f"threshold/{name}": rate for name, rate in rates.items() if rate is not None and name != "requested_rate"}
    return {"threshold/value": record.threshold(TABLE_RATE).value, **known}


def _delivered(plan: SearchPlan, record: DetectorRecord) -> Delivered:
    changes = describe_changes(record.config, plan.configs)
    limit, category = record.threshold(TABLE_RATE), record.category
    proof = "expected, not proven" if record.is_approximate else "proven"
    note = champion_note(
        category=category,
        changes=changes,
        threshold=f"Threshold {limit.value:.4g} for at most {limit.false_alarm_rate:.1%} false alarms ({proof}).",
        serve=command(["mlflow", "models", "serve", "-m", f"models:/{model_name(category)}@champion"]),
        pull=pull_command(plan, category),
        caveats=_caveats(record),
    )
    return Delivered(record.config.flat(), changes, note)


def _caveats(record: DetectorRecord) -> list[str]:
    untrained = ["The teacher is untrained: these figures have no meaning."] if record.is_untrained_teacher else []
    oracle = ["Selected on the test images, as papers do: these figures are too optimistic."]
    return untrained + (oracle if record.selection == "oracle" else [])


def _suspects(record: DetectorRecord) -> list[str]:
    """A remark on the good images that look least like the others; empty if nothing is known of them."""
    named = ", ".join(f"{name} ({times:.1f} × the median)" for name, times in record.suspects())
    return [f"good images that look worst, to be checked for mislabelled ones: {named}"] if named else []


def pull_command(plan: SearchPlan, category: str) -> str:
    """The command that downloads champions of the search: of one category, or of all."""
    place = ["--name", plan.name, "--storage", plan.addresses.storage]
    return command(["python", "tune/pull.py", category, *place, "--out", "detectors"])


class _Pictures(NamedTuple):
    """Pictures of a category's study."""

    folder: Path
    missing: tuple[str, ...]
    """A line for each that cannot be drawn, with the reason."""


def _draw_study(search: SharedSearch, category: str, folder: Path) -> _Pictures:
    plan = search.plan
    is_untuned = plan.spaces[category].is_untuned
    return _Pictures(folder, draw_study(StudyStorage(plan.studies), plan.study_name(category), folder, is_untuned))


def _log_study(search: SharedSearch, category: str, pictures: _Pictures) -> tuple[str, ...]:
    """Log the pictures of the category's study; returns a line for each that is missing."""
    try:
        search.tracker.add_study(category, pictures.folder, _TRACKING_PATIENCE)
    except (TrackingUnavailableError, TrackingRefusedError) as error:
        search.progress.say(f"{error}; the study's pictures are not logged, the same command does so", category)
    return pictures.missing
