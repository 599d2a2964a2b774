"""`tune/search.py --dry-run`: all errors that a search would report, its plan, and a forecast of its time.

Leaves no files. A separate process imports torch and measures the speed while this one makes the other checks.
"""

import dataclasses
import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, NamedTuple

from dskd.calibration import images_for, lowest_rate
from dskd.config import RunConfig, TeacherSource
from dskd.data.datasets import read_category
from dskd.show.times import duration
from tune.preflight.draft import Draft, drafted
from tune.preflight.forecast import (
    CategoryPlan,
    Forecast,
    Slots,
    Speed,
    SpeedTask,
    cache_bytes,
    forecast,
    in_tiles,
    measure_speed,
    measure_speeds,
    plan_categories,
    share_slots,
)
from tune.settings.plan import SearchPlan
from tune.settings.search import SearchSettings
from tune.settings.workers import Workers
from tune.storage.shown import printable, shown, shown_url
from tune.storage.staging import content

if TYPE_CHECKING:
    from tune.preflight.checks import Inputs

_NUM_IMAGES = 2
_WANTED_RATE = 0.01
"""The false-alarm rate that inspectors want."""
_GAIN_ERROR = 0.07
"""Standard error of a gain × √(images in the folds that decide), about the same on the two categories where it was
measured (benchmarks/README.md, choosing with few images)."""
_SLOT_SECONDS = 60.0
"""Seconds to wait for a free worker slot on a busy cluster."""


class _DryRun(NamedTuple):
    plan: SearchPlan
    categories: Sequence[CategoryPlan]
    unread: Sequence[str]
    """A line for each category with files that are not read."""
    slots: Slots
    workers: Workers
    teachers: Mapping[str, "_Measured"]
    """By backbone, in the order of the plan; empty if a busy cluster had no free slot for the measurement."""

    @property
    def slowest(self) -> "_Measured | None":
        """The teacher with which the search would take longest."""
        return max(self.teachers.values(), key=lambda each: each.forecast.wall_seconds_full, default=None)

    def num_steps(self, category: CategoryPlan) -> int:
        """Steps of a whole trial; of tiles, if images are cut into them and their number is known."""
        tiles = self.slowest.speed.tiles if self.slowest else 1.0
        return self.plan.config.train.num_steps(in_tiles(category, tiles).num_train)


class _Measured(NamedTuple):
    """What is known of the trials with one teacher."""

    config: RunConfig
    speed: Speed
    forecast: Forecast
    """Of the search if every trial had this teacher."""
    cache_bytes: int


def dry_run(settings: SearchSettings) -> int:
    """Print plan and forecast of a search without starting it; returns exit code 0 if it could start.

    Raises PreflightError with all errors.
    """
    with drafted(settings) as draft:
        found = _on_cluster(draft) if settings.address else _on_this_machine(draft)
    _show(found, settings)
    if settings.json:
        print(json.dumps(_document(found), indent=2))  # noqa: T201
    return 0


def _on_this_machine(draft: Draft) -> _DryRun:
    # spawn, since a forked process would inherit the state of this one's threads
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        measuring = _submitted(pool, draft)
        from tune.preflight.checks import check_inputs
        from tune.runtime.ray_internals import cpus_of_this_machine

        inputs = check_inputs(draft, leave_no_trace=True)
        errors, speeds = inputs.errors, list[Speed]()
        if measuring is not None:
            try:
                speeds = measuring.result()
            except ValueError as error:
                if str(error) not in " ".join(errors):
                    errors.append(str(error))
            except BrokenProcessPool:
                errors.append("the process that measures a training step was killed; is there too little memory?")
    nodes = [{"CPU": cpus_of_this_machine(), "GPU": float(speeds[0].num_gpus if speeds else 0)}]
    return _planned(draft, inputs, errors, nodes, speeds)


def _submitted(pool: ProcessPoolExecutor, draft: Draft) -> "Future[list[Speed]] | None":
    try:
        return pool.submit(measure_speeds, _tasks(draft))
    except (ValueError, OSError):  # the checks report the errors of the data
        return None


