"""`tune/search.py --dry-run`: everything that a search would find wrong, its plan, and what it will take.

Leaves no trace. A process of its own imports torch and measures the speed while this one makes the other checks.
"""

import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from dskd.config import RunConfig
from dskd.data.datasets import read_category
from tune.preflight.forecast import (
    CategoryPlan,
    Forecast,
    Slots,
    Speed,
    SpeedTask,
    forecast,
    measure_speed,
    plan_categories,
    share_slots,
)
from tune.settings.search import SearchSettings
from tune.settings.space import Range, Space
from tune.storage.staging import content, outline

_NUM_IMAGES = 2
_SLOT_SECONDS = 60.0
"""How long a busy cluster may take to free the place of one worker."""


class _Plan(NamedTuple):
    settings: SearchSettings
    config: RunConfig
    categories: Sequence[CategoryPlan]
    spaces: Mapping[str, Space]
    slots: Slots
    gpus_per_worker: float
    speed: Speed | None
    """None where a busy cluster had no place to measure it."""
    forecast: Forecast | None


def dry_run(settings: SearchSettings) -> int:
    """Print plan and forecast of a search without starting it; the exit code: 0 it could start, 2 it could not."""
    try:
        plan = _on_cluster(settings) if settings.ray_address else _on_this_machine(settings)
    except (ValueError, OSError) as error:
        from tune.preflight.checks import print_errors

        print_errors(error)
        return 2
    except KeyboardInterrupt:
        print("search: interrupted", file=sys.stderr)  # noqa: T201
        return 130
    _show(plan)
    if settings.json:
        print(json.dumps(_document(plan), indent=2))  # noqa: T201
    return 0


def _on_this_machine(settings: SearchSettings) -> _Plan:
    # forked, it would share this process's threads
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        measuring = _submitted(pool, settings)
        from tune.preflight import checks as preflight
        from tune.runtime.ray_internals import cpus_of_this_machine

        faults = preflight.input_errors(settings, leave_no_trace=True)
        speed = None
        if measuring is not None:
            try:
                speed = measuring.result()
            except ValueError as error:
                if str(error) not in " ".join(faults):
                    faults.append(str(error))
            except BrokenProcessPool:
                faults.append("the process that measures a training step was killed; is there too little memory?")
    nodes = [{"CPU": cpus_of_this_machine(), "GPU": float(speed.num_gpus if speed else 0)}]
    return _planned(
        settings, faults + preflight.collect_errors(lambda: preflight.check_resources(settings, nodes)), nodes, speed
    )


def _submitted(pool: ProcessPoolExecutor, settings: SearchSettings) -> "Future[Speed] | None":
    try:
        task = _task(settings)
    except (ValueError, OSError):  # what is wrong with the data is said by preflight
        return None
    return pool.submit(measure_speed, task)


def _task(settings: SearchSettings) -> SpeedTask:
    with outline(settings.data) as root:
        category = read_category(root, settings.chosen_categories(root)[0])
        images = tuple(content(settings.data, root, sample.path) for sample in category.train[:_NUM_IMAGES])
    weights = settings.teacher_weights
    return SpeedTask(
        config=settings.run_config().to_dict(),
        teacher_weights=weights if weights in ("hub", "random") else str(Path(weights).absolute()),
        images=images,
        num_workers=settings.workers_per_trial,
        cpus_per_worker=settings.cpus_per_worker,
        gpus_per_worker=settings.gpus_per_worker,
    )


def _on_cluster(settings: SearchSettings) -> _Plan:
    import ray

    from tune.preflight import checks as preflight
    from tune.preflight.checks import join_cluster
    from tune.runtime.cluster import cluster_nodes, gpus_per_worker

    faults = preflight.input_errors(settings, leave_no_trace=True)
    faults += preflight.collect_errors(lambda: preflight.check_teacher_file(settings))
    try:
        faults += preflight.collect_errors(lambda: join_cluster(settings))
        nodes = cluster_nodes() if ray.is_initialized() else []
        speed = None
        if not faults:
            try:
                speed = _measured_there(settings, gpus_per_worker(settings, nodes))
            except ValueError as error:
                faults.append(f"on a node of the cluster: {error}")
        return _planned(settings, faults, nodes, speed)
    finally:
        if ray.is_initialized():
            ray.shutdown()


def _measured_there(settings: SearchSettings, gpus_per_worker: float) -> Speed | None:
    """Speed of a worker, measured where a trial of the search would get its place."""
    import dataclasses

    import ray
    import ray.exceptions

    task = dataclasses.replace(_task(settings), gpus_per_worker=gpus_per_worker)
    measure = ray.remote(max_retries=0)(measure_speed)
    running = measure.options(num_cpus=settings.cpus_per_worker, num_gpus=gpus_per_worker).remote(task)
    done, _ = ray.wait([running], timeout=_SLOT_SECONDS)
    if not done:
        ray.cancel(running, force=True)
        return None
    try:
        speed: Speed = ray.get(running)
    except ray.exceptions.RayTaskError as error:
        raise ValueError(str(error.cause).splitlines()[0]) from None
    except ray.exceptions.RayError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    return speed


