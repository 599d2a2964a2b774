"""Every fault that can be found before the first worker starts, each as one line."""

from pathlib import Path

import optuna
import ray
from sqlalchemy.exc import SQLAlchemyError

from dskd.data.datasets import read_category
from dskd.model.teacher import build_teacher
from tune.registry import check_category
from tune.settings import SearchSettings
from tune.storage import Storage
from tune.tracking import check_server, without_password


def check_inputs(settings: SearchSettings) -> tuple[str, ...]:
    """The categories to search; data, teacher, storage, tracking server and studies are usable.

    Raises ValueError or OSError with one line that says what to change.
    """
    categories = settings.chosen_categories()
    for category in categories:
        check_category(category)
        read_category(Path(settings.data), category)
    model = settings.run_config().model
    build_teacher(model.backbone, model.levels, settings.teacher_weights)
    Storage(settings.search_uri).probe()
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
    wanted = {
        "CPU": settings.cpus_per_worker * settings.workers_per_trial,
        "GPU": gpus_per_worker(settings) * settings.workers_per_trial,
    }
    for name, need in wanted.items():
        if need > have.get(name, 0) and settings.max_concurrent is None:
            raise ValueError(
                f"a trial asks for {need:g} {name}s ({settings.workers_per_trial} workers), the cluster has "
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
        list_nodes(timeout=20)
    except Exception as error:  # the API fails in many ways, all meaning the same here
        raise ConnectionError(
            "trials of several workers need Ray's State API, or lost ones could hold their CPUs for ever, and it "
            f"does not answer ({str(error).splitlines()[0][:200]}); install ray[default] and start the dashboard."
        ) from None