def _tasks(draft: Draft) -> list[SpeedTask]:
    """The speed measurements for this search, one for each teacher.

    Raises ValueError if the data or the settings are unusable.
    """
    if draft.plan is None or draft.root is None:
        raise ValueError("; ".join(draft.errors))
    plan = draft.plan
    category = read_category(draft.root, plan.categories[0], plan.config.data.layout)
    images = tuple(content(plan.data, draft.root, sample.path) for sample in category.train[:_NUM_IMAGES])
    return [
        SpeedTask(
            config=config.to_dict(),
            teacher_weights=str(plan.teacher),
            images=images,
            num_workers=plan.num_workers,
            cpus_per_worker=plan.cpus_per_worker,
            gpus_per_worker=plan.gpus_per_worker,
            trials_per_gpu=plan.trials_per_gpu,
        )
        for config in plan.teachers.values()
    ]


def _on_cluster(draft: Draft) -> _DryRun:
    import ray

    from tune.preflight.checks import check_inputs, collect_errors
    from tune.preflight.room import join_cluster
    from tune.runtime.cluster import cluster_nodes, resolve_gpus

    inputs = check_inputs(draft, leave_no_trace=True)
    errors = inputs.errors
    errors += collect_errors(TeacherSource(draft.settings.teacher_weights).check_exists)
    try:
        errors += collect_errors(lambda: join_cluster(draft.settings.address, draft.plan))
        nodes = cluster_nodes() if ray.is_initialized() else []
        speeds: list[Speed] = []
        if not errors:
            try:
                for task in _tasks(draft):
                    task = dataclasses.replace(task, gpus_per_worker=resolve_gpus(task.gpus_per_worker, nodes))
                    if (speed := _measure_on_cluster(task)) is None:
                        speeds = []
                        break
                    speeds.append(speed)
            except ValueError as error:
                errors.append(f"on a node of the cluster: {error}")
        return _planned(draft, inputs, errors, nodes, speeds)
    finally:
        if ray.is_initialized():
            ray.shutdown()


def _measure_on_cluster(task: SpeedTask) -> Speed | None:
    """Speed of a worker, measured on a node and with the resources of a trial."""
    import ray
    import ray.exceptions

    measure = ray.remote(max_retries=0)(measure_speed)
    running = measure.options(num_cpus=task.cpus_per_worker, num_gpus=task.gpus_per_worker).remote(task)
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
    draft: Draft, inputs: "Inputs", errors: list[str], nodes: Sequence[Mapping[str, float]], speeds: Sequence[Speed]
) -> _DryRun:
    from tune.preflight.checks import collect_errors
    from tune.preflight.room import PreflightError, check_cluster
    from tune.runtime.cluster import count_trials, resolve_gpus

    plan = draft.plan
    if plan is not None and not draft.settings.address:  # a cluster was checked when joined
        errors += collect_errors(lambda: check_cluster(plan, nodes))
    if plan is None or errors:
        raise PreflightError(errors)
    categories = plan_categories(inputs.categories, plan.config)
    gpus = resolve_gpus(plan.gpus_per_worker, nodes)
    workers = Workers(plan.num_workers, plan.cpus_per_worker, gpus, plan.trials_per_gpu)
    slots = share_slots(len(categories), plan.max_concurrent or count_trials(nodes, workers))
    teachers = {
        backbone: _Measured(
            config,
            speed,
            forecast(
                categories,
                speed,
                slots,
                config=config,
                trials=plan.trials,
                workers=workers,
                finalists=plan.finalists,
            ),
            cache_bytes(categories, speed, config, plan.finalists),
        )
        for (backbone, config), speed in zip(plan.teachers.items(), speeds, strict=False)  # none on a busy cluster
    }
    unread = [category.describe() for category in inputs.categories.values() if category.unread]
    return _DryRun(plan, categories, unread, slots, workers, teachers)


