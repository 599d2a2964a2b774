"""From settings to a finished search: connect, check, search, print the table."""

import _thread
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from functools import partial

import ray
import ray.exceptions
from rich.console import Console
from rich.table import Table

from dskd.checkpoint import RECORD_FILE
from dskd.config import RunConfig
from dskd.detector import UNTRAINED_TEACHER
from tune.preflight import identity
from tune.preflight.checks import PreflightError, check_inputs, collect_errors, join_cluster
from tune.preflight.draft import drafted
from tune.runtime.cluster import cluster_nodes, resolve_gpus
from tune.settings.plan import SearchPlan
from tune.settings.search import SearchSettings
from tune.storage.champions import Champion
from tune.storage.files import Storage, StorageError
from tune.storage.lease import only_search
from tune.study.categories import CategoryResult, run_search
from tune.study.progress import SearchProgress, TimeShare
from tune.tracking.client import tracking_ui_command
from tune.tracking.runs import code_revision, run_tags
from tune.tracking.tracker import Tracker

_TRACKING_PATIENCE = 600.0
"""Seconds to wait for an absent tracking server after the search has finished."""


def search(settings: SearchSettings) -> int:
    """Run a search; returns the exit code: 0 all categories have a champion, 1 some have none.

    Raises ValueError, ConnectionError or OSError on bad input, with one line per error.
    """
    try:
        # Ray prints a message on every lost worker, also to stdout, which is only for the JSON document.
        with ExitStack() as held, redirect_stdout(sys.stderr):
            results = _search(settings, held)
    finally:
        with redirect_stdout(sys.stderr):
            if ray.is_initialized():
                ray.shutdown()
    if settings.json:
        document = {"name": settings.name, "categories": [result.to_dict() for result in results]}
        print(json.dumps(document, indent=2))  # noqa: T201
    return 0 if all(result.champion for result in results) else 1


def _search(settings: SearchSettings, held: ExitStack) -> list[CategoryResult]:
    progress = SearchProgress(settings.trials, next(iter(settings.run_configs().values())).train.epochs)
    plan = _checked_plan(settings, progress, held)
    if plan.teacher.is_untrained:
        progress.say(UNTRAINED_TEACHER)
    addresses = plan.addresses
    gpus = resolve_gpus(plan.gpus_per_worker, cluster_nodes())
    identity.record(Storage(addresses.home), plan, gpus)
    unsent, revision = addresses.unsent_events(plan.name), code_revision()
    tracker = Tracker(
        addresses.tracking,
        plan.name,
        artifact_location=addresses.artifacts,
        tags=run_tags("tune/search.py", plan.name, plan.selection, plan.teacher, revision),
        unsent=unsent,
    )
    progress.say(f"searching {', '.join(plan.categories)}: {plan.trials} trials each, state in {addresses.home}")
    with progress.watching(plan.categories):
        results = run_search(plan, gpus, revision, tracker, progress)
    if num_unsent := tracker.close(_TRACKING_PATIENCE):
        progress.say(f"MLflow does not answer: {num_unsent} events are in {unsent}; the same command writes them")
    _show(results, plan, settings, progress.time_share())
    return results


def _checked_plan(settings: SearchSettings, progress: SearchProgress, held: ExitStack) -> SearchPlan:
    """The plan of a search after checking data, teacher, servers and cluster; `held` keeps its lease.

    Raises PreflightError with all errors.
    """
    with drafted(settings) as draft:
        categories, errors = check_inputs(draft)
    if not errors:
        held.enter_context(only_search(Storage(draft.addresses.home), settings.name, partial(_end, progress)))
    if settings.address or not errors:  # do not start Ray if there are errors already
        errors += collect_errors(lambda: join_cluster(settings.address, draft.plan))
    if errors or draft.plan is None:
        raise PreflightError(errors)
    for category in categories.values():
        progress.say(category.describe())
    return draft.plan


def _end(progress: SearchProgress, reason: str) -> None:
    """End this search as Ctrl-C does; callable from any thread."""
    progress.say(reason)
    _thread.interrupt_main()


def _show(
    results: Sequence[CategoryResult], plan: SearchPlan, settings: SearchSettings, share: TimeShare | None
) -> None:
    table = Table(title=f"Champions of {settings.name}")
    for column in (
        "category",
        "trials",
        "pruned",
        "failed",
        "validation",
        "image AUROC",
        "pixel AUROC",
        "AUPRO",
    ):
        table.add_column(column, justify="left" if column == "category" else "right")
    for result in results:
        counts = [str(result.num_trials), str(result.num_pruned), str(result.num_failed)]
        metrics = result.champion.metrics if result.champion else {}
        figures = ("val/objective", "test/image_auroc", "test/pixel_auroc", "test/aupro")
        table.add_row(
            result.category,
            *counts,
            *(f"{metrics[name]:.4f}" if name in metrics else "–" for name in figures),
        )
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 110)
    console.print(table)
    if settings.selection == "oracle":
        console.print(
            "[bold red]selection=oracle: selected on the test images, as papers do; these figures are too optimistic[/]"
        )
    else:
        chooses = "image AUROC" if plan.config.data.layout == "classes" else "mean of image AUROC and AUPRO"
        console.print(f"validation: {chooses} on synthetic defects; AUROC and AUPRO: test images, once")
    if plan.teacher.is_untrained:
        console.print("[bold red]untrained teacher: these figures have no meaning for inspection[/]")
    for result in results:
        if result.error:
            console.print(f"{result.category}: no champion: {result.error}", markup=False)
        if result.champion:
            place = f"{plan.addresses.home}/{result.champion.folder}"
            for line in (f"{result.category}: {changes_of(result.champion, plan)}", f"  in {place}"):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    if share is not None:
        console.print(share.sentence, highlight=False)
    lines = [
        f"pull:    python tune/pull.py all --name {settings.name} --storage {settings.storage} --out detectors",
        f"compare: {tracking_ui_command(plan.addresses.tracking)}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def changes_of(champion: Champion, plan: SearchPlan) -> str:
    """The fields in which a champion's configuration differs from the closest preset of the search, as text."""
    try:
        record = Storage(plan.addresses.home).read_json(f"{champion.folder}/{RECORD_FILE}")
    except StorageError as error:  # the search itself has succeeded
        return str(error)
    if record is None:
        return "its record is missing in the storage"
    found = RunConfig.from_dict(record["config"]).flat()
    differences = {
        preset: {name: value for name, value in found.items() if value != base.flat()[name]}
        for preset, base in plan.configs.items()
    }
    preset = min(differences, key=lambda name: len(differences[name]))
    changed = ", ".join(f"{name} {_short(value)}" for name, value in differences[preset].items())
    return f"{preset} with {changed}" if changed else f"{preset} itself"


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
