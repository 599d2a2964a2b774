"""Where an entry of `tune` keeps its things, from what its flags say: a folder or an s3:// address, and servers."""

from pathlib import Path


def is_remote(storage: str) -> bool:
    """Whether the storage is an address such as s3://bucket/path and no folder."""
    return "://" in storage


def absolute_storage(storage: str) -> str:
    """Absolute folder, or the address as given without a trailing slash."""
    return storage.rstrip("/") if is_remote(storage) else str(Path(storage).absolute())


def tracking_address(tracking_uri: str | None, storage: str) -> str:
    """The MLflow server or database that was named, else an SQLite file in the local storage folder."""
    return tracking_uri or f"sqlite:///{absolute_storage(storage)}/mlflow.db"


def artifact_location(tracking: str, storage: str) -> str | None:
    """Where MLflow keeps artifacts; None leaves it to the server, a database alone keeps none."""
    if tracking.startswith(("http://", "https://", "databricks")):
        return None
    return f"{'' if is_remote(storage) else 'file://'}{absolute_storage(storage)}/mlflow-artifacts"


def unsent_events(storage: str, name: str) -> Path:
    """File for what a tracking server that is away has not taken: in the local storage, else in the home folder."""
    return (Path.home() if is_remote(storage) else Path(absolute_storage(storage))) / f"dskd-unsent-{name}.jsonl"


DETECTOR_FOLDER = "detector"
FIGURES_FOLDER = "figures"
"""Beside the detector: pictures of its validation."""


def is_address(data: str) -> bool:
    """Whether the data lie at an address such as s3://… and not in a folder."""
    return "://" in data


def absolute(data: str) -> str:
    """The folder as an absolute path, the address as it is: what processes on other nodes are told."""
    return data.rstrip("/") if is_address(data) else str(Path(data).absolute())


LOCAL_RESULTS = "dskd-results"
