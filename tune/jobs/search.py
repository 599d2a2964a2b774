"""From settings to a finished search: connect, check, search, print the table.

Ray takes most of the time until the first step, so it starts at once, in the main thread; everything else is
imported and checked beside it, in a thread.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import ray

from tune.jobs.stop import EarlyEnd
from tune.jobs.webhook import call_webhook
from tune.preflight.draft import Draft, drafted
from tune.preflight.reach import check_place, check_reach
from tune.preflight.room import PreflightError, check_cluster, wait_for_room
from tune.runtime.cluster import cluster_nodes, connect, resolve_gpus
from tune.runtime.stopping import signals_told_to
from tune.settings.plan import SearchPlan
from tune.settings.search import SearchSettings
from tune.settings.workers import Workers
from tune.storage.files import Storage
from tune.storage.lease import Lease
from tune.storage.shown import shown
from tune.storage.uris import absolute
from tune.study.gauges import SearchGauges
from tune.study.progress import SearchProgress
from tune.trial.groups import Groups, worker_groups
from tune.trial.spec import spec_of

if TYPE_CHECKING:  # slow imports, see above
    from tune.storage.inputs import Marks
    from tune.study.categories import CategoryResult
    from tune.tracking.tracker import Tracker

_PAGE_PATIENCE = 20.0
_TRACKING_PATIENCE = 600.0
"""Seconds to wait for an absent tracking server after the search has finished."""


def search(settings: SearchSettings) -> int:
    """Run a search; returns the exit code: 0 all categories have a champion, 1 some have none.

    Ctrl-C and SIGTERM end the process, as `EarlyEnd.stop` says. Raises ValueError, ConnectionError or OSError on bad
    input, with one line per error.
    """
    named = settings.name if settings.log_format == "json" else ""
    shown_to = SearchGauges(settings.name).show
    progress = SearchProgress(settings.trials, settings.num_reports, json_of=named, on_change=shown_to)
    early = EarlyEnd(progress)
    with signals_told_to(early.stop):
        try:
            # Ray prints a message on every lost worker, also to stdout, which is only for the JSON document.
            with ExitStack() as held, redirect_stdout(sys.stderr):
                results = _search(settings, progress, early, held)
        except (ValueError, OSError) as error:
            _tell(settings, progress, {"name": settings.name, "status": "failed", "error": shown(str(error))})
            raise
        finally:
            early.wait_if_ending()
            with redirect_stdout(sys.stderr):
                if ray.is_initialized():
                    ray.shutdown()
    document = {"name": settings.name, "categories": [result.to_dict() for result in results]}
    is_whole = all(result.champion for result in results)
    _tell(settings, progress, {"status": "finished" if is_whole else "incomplete", **document})
    if settings.json:
        print(json.dumps(document, indent=2))  # noqa: T201
    return 0 if is_whole else 1


def _tell(settings: SearchSettings, progress: SearchProgress, document: Mapping[str, object]) -> None:
    """Tell the webhook, if there is one, that the search has ended."""
    if settings.webhook is not None and (remark := call_webhook(settings.webhook, document)):
        progress.say(remark)


class _Begun(NamedTuple):
    """A search whose checks have passed, with its first worker group."""

    plan: SearchPlan
    workers: Workers
    groups: Groups
    marks: Mapping[str, "Marks"]
    """By category, what to record of the files that its trials read."""


def _search(
    settings: SearchSettings, progress: SearchProgress, early: EarlyEnd, held: ExitStack
) -> list["CategoryResult"]:
    began = time.monotonic()
    held.enter_context(progress.beating())
    progress.begin("preparing: checks of data and servers, start of Ray")
    plan, workers, groups, marks = _begin(settings, progress, early, held)
    assert early.lease is not None
    lease = early.lease
    plan = dataclasses.replace(plan, owner=lease.owner, generation=lease.generation)
    progress.begin("starting: the first workers, and the run in MLflow")
    from dskd.detector import UNTRAINED_TEACHER
    from tune.jobs.outcome import say_outcome, show_outcome
    from tune.jobs.report import Run, write_report
    from tune.preflight import identity
    from tune.study.categories import run_search
    from tune.tracking.events import SearchBegan
    from tune.tracking.runs import code_revision, run_tags
    from tune.tracking.runs_page import experiment_note
    from tune.tracking.tracker import PLACE, Tracker

    if plan.teacher.is_untrained:
        progress.say(UNTRAINED_TEACHER)
    addresses = plan.addresses
    plan = dataclasses.replace(plan, study_names=identity.record(Storage(addresses.home), plan, workers.gpus))
    for category, found in marks.items():
        plan.inputs_of(category).record(found)
    unsent, revision = addresses.unsent_events(plan.name), code_revision()
    tracker = Tracker(
        addresses.tracking,
        plan.name,
        artifact_location=addresses.artifacts,
        tags=run_tags("tune/search.py", plan.name, plan.selection, plan.teacher, revision)
        | {PLACE: addresses.key(plan.name)},
        unsent=unsent,
        may_write=lease.is_sure,
        about=experiment_note(plan.name, plan.data, plan.selection, is_untrained=plan.teacher.is_untrained),
    )
    early.tracker, early.unsent = tracker, str(unsent)
    tracker.put(SearchBegan())
    page = _page(tracker, addresses.tracking)
    progress.say(f"its runs in MLflow: {page}")
    progress.say(f"searching {', '.join(plan.categories)}: {plan.trials} trials each, state in {addresses.home}")
    with progress.watching(plan.categories):
        results = run_search(plan, groups, workers, revision, tracker, progress)
    seconds = {category: progress.seconds_of(category) for category in plan.categories}
    progress.begin("finishing: the report")
    lease.check()
    report = write_report(
        results, plan, tracker, Run(began, [f"tune/{Path(sys.argv[0]).name}", *sys.argv[1:]], revision, page), seconds
    )
    if report.remark:
        progress.say(report.remark)
    progress.begin("finishing: the last events to MLflow")
    if num_unsent := tracker.close(_TRACKING_PATIENCE):
        progress.say(f"MLflow {tracker.trouble}: {num_unsent} events are in {unsent}; the same command writes them")
    if settings.log_format == "json":
        say_outcome(results, plan, progress.say)
    else:
        show_outcome(results, plan, settings, progress.time_share(), seconds, page, report.page)
    return results


def _page(tracker: "Tracker", uri: str) -> str:
    """How to see the search's runs; MLflow's first page if it does not answer now."""
    from tune.tracking.client import tracking_ui_command
    from tune.tracking.outbox import TrackingRefusedError, TrackingUnavailableError

    try:
        return tracker.page(_PAGE_PATIENCE)
    except (TrackingUnavailableError, TrackingRefusedError):
        return tracking_ui_command(uri)


def _begin(settings: SearchSettings, progress: SearchProgress, early: EarlyEnd, held: ExitStack) -> _Begun:
    """Check data, teacher, servers and cluster, and start the first worker group; `held` keeps it and the lease.

    `early` comes to know of both.

    Raises PreflightError with all errors.
    """
    check_place(absolute(settings.storage))
    lease = held.enter_context(ExitStack())  # entered first, so given back last
    with drafted(settings) as draft, ThreadPoolExecutor(2, thread_name_prefix="preflight") as beside:
        leasing = beside.submit(_take_lease, draft, lease, early)
        checking = beside.submit(_check, draft)
        plan, of_cluster, begun = draft.plan, [], None
        if settings.address or plan is not None:  # do not start Ray if there are errors already
            try:
                connect(settings.address)
                if plan is not None and not leasing.result():
                    begun = _first_group(plan, early, held, progress.say)
            except (ValueError, OSError) as error:
                of_cluster = str(error).splitlines()
        categories, errors, marks = checking.result()
        errors += [line for line in leasing.result() if line not in errors]
    if errors or of_cluster or begun is None:
        raise PreflightError([*errors, *of_cluster])
    for category in categories:
        progress.say(category)
    return begun._replace(marks=marks)


def _take_lease(draft: Draft, held: ExitStack, early: EarlyEnd) -> list[str]:
    """Take the lease of the search's name, first of all: a second search of it must start nothing; returns errors."""
    if draft.errors:
        return []
    try:
        lease = Lease(Storage(draft.addresses.home), draft.settings.name, early.lose)
        early.lease = lease  # known before it is taken, so that a stop gives it back
        lease.take()
        held.callback(lease.give_back)
    except (ValueError, OSError) as error:
        return str(error).splitlines()
    return []


