"""Checks before the first worker starts; each error is one line."""

import os
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import optuna
import sqlalchemy
from sqlalchemy.exc import SQLAlchemyError

from dskd.config import RunConfig
from dskd.data.datasets import Category, read_category, read_test_split
from dskd.data.exclusions import check_exclusions, without_excluded
from dskd.data.geometry import Geometry
from dskd.data.images import check_header
from tune.preflight.draft import Draft, with_user_address
from tune.preflight.identity import check_continues
from tune.preflight.room import PreflightError
from tune.settings.plan import SearchPlan, resolve_studies
from tune.settings.search import SearchSettings
from tune.storage.files import Storage, check_unlocked, created_by_one, open_search
from tune.storage.inputs import Marks
from tune.storage.shown import shown, shown_url
from tune.storage.uris import Addresses, is_address
from tune.tracking.client import check_may_write, check_server
from tune.tracking.registry import check_category, model_name

_MAX_FILES_LISTED = 3
_MAX_THREADS = 16


class Inputs(NamedTuple):
    """Categories that a search would read, and the errors found."""

    categories: Mapping[str, Category]
    """Categories by name; empty if any cannot be read."""
    errors: list[str]
    marks: Mapping[str, Marks] = {}
    """By category, what to record of its files; empty if nothing may be left behind."""


def check_inputs(draft: Draft, *, leave_no_trace: bool = False) -> Inputs:
    """Check data, teacher, storage, tracking server and studies.

    With `leave_no_trace` no folder, file or table is left behind, and the teacher is not checked: the speed
    measurement does that.
    """
    settings, addresses, plan = draft.settings, draft.addresses, draft.plan
    studies = resolve_studies(settings, addresses)
    categories: dict[str, Category] = {}

    def read() -> None:
        if plan is not None and draft.root is not None:
            categories.update(read_categories(plan, draft.root))

    def check_textures() -> None:
        if settings.textures is not None:
            from dskd.data.defects import choose_textures

            choose_textures(settings.textures)

    def check_earlier() -> None:
        if plan is not None:
            _check_earlier(plan)

    if leave_no_trace:
        errors = collect_all_errors(
            read,
            check_textures,
            lambda: _try_storage(settings, addresses),
            check_earlier,
            lambda: _try_tracking(addresses, plan),
            lambda: _try_studies(studies),
        )
        return Inputs(categories, [*draft.errors, *errors])
    # SQLite files are in the storage, which is created here.
    storage = collect_errors(lambda: Storage(addresses.home).probe())
    errors = [*collect_all_errors(read, check_textures, lambda: _check_teachers(settings, plan)), *storage]
    if not storage:
        errors += collect_errors(check_earlier)
        errors += collect_all_errors(lambda: _check_tracking(addresses, plan))
        errors += collect_all_errors(lambda: _check_studies(studies))
    marks: dict[str, Marks] = {}
    if plan is not None and not errors:
        for name in plan.categories:
            errors += collect_errors(lambda name=name: marks.update({name: plan.inputs_of(name).check()}))  # type: ignore[misc]
    return Inputs(categories, [*draft.errors, *errors], marks)


def collect_all_errors(*checks: Callable[[], object]) -> list[str]:
    """Errors of all checks, in their order; the checks run in parallel, since most of them wait for an answer."""
    with ThreadPoolExecutor(_MAX_THREADS) as pool:
        return [line for lines in pool.map(collect_errors, checks) for line in lines]


def collect_errors(check: Callable[[], object]) -> list[str]:
    """Run one check in the calling thread; its errors, one line each."""
    try:
        check()
    except (ValueError, OSError) as error:
        return str(error).splitlines()
    return []


def read_categories(plan: SearchPlan, root: Path) -> dict[str, Category]:
    """Read the categories to search below `root`, and the header of every training and validation image.

    Images at an address are not read, since trials copy them first. Raises PreflightError naming the categories
    and files with errors.
    """
    categories: dict[str, Category] = {}
    errors: list[str] = []
    layout = plan.config.data.layout
    for name in plan.categories:
        try:
            check_category(name)
            categories[name] = read_category(root, name, layout)
            if plan.selection == "oracle":
                read_test_split(root, name, layout)
        except (ValueError, OSError) as error:
            errors.append(f"{name}: {error}")
    if len(categories) == len(plan.categories):
        errors += collect_errors(lambda: check_exclusions(plan.exclude, categories.values()))
    for name, category in categories.items():
        try:
            categories[name] = without_excluded(category, plan.exclude)
        except ValueError as error:
            errors.append(str(error))
        masked = layout == "classes" or any(sample.mask is not None for sample in category.test)
        if plan.selection == "oracle" and (not masked or all(sample.is_defective for sample in category.test)):
            errors.append(
                f"--selection oracle needs good test images and masks of defective ones, category {name} lacks "
                "them; leave it out with --categories."
            )
        if is_address(plan.data):
            continue
        files = [sample.path for sample in (*category.train, *category.validation)]
        unreadable = collect_all_errors(*(lambda file=file: check_header(file) for file in files))
        errors += [f"{name}: {line}" for line in unreadable[:_MAX_FILES_LISTED]]
        if len(unreadable) > _MAX_FILES_LISTED:
            more = len(unreadable) - _MAX_FILES_LISTED
            errors.append(f"{name}: {more} more images cannot be read; dskd check-data names all.")
    if errors:
        raise PreflightError([with_user_address(line, root, plan.data) for line in errors])
    return categories


