"""Input and reports of a trial: plain values, without torch or Ray."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dskd.config import RunConfig, Selection, TeacherSource
from tune.settings.workers import Workers
from tune.storage.uris import absolute

if TYPE_CHECKING:  # the relays of trials need none of what it imports
    from tune.settings.plan import SearchPlan

EPOCH = "epoch"
"""Number of the report, counted from 1; one follows each of the `TrainConfig.num_validations`."""
OBJECTIVE = "val/best_objective"
"""Highest validation objective so far; the search compares trials by it."""
ERROR = "error"
"""Reason of a trial that would fail again on every attempt; its objective is 0."""
CATEGORY = "category"
"""Category that the trial was trained on."""
DATA_SHA256 = "data_sha256"
"""Fingerprint of the trial's training and validation images."""
TEACHER_SHA256 = "teacher_sha256"
"""Fingerprint of the teacher's weights."""
TEXTURES_SHA256 = "textures_sha256"
"""Fingerprint of the textures of the synthetic defects; empty where they are drawn."""
REMARK = "remark"
"""Remark for the user about a trial that runs under a limitation."""
CHECKPOINT = "checkpoint_path"
"""Folder or address of the checkpoint that was stored with this report."""
LOST = "lost"
"""Set in the last report of a trial that its own values are not to blame for: machines failed too often."""
RUNG = "rung/"
"""Prefix before the number of a report: the objective of that report, repeated in all later ones."""
SYSTEM = "system/"
"""Prefix of MLflow's system metrics."""
TRACKED = ("train/", "val/", "time/", SYSTEM)
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
    """Folder or address for the checkpoints of the category's trials."""
    revision: str
    """Git commit of the code; empty if unknown."""
    textures: str = ""
    """Folder of texture images for the synthetic defects; empty: textures are drawn."""
    exclude: tuple[str, ...] = ()
    """Good images that are left out, by file name or by the end of their path."""
    selection: Selection = "val"
    min_workers: int | None = None
    """Smallest number of DDP workers that the trial may run with; None: always `num_workers`."""
    trials_per_gpu: int = 1
    """Trials that share the trial's process."""
    generation: int = 0
    """Of the lease under which the trial runs, whose folder its checkpoints lie in; 0: without a lease."""

    @property
    def workers(self) -> Workers:
        return Workers(self.num_workers, self.cpus_per_worker, self.gpus_per_worker, self.trials_per_gpu)

    def with_config(self, config: RunConfig) -> "TrialSpec":
        """The same trial with another configuration."""
        return dataclasses.replace(self, config=config.to_dict())

    def tracked_values(self) -> dict[str, Any]:
        """Values that MLflow records in addition to the configuration; `runs.tracked_run` reads them back."""
        return {
            "textures": Path(self.textures).name or "drawn",
            "teacher_weights": TeacherSource(self.teacher_weights).of(self.config["model"]["backbone"]).name,
            "num_workers": self.num_workers,
        }


def build_spec(
    config: RunConfig,
    *,
    data: str,
    category: str,
    teacher: TeacherSource,
    textures: str,
    exclude: tuple[str, ...] = (),
    selection: Selection,
    cache_gb: float,
    workers: Workers,
    min_workers: int | None,
    workers_uri: str,
    revision: str,
    generation: int = 0,
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
        exclude=exclude,
        selection=selection,
        min_workers=min_workers,
        trials_per_gpu=workers.trials,
        generation=generation,
    )


def spec_of(plan: "SearchPlan", category: str, workers: Workers, revision: str) -> TrialSpec:
    """What all trials of a search's category share; the configuration is that of the first preset, untuned."""
    return build_spec(
        plan.config,
        data=plan.data,
        category=category,
        teacher=plan.teacher,
        textures=plan.textures,
        exclude=plan.exclude,
        selection=plan.selection,
        cache_gb=plan.cache_gb,
        workers=workers,
        min_workers=plan.min_workers,
        workers_uri=f"{plan.addresses.home}/workers/{category}",
        revision=revision,
        generation=plan.generation,
    )


class UnrecoverableTrialError(RuntimeError):
    """A trial fails wherever it runs because of its values or data; the message gives the reason.

    Raised on one of several workers, so that all of them end.
    """


class Report(NamedTuple):
    """Metrics of one validation, and the checkpoint folder if one is due."""

    metrics: dict[str, Any]
    checkpoint: Path | None
    save: Callable[[Path], None] | None = None
    """Writes the state to resume from to a folder, until the next report is asked for; None if there is nothing."""


def tracked_figures(reported: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one report that MLflow records; not those that do not exist, as no image has a mask."""
    return {
        name: float(value)
        for name, value in reported.items()
        if name.startswith(TRACKED) and isinstance(value, int | float) and math.isfinite(value)
    }


def fingerprints(reported: Mapping[str, Any], config: RunConfig) -> dict[str, str]:
    """What a report says that a trial of this configuration has read: a fingerprint by kind, equal in all trials."""
    fold = config.data.fold
    kinds = {
        DATA_SHA256: f"images without fold {fold}" if fold else "images",
        TEACHER_SHA256: f"teacher {config.model.backbone}",
        TEXTURES_SHA256: "textures",
    }
    return {kind: str(reported[name]) for name, kind in kinds.items() if name in reported}
