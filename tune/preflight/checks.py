"""Every fault that can be found before the first worker starts, each as one line."""

import os
import sqlite3
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import optuna
import sqlalchemy
from sqlalchemy.exc import SQLAlchemyError

from dskd.data.datasets import Category, read_category, scan
from dskd.data.images import check_header
from tune.preflight import checks as preflight
from tune.preflight.identity import check_continues
from tune.runtime.cluster import Resources, cluster_nodes, connect, gpus_per_worker, places, worker_needs
from tune.settings.search import SearchSettings
from tune.storage.files import Storage, open_search
from tune.storage.staging import outline
from tune.storage.uris import is_address
from tune.tracking.client import check_server, without_password
from tune.tracking.registry import check_category

_MOST_FILES_NAMED = 3
_MOST_THREADS = 16


class PreflightError(ValueError):
    """Several things that are wrong, one line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))


def print_errors(error: Exception) -> None:
    """Each line of what is wrong as an error of its own, on stderr."""
    for line in str(error).splitlines():
        print(f"search: error: {line}", file=sys.stderr)  # noqa: T201


def collect_all_errors(*checks: Callable[[], object]) -> list[str]:
    """What the checks print_errors of, in their order; they run side by side, since most of them wait for an answer."""
    with ThreadPoolExecutor(_MOST_THREADS) as pool:
        return [line for lines in pool.map(collect_errors, checks) for line in lines]


def collect_errors(check: Callable[[], object]) -> list[str]:
    """What one check complains of, a line each; it runs in the calling thread."""
    try:
        check()
    except (ValueError, OSError) as error:
        return str(error).splitlines()
    return []


def input_errors(settings: SearchSettings, *, leave_no_trace: bool = False) -> list[str]:
    """What is wrong with data, teacher, storage, tracking server and studies.

    With `leave_no_trace` no folder, file or table is made that would remain, and the teacher is left to
    whoever measures its speed.
    """
    try:
        with outline(settings.data) as root:
            return _input_errors(settings, root, leave_no_trace)
    except (ValueError, OSError) as error:  # the data cannot even be listed
        return str(error).splitlines()


def _input_errors(settings: SearchSettings, root: Path, leave_no_trace: bool) -> list[str]:
    if leave_no_trace:
        return collect_all_errors(
            lambda: read_categories(settings, root),
            lambda: _check_space(settings, root),
            lambda: _try_storage(settings),
            lambda: _check_earlier(settings, root),
            lambda: _try_tracking(settings.tracking),
            lambda: _try_studies(settings.studies),
        )
    # SQLite files lie in the storage, which is made here.
    storage = collect_errors(lambda: Storage(settings.search_uri).probe())
    return [
        *collect_all_errors(
            lambda: read_categories(settings, root),
            lambda: _check_space(settings, root),
            lambda: _check_teacher(settings),
        ),
        *storage,
        *([] if storage else collect_errors(lambda: _check_earlier(settings, root))),
        *([] if storage else collect_all_errors(lambda: check_server(settings.tracking))),
        *([] if storage else collect_all_errors(lambda: _check_studies(settings.studies))),
    ]


def read_categories(settings: SearchSettings, root: Path) -> dict[str, Category]:
    """The categories to search, by name, read at `root`; every image to train or validate on looks like one.

    Only files' headers are read, and nothing of those at an address, which trials copy first. Raises
    PreflightError naming every category and file that is wrong.
    """
    try:
        names = settings.chosen_categories(root)
    except ValueError as error:
        ambiguous = [place.fault for place in scan(root) if place.fault] if root.is_dir() else []
        raise PreflightError([str(error), *(fault for fault in ambiguous if fault != str(error))]) from None
    categories, faults = {}, []
    for name in names:
        try:
            check_category(name)
            categories[name] = read_category(root, name)
        except (ValueError, OSError) as error:
            faults.append(f"{name}: {error}")
    for name, category in categories.items():
        masked = any(sample.mask is not None for sample in category.test)
        if settings.selection == "oracle" and (not masked or all(sample.is_defective for sample in category.test)):
            faults.append(
                f"--selection oracle needs good test images and masks of defective ones, category {name} lacks "
                "them; leave it out with --categories."
            )
        if is_address(settings.data):
            continue
        files = [sample.path for sample in (*category.train, *category.validation)]
        unreadable = collect_all_errors(*(lambda file=file: check_header(file) for file in files))
        faults += [f"{name}: {line}" for line in unreadable[:_MOST_FILES_NAMED]]
        if len(unreadable) > _MOST_FILES_NAMED:
            more = len(unreadable) - _MOST_FILES_NAMED
            faults.append(f"{name}: {more} more images cannot be read; dskd check-data names all.")
    if faults:
        raise PreflightError(faults)
    return categories


def _check_space(settings: SearchSettings, root: Path) -> None:
    if (categories := _known_categories(settings, root)) is not None:
        settings.spaces(categories, root)
    if settings.textures is not None:
        from dskd.data.defects import choose_textures

        choose_textures(settings.textures)


def _check_earlier(settings: SearchSettings, root: Path) -> None:
    """What this search continues is the same search, and what it starts from has ended somewhere."""
    for earlier in settings.earlier_searches:
        if not open_search(settings.storage, earlier).names("champions"):
            raise ValueError(f"--start-from {earlier}: that search has no champion in {settings.storage_uri}.")
    categories = _known_categories(settings, root)
    if categories is not None and (settings.is_remote_storage or Path(settings.search_uri).is_dir()):
        check_continues(Storage(settings.search_uri), settings, settings.spaces(categories, root))


def _known_categories(settings: SearchSettings, root: Path) -> tuple[str, ...] | None:
    """None where they cannot be read, which `read_categories` complains of."""
    try:
        return settings.chosen_categories(root)
    except (ValueError, OSError):
        return None


def _check_teacher(settings: SearchSettings) -> None:
    from dskd.model.teacher import build_teacher  # torch: a dry run checks all else while another process imports it

    model = settings.run_config().model
    build_teacher(model.backbone, model.levels, settings.teacher_weights)


def check_teacher_file(settings: SearchSettings) -> None:
    """Raise ValueError where the teacher's weights should be a file and are none; what is in it is not read."""
    weights = settings.teacher_weights
    if weights not in ("hub", "random") and not Path(weights).is_file():
        raise ValueError(f"--teacher-weights must be hub, random or an existing file, got {weights!r}.")


