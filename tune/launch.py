"""From settings to a finished search: connect, check, search, print the table."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ray
from rich.console import Console
from rich.table import Table

from tune import preflight
from tune.progress import Progress
from tune.settings import SearchSettings
from tune.staging import absolute
from tune.studies import Outcome, run_search, summary
from tune.tracking import Tracker, tracking_ui_command
from tune.worker import Assignment

_TRACKING_PATIENCE = 600.0
"""Seconds that a finished search waits for a tracking server that is away."""


def launch(settings: SearchSettings) -> int:
    """Run a search; the exit code: 0 all categories have a champion, 1 some have none, 2 bad input."""
    try:
        return _search(settings)
    except (ValueError, ConnectionError, OSError) as error:
        print(f"search: error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("search: interrupted; the same command continues it", file=sys.stderr)  # noqa: T201
        return 130
    finally:
        if ray.is_initialized():
            ray.shutdown()


def _search(settings: SearchSettings) -> int:
    progress = Progress(settings.trials)
    if not settings.is_remote_storage:
        Path(settings.storage_uri).mkdir(parents=True, exist_ok=True)
    categories = preflight.check_inputs(settings)
    if settings.teacher_weights == "random":
        progress.say("UNTRAINED TEACHER: fit to see the machinery, not for inspection")
    connect(settings.ray_address)
    preflight.check_cluster(settings)
    assignment = Assignment(
        config=settings.run_config().to_dict(),
        data=absolute(settings.data),
        category="",
        teacher_weights=_absolute_weights(settings.teacher_weights),
        cache_gb=settings.cache_gb,
        num_workers=settings.workers_per_trial,
        cpus_per_worker=settings.cpus_per_worker,
        gpus_per_worker=preflight.gpus_per_worker(settings),
        workers_uri="",
        revision=code_revision(),
    )
    folder = Path.home() if settings.is_remote_storage else Path(settings.storage_uri)
    unsent = folder / f"dskd-unsent-{settings.name}.jsonl"
    tracker = Tracker(
        settings.tracking,
        settings.name,
        artifact_location=settings.artifact_location,
        tags={
            "dskd.search": settings.name,
            "dskd.selection": "val",
            "dskd.teacher": "random (untrained)" if settings.teacher_weights == "random" else "pretrained",
            "mlflow.source.git.commit": assignment.revision,
        },
        unsent=unsent,
    )
    progress.say(f"searching {', '.join(categories)}: {settings.trials} trials each, state in {settings.search_uri}")
    outcomes = run_search(settings, categories, assignment, tracker, progress)
    if num_unsent := tracker.close(_TRACKING_PATIENCE):
        progress.say(f"MLflow is away: {num_unsent} events are in {unsent}; the same command writes them")
    _show(outcomes, settings)
    if settings.json:
        print(json.dumps({"name": settings.name, "categories": summary(outcomes)}, indent=2))  # noqa: T201
    return 0 if all(outcome.champion for outcome in outcomes) else 1


def connect(address: str | None) -> None:
    """Join the cluster at `address`, or start one on this machine, dashboard included for the State API."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:
        ray.init(address="local", include_dashboard=True, log_to_driver=False, logging_level=logging.WARNING)
    else:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)


def code_revision() -> str:
    """Git commit of this checkout, empty where there is none, as in a Ray job's working_dir."""
    found = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip()


def _absolute_weights(weights: str) -> str:
    return weights if weights in ("hub", "random") else str(Path(weights).absolute())


def _show(outcomes: Sequence[Outcome], settings: SearchSettings) -> None:
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
    console.print("validation: mean of image AUROC and AUPRO on synthetic defects; AUROC and AUPRO: test images, once")
    if settings.teacher_weights == "random":
        console.print("[bold red]untrained teacher: these figures say nothing about inspection[/]")
    for outcome in outcomes:
        if outcome.error:
            console.print(f"{outcome.category}: no champion: {outcome.error}", markup=False)
    lines = [
        f"pull:    python tune/pull.py all --name {settings.name} --storage {settings.storage} --to detectors",
        f"compare: {tracking_ui_command(settings.tracking)}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
