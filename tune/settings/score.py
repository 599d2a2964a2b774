"""What a batch inspection is asked to do: the flags of `tune/score.py`, checked."""

import os
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringSettings:
    """The images of one folder and the detector that inspects them; the flags' own words are in `tune/score.py`."""

    detector: str
    images: str
    out: str
    false_alarm_rate: float = 0.01
    overlays: Literal["anomalous", "all", "none"] = "anomalous"
    tracking_uri: str | None = None
    address: str | None = None
    batch_size: int = 64
    concurrency: int | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float | None = None

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
