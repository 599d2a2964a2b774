"""What a trial is told and what it reports: plain values, without torch or Ray."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dskd.config import Selection

CATEGORY = "category"
"""Under this name every epoch reports what it trained on."""
DATA_SHA256 = "data_sha256"
"""Under this name every epoch reports the fingerprint of the images that it trained and was validated on."""
REMARK = "remark"
"""Under this name every epoch of a trial that something hinders reports what a person should know."""
PLACEMENT_GROUP = "placement_group"
"""Under this name DDP workers report, as hex, the reservation that they run in."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """What a trial's processes are told: plain values, since Ray carries them between machines."""

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
    textures: str = ""
    """Folder of images that feed the synthetic defects; empty: textures are drawn."""
    selection: Selection = "val"
    min_workers: int | None = None
    """Fewest DDP workers that the trial may run with; None: always `num_workers`."""


class UnrecoverableTrialError(RuntimeError):
    """A trial's values or data make it fail wherever it runs; the message says why. Raised on one of several
    workers, which must end together."""


class Report(NamedTuple):
    """One epoch's figures, and a folder to keep where it is time for a checkpoint."""

    metrics: dict[str, Any]
    checkpoint: Path | None


PREFIX = "system/"


RUNG = "rung/"
"""With an epoch behind it, the name under which a trial reports its objective of that epoch ever after."""
