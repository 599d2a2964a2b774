"""What a single training is asked to do beside its configuration: the flags of `tune/train.py`, checked."""

import os
from dataclasses import dataclass
from pathlib import Path

from dskd.config import RunConfig
from tune.storage import uris as places


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """One training of one category with a known configuration; the flags' own words are in `tune/train.py`."""

    config: RunConfig
    data: str
    category: str | None
    to: Path
    name: str
    workers: int
    gpus_per_worker: float | None
    cpus_per_worker: float
    teacher_weights: str
    storage: str
    tracking_uri: str | None
    address: str | None
    cache_gb: float
    repeats: str = ""
    """MLflow run that this one repeats."""
    expected_data_sha256: str = ""
    """Of the data of that run, where it is known."""

    def __post_init__(self) -> None:
        # Read once, here: the processes on other nodes get these values and not their own environment's.
        object.__setattr__(self, "tracking_uri", self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None)
        object.__setattr__(self, "address", self.address or os.environ.get("RAY_ADDRESS") or None)
        if self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}.")
        if self.workers > self.config.train.batch_size:
            raise ValueError(
                f"--workers {self.workers} share a batch of {self.config.train.batch_size} images; "
                "lower --workers or raise --batch-size."
            )
        if self.cpus_per_worker <= 0:
            raise ValueError(f"--cpus-per-worker must be positive, got {self.cpus_per_worker}.")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise ValueError(f"--gpus-per-worker must not be negative, got {self.gpus_per_worker}.")
        if not self.name or set(self.name) & set("/\\ ") or self.name.startswith("."):
            raise ValueError(f"--name becomes a folder name: no slash, no space, no leading dot, got {self.name!r}.")
        if "://" in self.storage and not self.tracking_uri:
            raise ValueError(
                f"with --storage {self.storage} give --tracking-uri too: its embedded default is a file in a local "
                "storage folder."
            )

    @property
    def storage_uri(self) -> str:
        return places.absolute_storage(self.storage)

    @property
    def tracking(self) -> str:
        return places.tracking_address(self.tracking_uri, self.storage)

    @property
    def artifact_location(self) -> str | None:
        return places.artifact_location(self.tracking, self.storage)