def _check_studies(url: str) -> None:
    try:
        optuna.storages.RDBStorage(url).get_all_studies()
    except (SQLAlchemyError, ImportError, ValueError) as error:
        raise _unusable_studies(url, error) from None


def _try_storage(settings: SearchSettings) -> None:
    """The storage takes, gives back and forgets an object, without being made."""
    if settings.is_remote_storage:
        Storage(settings.search_uri).probe()
        return
    there = _nearest_existing(Path(settings.search_uri))
    if not there.is_dir():
        raise ValueError(f"--storage {settings.storage}: {there} is a file; give a folder.")
    Storage(str(there)).probe()


def _try_tracking(uri: str) -> None:
    if uri.startswith("sqlite:"):
        _try_sqlite(uri, "--tracking-uri")
    else:
        check_server(uri)


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
            raise ValueError(f"{flag} {url}: {there} is no folder that can be written to.")
        return
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as file:
            file.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        raise ValueError(f"{flag} {url} is not usable: {error}; name another file.") from None


def _unusable_studies(url: str, error: Exception) -> ConnectionError:
    reason = str(error).strip().splitlines()[0]
    return ConnectionError(f"--study-storage {without_password(url)} is not usable: {reason}")


def _nearest_existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def check_cluster(settings: SearchSettings) -> None:
    """Raise PreflightError where the running cluster cannot hold a trial."""
    check_resources(settings, cluster_nodes())


def check_resources(settings: SearchSettings, nodes: Sequence[Resources]) -> None:
    """Raise PreflightError where the `nodes` cannot hold a trial: every worker lies on one node, whole.

    Not where --max-concurrent says that the cluster will be another one when trials need it.
    """
    if settings.max_concurrent is not None:
        return
    workers = settings.min_workers_per_trial or settings.workers_per_trial
    of_worker = worker_needs(settings.cpus_per_worker, gpus_per_worker(settings, nodes))
    faults = []
    for name, need in of_worker.items():
        have = sum(node.get(name, 0) for node in nodes)
        if need * workers > have:
            faults.append(
                f"a trial asks for {need * workers:g} {name}s ({workers} workers), the cluster has {have:g}; lower "
                f"--workers-per-trial or --{name.lower()}s-per-worker, or give --max-concurrent where the cluster "
                "grows by itself."
            )
    found = places(nodes, of_worker)
    if not faults and found < workers:
        asked = " and ".join(f"{need:g} {name}s" for name, need in of_worker.items() if need > 0)
        largest = " and ".join(f"{max(node.get(name, 0) for node in nodes):g} {name}s" for name in of_worker)
        faults.append(
            f"a worker asks for {asked} on one node, the largest has {largest}: {found} of a trial's {workers} "
            "workers find a place; lower --cpus-per-worker or --gpus-per-worker, or give --max-concurrent where larger "
            "nodes will come."
        )
    if faults:
        raise PreflightError(faults)


def join_cluster(settings: SearchSettings) -> None:
    """Connect, and check that the cluster can hold a trial; raises as `connect` and `preflight.check_cluster` do."""
    connect(settings.ray_address)
    preflight.check_cluster(settings)
