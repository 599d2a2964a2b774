"""Every fault that can be found before the first worker starts, each as one line."""

from pathlib import Path

import optuna
import ray
from sqlalchemy.exc import SQLAlchemyError

from dskd.data.datasets import read_category
from dskd.data.defects import choose_textures
from dskd.model.teacher import build_teacher
from tune.champions import champion_categories
from tune.identity import check_continues
from tune.settings import SearchSettings
from tune.storage import Storage, open_search
from tune.tracking import check_server, without_password


def check_inputs(settings: SearchSettings) -> tuple[str, ...]:
    """The categories to search; data, teacher, storage, tracking server and studies are usable.

    Raises ValueError or OSError with one line that says what to change.
    """
    categories = settings.chosen_categories()
    for category in categories:
        test = read_category(Path(settings.data), category).test
        masked = any(sample.mask is not None for sample in test)
        if settings.selection == "oracle" and (not masked or all(sample.is_defective for sample in test)):
            raise ValueError(
                f"--selection oracle needs good test images and masks of defective ones, category {category} lacks "
                "them; leave it out with --categories."
            )
    spaces = settings.spaces(categories)
    if settings.textures is not None:
        choose_textures(settings.textures)
    model = settings.run_config().model
    build_teacher(model.backbone, model.levels, settings.teacher_weights)
    storage = Storage(settings.search_uri)
    storage.probe()
    check_continues(storage, settings, spaces)
    for earlier in settings.earlier_searches:
        if not champion_categories(open_search(settings.storage, earlier)):
            raise ValueError(f"--start-from {earlier}: that search has no champion in {settings.storage_uri}.")
    check_server(settings.tracking)
    try:
        optuna.storages.RDBStorage(settings.studies).get_all_studies()
    except (SQLAlchemyError, ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(f"--study-storage {without_password(settings.studies)} is not usable: {reason}") from None
    return categories


def gpus_per_worker(settings: SearchSettings) -> float:
    """As asked for; else one where the cluster has any."""
    if settings.gpus_per_worker is not None:
        return settings.gpus_per_worker
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def check_cluster(settings: SearchSettings) -> None:
    """The running cluster can hold a trial and, where trials have workers of their own, clean up after them.

    Raises ValueError or ConnectionError with one line that says what to change.
    """
    have = ray.cluster_resources()
    num_workers = settings.min_workers_per_trial or settings.workers_per_trial
    wanted = {
        "CPU": settings.cpus_per_worker * num_workers,
        "GPU": gpus_per_worker(settings) * num_workers,
    }
    for name, need in wanted.items():
        if need > have.get(name, 0) and settings.max_concurrent is None:
            raise ValueError(
                f"a trial asks for {need:g} {name}s ({num_workers} workers), the cluster has "
                f"{have.get(name, 0):g}; lower --workers-per-trial or --{name.lower()}s-per-worker, or give "
                "--max-concurrent where the cluster grows by itself."
            )
    if settings.workers_per_trial > 1:
        _check_state_api()


def _check_state_api() -> None:
    """Ray Train frees the workers of a trial that died before its first report only where the State API answers.

    Those of a trial that has reported are freed by `tune.study` itself (ray issue 54305).
    """
    from ray.util.state import list_nodes

    try:
        # Without an address it looks for clusters on this machine, and there may be others.
        list_nodes(address=ray.get_runtime_context().gcs_address, timeout=20)
    except Exception as error:  # the API fails in many ways, all meaning the same here
        raise ConnectionError(
            "trials of several workers need Ray's State API, or lost ones could hold their CPUs for ever, and it "
            f"does not answer ({str(error).splitlines()[0][:200]}); install ray[default] and start the dashboard."
        ) from None
