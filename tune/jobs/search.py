"""From settings to a finished search: connect, check, search, print the table."""

import _thread
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path

import ray
import ray.exceptions
from rich.console import Console
from rich.table import Table

from dskd.checkpoint import RECORD_FILE
from dskd.config import RunConfig
from tune.preflight import checks as preflight
from tune.preflight import identity
from tune.preflight.checks import join_cluster
from tune.runtime.cluster import gpus_per_worker
from tune.settings.search import SearchSettings
from tune.storage.champions import Champion
from tune.storage.files import Storage, StorageError
from tune.storage.lease import only_search
from tune.storage.staging import outline
from tune.storage.uris import absolute, unsent_events
from tune.study.categories import CategoryResult, run_search, summary
from tune.study.progress import SearchProgress, TimeShare
from tune.tracking.client import tracking_ui_command
from tune.tracking.runs import code_revision
from tune.tracking.tracker import Tracker
from tune.trial.spec import TrialSpec

_TRACKING_PATIENCE = 600.0
"""Seconds that a finished search waits for a tracking server that is away."""


def launch(settings: SearchSettings) -> int:
    """Run a search; the exit code: 0 all categories have a champion, 1 some have none, 2 bad input."""
    try:
        # Ray prints a word on every lost worker, also on stdout, which is the JSON document's alone.
        with ExitStack() as held, redirect_stdout(sys.stderr):
            code, document = _search(settings, held)
    except (ValueError, ConnectionError, OSError) as error:
        preflight.print_errors(error)
        return 2
    except KeyboardInterrupt:
        print("search: interrupted; the same command continues it", file=sys.stderr)  # noqa: T201
        return 130
    finally:
        with redirect_stdout(sys.stderr):
            if ray.is_initialized():
                ray.shutdown()
    if settings.json:
        print(document)  # noqa: T201
    return code


def _search(settings: SearchSettings, held: ExitStack) -> tuple[int, str]:
    """The exit code, and the document for --json."""
    progress = SearchProgress(settings.trials, settings.epochs)
    faults = preflight.input_errors(settings)
    if not faults:
        held.enter_context(only_search(Storage(settings.search_uri), settings.name, partial(_end, progress)))
    if settings.ray_address or not faults:  # nothing is worth starting Ray for where something is wrong already
        faults += preflight.collect_errors(lambda: join_cluster(settings))
    if faults:
        raise preflight.PreflightError(faults)
    with outline(settings.data) as root:
        categories = settings.chosen_categories(root)
        spaces = settings.spaces(categories, root)
    if settings.teacher_weights == "random":
        progress.say("UNTRAINED TEACHER: fit to see the machinery, not for inspection")
    spec = TrialSpec(
        config=settings.run_config().to_dict(),
        data=absolute(settings.data),
        category="",
        teacher_weights=_absolute_weights(settings.teacher_weights),
        cache_gb=settings.cache_gb,
        num_workers=settings.workers_per_trial,
        cpus_per_worker=settings.cpus_per_worker,
        gpus_per_worker=gpus_per_worker(settings),
        workers_uri="",
        revision=code_revision(),
        textures=str(settings.textures.absolute()) if settings.textures else "",
        selection=settings.selection,
        min_workers=settings.min_workers_per_trial,
    )
    identity.record(Storage(settings.search_uri), settings, spaces, spec.gpus_per_worker)
    unsent = unsent_events(settings.storage, settings.name)
    tracker = Tracker(
        settings.tracking,
        settings.name,
        artifact_location=settings.artifact_location,
        tags={
            "dskd.search": settings.name,
            "dskd.selection": settings.selection,
            "dskd.teacher": "random (untrained)" if settings.teacher_weights == "random" else "pretrained",
            "mlflow.source.git.commit": spec.revision,
        },
        unsent=unsent,
    )
    progress.say(f"searching {', '.join(categories)}: {settings.trials} trials each, state in {settings.search_uri}")
    with progress.watching(categories):
        outcomes = run_search(settings, spaces, spec, tracker, progress)
    if num_unsent := tracker.close(_TRACKING_PATIENCE):
        progress.say(f"MLflow is away: {num_unsent} events are in {unsent}; the same command writes them")
    _show(outcomes, settings, progress.time_share())
    document = json.dumps({"name": settings.name, "categories": summary(outcomes)}, indent=2)
    return 0 if all(outcome.champion for outcome in outcomes) else 1, document


def _end(progress: SearchProgress, reason: str) -> None:
    """From any thread, end this search as Ctrl-C does."""
    progress.say(reason)
    _thread.interrupt_main()


def _absolute_weights(weights: str) -> str:
    return weights if weights in ("hub", "random") else str(Path(weights).absolute())


def _show(outcomes: Sequence[CategoryResult], settings: SearchSettings, share: TimeShare | None) -> None:
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
    for outcome in outcomes:
        counts = [str(outcome.num_trials), str(outcome.num_pruned), str(outcome.num_failed)]
        metrics = outcome.champion.metrics if outcome.champion else {}
        figures = ("val/objective", "test/image_auroc", "test/pixel_auroc", "test/aupro")
        table.add_row(
            outcome.category,
            *counts,
            *(f"{metrics[name]:.4f}" if name in metrics else "–" for name in figures),
        )
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 110)
    console.print(table)
    if settings.selection == "oracle":
        console.print(
            "[bold red]selection=oracle: chosen by the test images themselves, as papers do; no honest figures[/]"
        )
    else:
        console.print(
            "validation: mean of image AUROC and AUPRO on synthetic defects; AUROC and AUPRO: test images, once"
        )
    if settings.teacher_weights == "random":
        console.print("[bold red]untrained teacher: these figures say nothing about inspection[/]")
    for outcome in outcomes:
        if outcome.error:
            console.print(f"{outcome.category}: no champion: {outcome.error}", markup=False)
        if outcome.champion:
            place = f"{settings.search_uri}/{outcome.champion.folder}"
            for line in (f"{outcome.category}: {changes_of(outcome.champion, settings)}", f"  in {place}"):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    if share is not None:
        console.print(share.sentence, highlight=False)
    lines = [
        f"pull:    python tune/pull.py all --name {settings.name} --storage {settings.storage} --out detectors",
        f"compare: {tracking_ui_command(settings.tracking)}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def changes_of(champion: Champion, settings: SearchSettings) -> str:
    """What a champion's configuration has other than the preset that the search started from."""
    try:
        record = Storage(settings.search_uri).read_json(f"{champion.folder}/{RECORD_FILE}")
    except StorageError as error:  # the search itself is done
        return str(error)
    if record is None:
        return "its record is missing in the storage"
    found = RunConfig.from_dict(record["config"]).flat()
    differences = {
        preset: {name: value for name, value in found.items() if value != base.flat()[name]}
        for preset, base in settings.run_configs().items()
    }
    preset = min(differences, key=lambda name: len(differences[name]))
    changed = ", ".join(f"{name} {_short(value)}" for name, value in differences[preset].items())
    return f"{preset} with {changed}" if changed else f"{preset} itself"


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
