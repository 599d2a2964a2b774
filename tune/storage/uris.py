"""Folders and s3:// addresses from the flags, made absolute once."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from tune.storage.shown import shown_url

LOCAL_RESULTS = "dskd-results"
DETECTOR_FOLDER = "detector"
EVIDENCE_FILE = "evidence.json"
"""What a fold says of a finalist, beside its detector."""
FIGURES_FOLDER = "figures"
"""Folder beside the detector with pictures of its validation."""


def is_address(text: str) -> bool:
    """Whether the text is an address such as s3://bucket/path, not a folder."""
    return "://" in text


def absolute(text: str) -> str:
    """The folder as an absolute path, or the address without a trailing slash; the same text in every process."""
    if is_address(text):
        return text.rstrip("/")
    path = Path(text)
    return str(path.resolve() if ".." in path.parts else path.absolute())


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a search or a training stores its files and tracks its runs."""

    storage: str
    """Absolute folder or s3:// address given with --storage."""
    name: str
    """Name of the search or experiment, a folder below the storage."""
    tracking: str = field(repr=False)
    """URI of the MLflow server or database."""

    @classmethod
    def resolve(cls, storage: str, name: str, tracking_uri: str | None) -> "Addresses":
        """Build from the flags; MLflow's default is an SQLite file in the local storage folder."""
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
        """Artifact location to give to MLflow, which a database needs; None: a server chooses its own."""
        if self.tracking.startswith(("http://", "https://", "databricks")):
            return None
        return f"{'' if self.is_remote else 'file://'}{self.storage}/mlflow-artifacts"

    def key(self, name: str) -> str:
        """Digest of a name in this storage and on this server; another password is the same server."""
        owner = json.dumps([self.storage, shown_url(self.tracking), name])
        return hashlib.sha256(owner.encode()).hexdigest()[:12]

    def unsent_events(self, name: str) -> Path:
        """File of events not yet written to MLflow: in the local storage folder, else in the home folder.

        It belongs to one name in one storage and one server: another search must neither write it elsewhere nor
        remove it.
        """
        return (Path.home() if self.is_remote else Path(self.storage)) / f"dskd-unsent-{name}-{self.key(name)}.jsonl"
