"""The flags of `tune/score.py`, checked."""

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from dskd.config import Precision
from tune.settings.limits import (
    MLFLOW_EXAMPLE,
    Cpus,
    Gpus,
    Images,
    Processes,
    check_ranges,
    check_storage_address,
    resolved_server,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringSettings:
    """Inspect every image below a folder on all machines of a cluster.

    OUT receives verdicts/*.parquet with a row per image, overlays/, and at the end summary.json: without it the
    output is unfinished. Exit code 1 means that some images could not be read; their rows give the reason.
    """

    detector: Positional[Annotated[str, arg(metavar="DETECTOR")]]
    """Detector folder, s3://…, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN/detector."""
    images: str
    """Folder at the same path on every node, or s3://bucket/path, searched for images."""
    out: str
    """Folder reachable from every node, or s3://bucket/path."""
    false_alarm_rate: float = 0.01
    """Share of good images that may be reported as anomalous, in (0, 1)."""
    overlays: Literal["anomalous", "all", "none"] = "anomalous"
    """Which images get an overlay of heat map and regions."""
    tracking_uri: str | None = field(default=None, repr=False)
    """MLflow server of models:/ and runs:/; by default $MLFLOW_TRACKING_URI."""
    address: str | None = None
    """Ray cluster: auto or ray://…; by default the job's cluster, or one started for this inspection."""
    batch_size: Images = 64
    """Images that a worker inspects at once."""
    concurrency: Processes | None = None
    """Number of workers; by default as many as the cluster can hold."""
    cpus_per_worker: Cpus = 1.0
    """CPUs of a worker."""
    gpus_per_worker: Gpus | None = None
    """GPUs of a worker, fractions allowed; by default 1 if the cluster has GPUs, else 0."""
    precision: Precision = "float32"
    """Of the networks on a GPU, as for `dskd predict`."""
    json: bool = False
    """Print summary.json on stdout at the end."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tracking_uri", self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None)
        object.__setattr__(self, "address", self.address or os.environ.get("RAY_ADDRESS") or None)
        if not 0 < self.false_alarm_rate < 1:
            raise ValueError(f"--false-alarm-rate must lie in (0, 1), got {self.false_alarm_rate}.")
        check_ranges(self)
        object.__setattr__(self, "tracking_uri", resolved_server(self.tracking_uri, "--tracking-uri", MLFLOW_EXAMPLE))
        for text, flag in ((self.images, "--images"), (self.out, "--out")):
            check_storage_address(text, flag)
        if not self.is_tracked:
            check_storage_address(self.detector, "DETECTOR")
        if self.is_tracked and not self.tracking_uri:
            raise ValueError(f"{self.detector} lies in MLflow: give --tracking-uri, or set $MLFLOW_TRACKING_URI.")

    @property
    def is_tracked(self) -> bool:
        """Whether the detector must be downloaded from MLflow."""
        return self.detector.startswith(("models:/", "runs:/"))
