"""What a trial is told and what it reports: plain values, without torch or Ray."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dskd.config import RunConfig, Selection, TeacherSource
from tune.settings.workers import Workers
from tune.storage.uris import absolute

EPOCH = "epoch"
"""Epochs trained so far, counted from 1."""
OBJECTIVE = "val/best_objective"
"""Highest validation objective of the epochs so far: what the search compares."""
ERROR = "error"
"""Why a trial ended that would fail again on every attempt; its objective is 0."""
CATEGORY = "category"
"""Category that the trial trained on."""
DATA_SHA256 = "data_sha256"
"""Fingerprint of the images that the trial trained and was validated on."""
REMARK = "remark"
"""What a person should know of a trial that something hinders."""
PLACEMENT_GROUP = "placement_group"
"""Hex id of the resources that DDP workers run in."""
RUNG = "rung/"
"""With an epoch behind it: the objective at that epoch, reported ever after."""
SYSTEM = "system/"
"""Before the names of MLflow's system metrics."""
_TRACKED = ("train/", "val/", "time/", SYSTEM)
"""What the names of tracked figures begin with."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """What the processes of a trial are told; Ray carries it between machines."""

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
    """Folder under which DDP trials keep their checkpoints."""
    revision: str
    """Git commit of the code, empty where there is none."""
    textures: str = ""
    """Folder of images that feed the synthetic defects; empty: textures are drawn."""
    selection: Selection = "val"
    min_workers: int | None = None
    """Fewest DDP workers that the trial may run with; None: always `num_workers`."""

    @property
    def workers(self) -> Workers:
        return Workers(self.num_workers, self.cpus_per_worker, self.gpus_per_worker)

    def with_config(self, config: RunConfig) -> "TrialSpec":
        """The same trial with another configuration."""
        return dataclasses.replace(self, config=config.to_dict())

    def tracked_values(self) -> dict[str, Any]:
        """What MLflow records of a trial beside its configuration; `runs.tracked_run` reads it back."""
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
    """The one place where a trial's spec is made: all places become absolute."""
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
    """A trial's values or data make it fail wherever it runs; the message says why.

    Raised on one of several workers, which must end together.
    """


class Report(NamedTuple):
    """One epoch's figures, and a folder to keep where it is time for a checkpoint."""

    metrics: dict[str, Any]
    checkpoint: Path | None


def tracked_figures(reported: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow keeps of one epoch's report."""
    return {
        name: float(value)
        for name, value in reported.items()
        if name.startswith(_TRACKED) and isinstance(value, int | float)
    }
