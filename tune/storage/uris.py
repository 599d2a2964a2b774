"""Folders and s3:// addresses as the flags name them, made absolute once."""

from dataclasses import dataclass
from pathlib import Path

LOCAL_RESULTS = "dskd-results"
DETECTOR_FOLDER = "detector"
FIGURES_FOLDER = "figures"
"""Beside the detector: pictures of its validation."""


def is_address(text: str) -> bool:
    """Whether a flag names an address such as s3://bucket/path and no folder."""
    return "://" in text


def absolute(text: str) -> str:
    """The folder as an absolute path, an address without a trailing slash: the same place for every process."""
    return text.rstrip("/") if is_address(text) else str(Path(text).absolute())


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a search or a training keeps its things."""

    storage: str
    """Absolute folder or s3:// address given with --storage."""
    name: str
    """Name of the search or experiment, a folder below the storage."""
    tracking: str
    """MLflow server or database."""

    @classmethod
    def resolve(cls, storage: str, name: str, tracking_uri: str | None) -> "Addresses":
        """From the flags; MLflow's default is an SQLite file in the local storage folder."""
        root = absolute(storage)
        return cls(root, name, tracking_uri or f"sqlite:///{root}/mlflow.db")

    @property
    def is_remote(self) -> bool:
        return is_address(self.storage)

    @property
    def home(self) -> str:
        """Folder or address of everything that belongs to this name."""
        return f"{self.storage}/{self.name}"

    @property
    def artifacts(self) -> str | None:
        """Where MLflow keeps artifacts; None leaves it to a server, while a database alone keeps none."""
        if self.tracking.startswith(("http://", "https://", "databricks")):
            return None
        return f"{'' if self.is_remote else 'file://'}{self.storage}/mlflow-artifacts"

    def unsent_events(self, name: str) -> Path:
        """File of events that MLflow has not taken yet: in the local storage folder, else in the home folder."""
        return (Path.home() if self.is_remote else Path(self.storage)) / f"dskd-unsent-{name}.jsonl"