def _planned(
    settings: SearchSettings, faults: list[str], nodes: Sequence[Mapping[str, float]], speed: Speed | None
) -> _Plan:
    from tune.preflight import checks as preflight
    from tune.runtime.cluster import gpus_per_worker, trial_slots

    if faults:
        raise preflight.PreflightError(faults)
    config = settings.run_config()
    with outline(settings.data) as root:
        found = {name: read_category(root, name) for name in settings.chosen_categories(root)}
        spaces = settings.spaces(tuple(found), root)
    categories = plan_categories(found, config)
    gpus = gpus_per_worker(settings, nodes)
    slots = share_slots(len(categories), trial_slots(settings, nodes))
    expected = forecast(settings, config, categories, speed, slots, gpus) if speed else None
    return _Plan(settings, config, categories, spaces, slots, gpus, speed, expected)


def _varied(space: Space) -> dict[str, str]:
    """Every dimension as a person reads it; of several presets, with the preset before its name."""
    found = {}
    for preset, dimensions in space.dimensions.items():
        for name, dimension in dimensions.items():
            if isinstance(dimension, Range):
                text = f"{dimension.low:g} … {dimension.high:g}{' (log)' if dimension.log else ''}"
            else:
                text = " | ".join(map(str, dimension.options))
            found[f"{preset}.{name}" if len(space.bases) > 1 else name] = text
    return found


def _document(plan: _Plan) -> dict[str, Any]:
    from tune.tracking.client import without_password

    settings = plan.settings
    return {
        "name": settings.name,
        "trials": settings.trials,
        "categories": [category._asdict() for category in plan.categories],
        "config": plan.config.to_dict(),
        "varied": {name: _varied(space) for name, space in plan.spaces.items()},
        "slots": plan.slots._asdict(),
        "workers_per_trial": settings.workers_per_trial,
        "cpus_per_worker": settings.cpus_per_worker,
        "gpus_per_worker": plan.gpus_per_worker,
        "storage": settings.search_uri,
        "tracking": without_password(settings.tracking),
        "studies": without_password(settings.studies),
        "speed": plan.speed._asdict() if plan.speed else None,
        "forecast": plan.forecast._asdict() if plan.forecast else None,
    }


def _show(plan: _Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    from tune.tracking.client import without_password

    settings, config = plan.settings, plan.config
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 110, highlight=False, markup=False)
    table = Table(title=f"Plan of {settings.name}: {len(plan.categories)} categories × {settings.trials} trials × "
                  f"{config.train.epochs} epochs")  # fmt: skip
    for column in ("category", "training images", "validation", "calibration", "test"):
        table.add_column(column, justify="left" if column == "category" else "right")
    for each in plan.categories:
        table.add_row(
            each.category, *map(str, (each.num_train, each.num_validation, each.num_calibration, each.num_test))
        )
    console.print(table)
    if settings.teacher_weights == "random":
        console.print("untrained teacher: these figures will say nothing about inspection", style="bold red")
    usual, *rest = plan.spaces.values()
    others = [space for space in rest if space.dimensions != usual.dimensions]
    slots, workers = plan.slots, settings.workers_per_trial
    lines = {
        "trains": f"{settings.preset}, {config.data.image_size} pixels, batches of {config.train.batch_size}, "
        f"teacher {config.model.backbone} ({settings.teacher_weights})"
        + (f", stage I of {config.amplification.amplification_epochs} epochs" if _has_stage_one(config) else ""),
        "at once": f"{slots.side_by_side} categories, {slots.concurrency} trials of each; a trial takes {workers} × "
        f"({settings.cpus_per_worker:g} CPUs, {plan.gpus_per_worker:g} GPUs)",
        "varies": ", ".join(f"{name} {span}" for name, span in _varied(usual).items())
        + (f"; {len(others)} categories otherwise (--json)" if others else ""),
        "state": settings.search_uri,
        "studies": without_password(settings.studies),
        "tracking": without_password(settings.tracking),
        "measured": _speed_line(plan),
        "forecast": _forecast_line(plan),
    }
    for name, text in lines.items():
        console.print(f"{name + ':':10}{text}", soft_wrap=True)


def _has_stage_one(config: RunConfig) -> bool:
    return config.amplification.amplification


def _speed_line(plan: _Plan) -> str:
    if (speed := plan.speed) is None:
        return f"nothing: the cluster had no place free for a worker within {_SLOT_SECONDS:.0f} s"
    share = max(1, plan.config.train.batch_size // plan.settings.workers_per_trial)
    scaled = "" if speed.images_measured == share else f" (scaled up from {speed.images_measured})"
    return (
        f"{speed.device}: a step of {share} images{scaled} {speed.step:.3g} s, "
        f"validation {speed.validation:.3g} s an image"
    )


def _forecast_line(plan: _Plan) -> str:
    if (found := plan.forecast) is None:
        return "none"
    if found.epochs_pruned == found.epochs_full:
        span, cpu, gpu = duration(found.wall_seconds_full), f"{found.cpu_hours_full:.3g}", f"{found.gpu_hours_full:.3g}"
    else:
        span = (
            f"{duration(found.wall_seconds_pruned)} with ASHA as expected, {duration(found.wall_seconds_full)} at most"
        )
        cpu = f"{found.cpu_hours_pruned:.3g} … {found.cpu_hours_full:.3g}"
        gpu = f"{found.gpu_hours_pruned:.3g} … {found.gpu_hours_full:.3g}"
    hours = f"{cpu} CPU hours" + (f", {gpu} GPU hours" if found.gpu_hours_full > 0 else "")
    return f"{span}; {hours}; a whole trial {duration(found.trial_seconds)}"


def duration(seconds: float) -> str:
    """For people: two units, the larger first."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"
