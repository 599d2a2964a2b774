"""Input and reports of a trial: plain values, without torch or Ray."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dskd.config import RunConfig, Selection, TeacherSource
from tune.settings.workers import Workers
from tune.storage.uris import absolute

EPOCH = "epoch"
"""Epochs trained so far, counted from 1."""
OBJECTIVE = "val/best_objective"
"""Highest validation objective of the epochs so far; the search compares trials by it."""
ERROR = "error"
"""Reason of a trial that would fail again on every attempt; its objective is 0."""
CATEGORY = "category"
"""Category that the trial was trained on."""
DATA_SHA256 = "data_sha256"
"""Fingerprint of the trial's training and validation images."""
REMARK = "remark"
"""Remark for the user about a trial that runs under a limitation."""
PLACEMENT_GROUP = "placement_group"
"""Hex id of the placement group of DDP workers."""
RUNG = "rung/"
"""Prefix before an epoch: the objective at that epoch, repeated in all later reports."""
SYSTEM = "system/"
"""Prefix of MLflow's system metrics."""
_TRACKED = ("train/", "val/", "time/", SYSTEM)
"""Prefixes of the metrics that are tracked in MLflow."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """Everything that the processes of a trial need; Ray sends it to other machines."""

    config: Mapping[str, Any]
    """`RunConfig.to_dict()`."""
    data: str
    category: str
    teacher_weights: str
    cache_gb: float
    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    workers_uri: str
    """Folder or address for the checkpoints of DDP trials."""
    revision: str
    """Git commit of the code; empty if unknown."""
    textures: str = ""
    """Folder of texture images for the synthetic defects; empty: textures are drawn."""
    selection: Selection = "val"
    min_workers: int | None = None
    """Smallest number of DDP workers that the trial may run with; None: always `num_workers`."""

    @property
    def workers(self) -> Workers:
        return Workers(self.num_workers, self.cpus_per_worker, self.gpus_per_worker)

    def with_config(self, config: RunConfig) -> "TrialSpec":
        """The same trial with another configuration."""
        return dataclasses.replace(self, config=config.to_dict())

    def tracked_values(self) -> dict[str, Any]:
        """Values that MLflow records in addition to the configuration; `runs.tracked_run` reads them back."""
        return {
            "textures": Path(self.textures).name or "drawn",
            "teacher_weights": TeacherSource(self.teacher_weights).name,
            "num_workers": self.num_workers,
        }


def build_spec(
    config: RunConfig,
    *,
    data: str,
    category: str,
    teacher: TeacherSource,
    textures: str,
    selection: Selection,
    cache_gb: float,
    workers: Workers,
    min_workers: int | None,
    workers_uri: str,
    revision: str,
) -> TrialSpec:
    """Build a trial's spec; all paths become absolute."""
    return TrialSpec(
        config=config.to_dict(),
        data=absolute(data),
        category=category,
        teacher_weights=str(teacher.absolute()),
        cache_gb=cache_gb,
        num_workers=workers.number,
        cpus_per_worker=workers.cpus,
        gpus_per_worker=workers.gpus,
        workers_uri=workers_uri,
        revision=revision,
        textures=absolute(textures) if textures else "",
        selection=selection,
        min_workers=min_workers,
    )


class UnrecoverableTrialError(RuntimeError):
    """A trial fails wherever it runs because of its values or data; the message gives the reason.

    Raised on one of several workers, so that all of them end.
    """


class Report(NamedTuple):
    """Metrics of one epoch, and the checkpoint folder if one is due."""

    metrics: dict[str, Any]
    checkpoint: Path | None


def tracked_figures(reported: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one epoch's report that MLflow records; not those that do not exist, as no image has a mask."""
    return {
        name: float(value)
        for name, value in reported.items()
        if name.startswith(_TRACKED) and isinstance(value, int | float) and math.isfinite(value)
    }