def _document(found: _DryRun) -> dict[str, Any]:
    plan = found.plan
    return {
        "name": plan.name,
        "trials": plan.trials,
        "categories": [category._asdict() | {"num_steps": found.num_steps(category)} for category in found.categories],
        "config": plan.config.to_dict(),
        "varied": {name: space.describe() for name, space in plan.spaces.items()},
        "slots": found.slots._asdict(),
        "workers_per_trial": plan.num_workers,
        "trials_per_gpu": plan.trials_per_gpu,
        "cpus_per_worker": plan.cpus_per_worker,
        "gpus_per_worker": found.workers.gpus,
        "storage": plan.addresses.home,
        "tracking": shown_url(plan.addresses.tracking),
        "studies": shown_url(plan.studies),
        "speed": found.slowest.speed._asdict() if found.slowest else None,
        "forecast": found.slowest.forecast._asdict() if found.slowest else None,
        "teachers": [
            {
                "backbone": backbone,
                "levels": each.config.model.levels,
                "speed": each.speed._asdict(),
                "forecast": each.forecast._asdict(),
                "cache_bytes": each.cache_bytes,
            }
            for backbone, each in found.teachers.items()
        ],
    }


def _show(found: _DryRun, settings: SearchSettings) -> None:
    from rich.console import Console
    from rich.table import Table

    plan, config = found.plan, found.plan.config
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 110, highlight=False, markup=False)
    table = Table(title=f"Plan of {plan.name}: {len(plan.categories)} categories × {plan.trials} trials × "
                  f"{config.train.length}")  # fmt: skip
    for column in ("category", "training images", "steps", "folds", "validation", "calibration", "test"):
        table.add_column(column, justify="left" if column == "category" else "right")
    for each in found.categories:
        counts = (each.num_train, found.num_steps(each), each.num_folds or "–", each.num_validation,
                  each.num_calibration, each.num_test)  # fmt: skip
        table.add_row(printable(each.category), *map(str, counts))
    console.print(table)
    for line in found.unread:
        console.print(printable(line), soft_wrap=True)
    if plan.teacher.is_untrained:
        console.print("untrained teacher: its results will have no meaning for inspection", style="bold red")
    usual, *rest = plan.spaces.values()
    others = [space for space in rest if space.dimensions != usual.dimensions]
    slots, workers = found.slots, found.workers
    width, height = config.data.input_size
    shape = f"{width} pixels" if width == height else f"{width} x {height} pixels"
    shape = f"tiles of {shape}" if config.data.tile else shape
    lines = {
        "trains": f"{', '.join(plan.configs)}, {shape}, batches of {config.train.batch_size}, "
        f"{config.train.num_validations} validations, teacher {' or '.join(plan.teachers)} ({settings.teacher_weights})"
        + (f", stage I of {config.amplification.amplification_epochs} epochs" if _has_stage_one(config) else ""),
        "at once": f"{slots.side_by_side} categories, {slots.concurrency} trials of each; "
        + (f"{workers.trials} trials share" if workers.trials > 1 else "a trial takes")
        + f" {workers.number} × ({workers.cpus:g} CPUs, {workers.gpus:g} GPUs)",
        "varies": ", ".join(f"{name} {span}" for name, span in usual.describe().items())
        + (f"; {len(others)} categories otherwise (--json)" if others else ""),
        "chooses": _choice_line(found),
        "alarms": "; ".join(vouched_rates(found.categories)),
        "state": plan.addresses.home,
        "studies": shown_url(plan.studies),
        "tracking": shown_url(plan.addresses.tracking),
    }
    for name, text in lines.items():
        console.print(f"{name + ':':10}{shown(text)}", soft_wrap=True)
    if not found.teachers:
        console.print(f"measured: nothing: the cluster had no place free for a worker within {_SLOT_SECONDS:.0f} s")
        console.print("forecast: none")
    for backbone, teacher in found.teachers.items():
        alone = f" if all trials had {backbone}" if len(found.teachers) > 1 else ""
        what = f"{backbone} on " if alone else ""
        console.print(f"measured: {what}{_speed_line(found, teacher)}", soft_wrap=True)
        console.print(f"forecast: {_forecast_line(teacher.forecast)}{alone}", soft_wrap=True)
    if found.teachers:
        console.print(f"cache:    {_cache_line(found)}", soft_wrap=True)


