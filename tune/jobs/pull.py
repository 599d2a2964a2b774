"""Download the best detector of each category from a search's storage or from MLflow's registry."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dskd.checkpoint import DetectorRecord


class PulledDetector(NamedTuple):
    """A delivered detector and where it came from."""

    category: str
    folder: Path
    record: "DetectorRecord"
    trial_id: str
    run_id: str
    link: str
    version: str
    """Of the registered model; empty where it came from a search's storage."""
    is_final: bool
    """False for the best trial so far of a search that has not ended."""


def from_storage(
    categories: tuple[str, ...], to: Path, name: str, storage: str, tracking: str | None
) -> Iterator[PulledDetector]:
    from tune.storage.champions import champion_categories, download_detector, find_best
    from tune.storage.files import open_search
    from tune.tracking.client import run_link

    search = open_search(storage, name)
    known = champion_categories(search)
    if not known:
        raise ValueError(f"{search.uri} holds no champion; check --name and --storage, or wait for the first.")
    found = [(category, find_best(search, category)) for category in categories or known]
    if missing := [category for category, champion in found if champion is None]:
        raise ValueError(f"no champion of {missing[0]!r} in {search.uri}; there are: {', '.join(known)}.")
    for category, champion in found:
        assert champion is not None
        record = download_detector(search, champion, to / category)
        run_id = champion.run_id
        link = run_link(tracking, run_id) if tracking else run_id[:8]
        yield PulledDetector(category, to / category, record, champion.trial_id, run_id, link, "", champion.is_final)


def from_registry(categories: tuple[str, ...], to: Path, alias: str, tracking: str) -> Iterator[PulledDetector]:
    from tune.storage.champions import download_detector_files
    from tune.tracking.client import check_server, registry_client, run_link, without_password
    from tune.tracking.registry import fetch, find_registered, registered_categories

    check_server(tracking)
    client = registry_client(tracking)
    wanted = categories or registered_categories(client, alias)
    if not wanted:
        raise ValueError(f"no model of {without_password(tracking)} has the alias {alias!r}; check it and the address.")
    for detector in [find_registered(client, category, alias) for category in wanted]:
        folder = to / detector.category
        record = download_detector_files(
            lambda file, path, detector=detector: fetch(client, detector, file, path),  # type: ignore[misc]
            detector.files,
            folder,
        )
        run_id, version = detector.run_id, detector.version
        yield PulledDetector(
            detector.category, folder, record, detector.trial_id, run_id, run_link(tracking, run_id), version, True
        )


def embedded_tracking(storage: str) -> str:
    """The SQLite file that a search on one machine keeps in its storage folder."""
    file = Path(storage).absolute() / "mlflow.db"
    if "://" in storage or not file.is_file():
        raise ValueError(f"--alias needs --tracking-uri or $MLFLOW_TRACKING_URI: there is no {file}.")
    return f"sqlite:///{file}"