def _check_earlier(plan: SearchPlan) -> None:
    """Check that a search to continue has the same settings and that the --start-from searches have champions."""
    for earlier in plan.earlier_searches:
        if not open_search(plan.addresses.storage, earlier).names("champions"):
            raise ValueError(f"--start-from {earlier}: that search has no champion in {plan.addresses.storage}.")
    if plan.addresses.is_remote or Path(plan.addresses.home).is_dir():
        check_continues(Storage(plan.addresses.home), plan)


def _check_teachers(settings: SearchSettings, plan: SearchPlan | None) -> None:
    """Load every teacher that a trial may have, and show it an image of the search's shape if that is no square.

    Raises PreflightError with a line for each that cannot be loaded, or takes no such images.
    """
    configs = list((plan.teachers if plan else settings.run_configs()).values())
    errors = [line for config in configs for line in collect_errors(partial(_check_teacher, settings, config))]
    if errors:
        raise PreflightError(list(dict.fromkeys(errors)))


def _check_teacher(settings: SearchSettings, config: RunConfig) -> None:
    import torch  # slow to import; a dry run does that in another process

    from dskd.model.teacher import build_teacher
    from dskd.training.reading import check_input

    teacher = build_teacher(config.model.backbone, config.model.levels, settings.teacher_weights)
    check_input(teacher, config.model.backbone, Geometry.of(config.data), torch.device("cpu"))


def _check_studies(url: str) -> None:
    check_unlocked(url, "--study-storage")
    try:
        with created_by_one(url) as place:
            optuna.storages.RDBStorage(place).get_all_studies()
    except (SQLAlchemyError, ImportError, ValueError) as error:
        raise _unusable_studies(url, error) from None


def _try_storage(settings: SearchSettings, addresses: Addresses) -> None:
    """Write, read and delete an object in the storage, without creating the storage."""
    if addresses.is_remote:
        Storage(addresses.home).probe()
        return
    there = _nearest_existing(Path(addresses.home))
    if not there.is_dir():
        raise ValueError(f"--storage {settings.storage}: {there} is a file; give a folder.")
    Storage(str(there)).probe()


def _check_tracking(addresses: Addresses, plan: SearchPlan | None) -> None:
    check_server(addresses.tracking)
    models = [model_name(category) for category in plan.categories] if plan else []
    check_may_write(addresses.tracking, addresses.name, models)


def _try_tracking(addresses: Addresses, plan: SearchPlan | None) -> None:
    if addresses.tracking.startswith("sqlite:"):
        _try_sqlite(addresses.tracking, "--tracking-uri")
    else:
        _check_tracking(addresses, plan)


def _try_studies(url: str) -> None:
    if url.startswith("sqlite:"):
        _try_sqlite(url, "--study-storage")
        return
    try:
        engine = sqlalchemy.create_engine(url)
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT 1"))
        engine.dispose()
    except (SQLAlchemyError, ImportError, ValueError) as error:
        raise _unusable_studies(url, error) from None


def _try_sqlite(url: str, flag: str) -> None:
    path = Path(sqlalchemy.make_url(url).database or "")
    if not path.exists():
        there = _nearest_existing(path)
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise ValueError(f"{flag} {shown_url(url)}: {there} is no folder that can be written to.")
        return
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as file:
            file.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        raise ValueError(f"{flag} {shown_url(url)} is not usable: {error}; name another file.") from None
    check_unlocked(url, flag)


def _unusable_studies(url: str, error: Exception) -> ConnectionError:
    reason = shown((str(error).strip().splitlines() or [type(error).__name__])[0])
    return ConnectionError(f"--study-storage {shown_url(url)} is not usable: {reason}")


def _nearest_existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