def _choice_line(found: _DryRun) -> str:
    """How champions are chosen, and what it takes."""
    plan, folded = found.plan, [each for each in found.categories if each.num_folds]
    if plan.selection == "oracle":
        return "the labelled test images (oracle)"
    if not plan.finalists or not folded:
        return "the validation objective on the held-out images alone"
    more = " and the configuration that is best over all categories" if len(found.categories) > 1 else ""
    text = (
        f"the first of {max(each.num_folds for each in folded)} folds; then the best {plan.finalists} trials{more} are "
        "compared with the untuned preset on the others"
    )
    if found.slowest:
        text += f" ({found.slowest.forecast.fold_trainings} more trainings, in the forecast)"
    fewest = min(each.num_normal * (each.num_folds - 1) / each.num_folds for each in folded)
    least = plan.min_gain_errors * _GAIN_ERROR / fewest**0.5
    text += f"; with {fewest:.0f} images in those, a gain below about {least:.3f} cannot be told from none"
    if rest := [each.category for each in found.categories if not each.num_folds]:
        text += f"; {', '.join(rest)}: the held-out images alone"
    return text


def vouched_rates(categories: Sequence[CategoryPlan]) -> list[str]:
    """A line for each kind of threshold: the lowest false-alarm rate that the good images can vouch for."""
    lines: dict[str, list[str]] = {}
    for each in categories:
        count = each.num_normal if each.num_folds else each.num_calibration
        rate, kind = lowest_rate(count), "expected, not proven" if each.num_folds else "proven"
        text = f"no lower rate than {rate:.1%} can be asked for ({kind})"
        if rate > _WANTED_RATE:
            wanted = images_for(_WANTED_RATE)
            text += f", {_WANTED_RATE:.0%} takes {wanted} good images" + ("" if each.num_folds else " to calibrate on")
        lines.setdefault(text, []).append(each.category)
    return [f"{', '.join(names)}: {text}" for text, names in lines.items()]


def _has_stage_one(config: RunConfig) -> bool:
    return config.amplification.amplification


def _cache_line(found: _DryRun) -> str:
    """What a node keeps that trains on all categories with all teachers."""
    sizes = {backbone: each.cache_bytes / 1e9 for backbone, each in found.teachers.items()}
    total = f"{sum(sizes.values()):.3g} GB on a node that trains all of it, of {found.plan.cache_gb:g} GB (--cache-gb)"
    if sum(sizes.values()) > found.plan.cache_gb:
        total += ": what does not fit is computed again"
    return total + (": " + ", ".join(f"{name} {size:.3g}" for name, size in sizes.items()) if len(sizes) > 1 else "")


def _speed_line(found: _DryRun, teacher: _Measured) -> str:
    speed = teacher.speed
    share = max(1, found.plan.config.train.batch_size // found.workers.number)
    scaled = "" if speed.images_measured == share else f" (scaled up from {speed.images_measured})"
    together = f" for {found.workers.trials} trials at once" if found.workers.trials > 1 else ""
    return (
        f"{speed.device}: a step of {share} images{scaled} {speed.step:.3g} s{together}, "
        f"validation {speed.validation:.3g} s an image"
    )


def _forecast_line(cost: Forecast) -> str:
    if cost.steps_pruned == cost.steps_full:
        span, cpu, gpu = (
            duration(cost.wall_seconds_full),
            f"{cost.cpu_hours_full:.3g}",
            f"{cost.gpu_hours_full:.3g}",
        )
    else:
        span = f"{duration(cost.wall_seconds_pruned)} with ASHA as expected, {duration(cost.wall_seconds_full)} at most"
        cpu = f"{cost.cpu_hours_pruned:.3g} … {cost.cpu_hours_full:.3g}"
        gpu = f"{cost.gpu_hours_pruned:.3g} … {cost.gpu_hours_full:.3g}"
    hours = f"{cpu} CPU hours" + (f", {gpu} GPU hours" if cost.gpu_hours_full > 0 else "")
    return f"{span}; {hours}; a whole trial {duration(cost.trial_seconds)}"