def _check(draft: Draft) -> tuple[list[str], list[str], Mapping[str, "Marks"]]:
    """Check all but the cluster; returns a line for each category, the errors, and what to record of their files."""
    from tune.preflight.checks import check_inputs

    categories, errors, marks = check_inputs(draft)
    if not errors:  # what the search needs next
        from tune.jobs import outcome  # noqa: F401
    return [category.describe() for category in categories.values()], errors, marks


def _first_group(plan: SearchPlan, early: EarlyEnd, held: ExitStack, say: Callable[[str], object]) -> _Begun:
    """Start the worker groups; raises ValueError if the cluster cannot hold a trial."""
    nodes = cluster_nodes()
    if plan.ray_address is None:
        check_cluster(plan, nodes)
    gpus = resolve_gpus(plan.gpus_per_worker, nodes)
    workers = Workers(plan.num_workers, plan.cpus_per_worker, gpus, plan.trials_per_gpu)
    groups = worker_groups(
        workers,
        min_workers=plan.min_workers,
        home=plan.addresses.home,
        max_trials=plan.max_concurrent,
        first=spec_of(plan, plan.categories[0], workers, revision=""),
        on_loss=early.lose_cluster,
    )
    begun = _Begun(plan, workers, held.enter_context(groups), {})
    early.groups = begun.groups
    if plan.ray_address is not None:  # what waits makes a cluster grow, so only now
        wait_for_room(workers._replace(number=plan.min_workers or plan.num_workers), plan.wait_seconds, say)
        weights = str(plan.teacher) if plan.teacher.is_file else ""
        inputs = {"--data": plan.data, "--textures": plan.textures, "--teacher-weights": weights}
        check_reach(plan.addresses.home, inputs, say=say)
    return begun
