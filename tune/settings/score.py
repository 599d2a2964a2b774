"""What a batch inspection is asked to do: the flags of `tune/score.py`, checked."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringSettings:
    """Inspect every image below a folder, on as many machines as the cluster has.

    OUT receives verdicts/*.parquet, a row per image, overlays/, and last of all summary.json: without it the
    output is unfinished. Exit code 1 says that there are images which could not be read; their rows say why.
    """

    detector: Positional[Annotated[str, arg(metavar="DETECTOR")]]
    """Detector folder, s3://…, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN/detector."""
    images: str
    """Folder at the same path on every node, or s3://bucket/path, searched for images."""
    out: str
    """Folder reachable from every node, or s3://bucket/path."""
    false_alarm_rate: float = 0.01
    """Share of good images that may be called anomalous, in (0, 1)."""
    overlays: Literal["anomalous", "all", "none"] = "anomalous"
    """Which images are drawn with their heat map and regions."""
    tracking_uri: str | None = None
    """MLflow server of models:/ and runs:/; $MLFLOW_TRACKING_URI unless given."""
    address: str | None = None
    """Ray cluster, auto or ray://…; unless given, the job's cluster or one started for this."""
    batch_size: int = 64
    """Images that a worker inspects at a time."""
    concurrency: int | None = None
    """Workers; as many as the cluster holds unless given."""
    cpus_per_worker: float = 1.0
    """CPUs of a worker."""
    gpus_per_worker: float | None = None
    """GPUs of a worker, fractions allowed; 1 where the cluster has GPUs, else 0, unless given."""
    json: bool = False
    """Print summary.json on stdout at the end."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tracking_uri", self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None)
        object.__setattr__(self, "address", self.address or os.environ.get("RAY_ADDRESS") or None)
        if not 0 < self.false_alarm_rate < 1:
            raise ValueError(f"--false-alarm-rate must lie in (0, 1), got {self.false_alarm_rate}.")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}.")
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError(f"--concurrency must be at least 1, got {self.concurrency}.")
        if self.cpus_per_worker <= 0:
            raise ValueError(f"--cpus-per-worker must be positive, got {self.cpus_per_worker}.")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise ValueError(f"--gpus-per-worker must not be negative, got {self.gpus_per_worker}.")
        if self.is_tracked and not self.tracking_uri:
            raise ValueError(f"{self.detector} lies in MLflow: give --tracking-uri, or set $MLFLOW_TRACKING_URI.")

    @property
    def is_tracked(self) -> bool:
        """Whether the detector is to be had from MLflow."""
        return self.detector.startswith(("models:/", "runs:/"))
