"""The flags of `tune/train.py`, checked."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes

from dskd.config import RunConfig, Selection, TeacherSource
from dskd.presets import Preset
from tune.settings.limits import (
    MLFLOW_EXAMPLE,
    Cpus,
    Gigabytes,
    Gpus,
    Processes,
    check_name,
    check_ranges,
    check_storage_address,
    resolved_server,
)
from tune.storage.uris import LOCAL_RESULTS, Addresses, is_address


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """One training of one category with a given configuration; `training_settings` describes the flags."""

    config: RunConfig
    data: str
    out: Path
    category: str | None = None
    name: str = "train"
    from_run: str | None = None
    workers: Processes = 1
    gpus_per_worker: Gpus | None = None
    cpus_per_worker: Cpus = 1.0
    teacher_weights: str | None = None
    textures: Path | None = None
    selection: Selection | None = None
    storage: str = LOCAL_RESULTS
    tracking_uri: str | None = field(default=None, repr=False)
    address: str | None = None
    cache_gb: Gigabytes = 20.0
    json: bool = False

    def __post_init__(self) -> None:
        # Read here once: processes on other nodes must use these values, not those of their own environment.
        object.__setattr__(self, "tracking_uri", self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None)
        object.__setattr__(self, "address", self.address or os.environ.get("RAY_ADDRESS") or None)
        check_ranges(self)
        check_name(self.name, "--name")
        check_storage_address(self.data, "--data")
        check_storage_address(self.storage, "--storage")
        object.__setattr__(self, "tracking_uri", resolved_server(self.tracking_uri, "--tracking-uri", MLFLOW_EXAMPLE))
        self.teacher.check_fits(self.config.model.backbone)
        if self.workers > self.config.train.batch_size:
            raise ValueError(
                f"--workers {self.workers} share a batch of {self.config.train.batch_size} images; "
                "lower --workers or raise --batch-size."
            )
        if is_address(self.storage) and not self.tracking_uri:
            raise ValueError(
                f"with --storage {self.storage} give --tracking-uri too: its embedded default is a file in a local "
                "storage folder."
            )

    @property
    def addresses(self) -> Addresses:
        return Addresses.resolve(self.storage, self.name, self.tracking_uri)

    @property
    def teacher(self) -> TeacherSource:
        return TeacherSource(self.teacher_weights or "hub").of(self.config.model.backbone)


def training_settings(
    *,
    data: str,
    out: Path,
    settings: Annotated[RunConfig, OmitArgPrefixes],
    category: str | None = None,
    name: str = "train",
    config: Path | None = None,
    preset: Preset = "dskd",
    from_run: str | None = None,
    workers: int = 1,
    gpus_per_worker: float | None = None,
    cpus_per_worker: float = 1.0,
    teacher_weights: str | None = None,
    textures: Path | None = None,
    selection: Selection | None = None,
    storage: str = LOCAL_RESULTS,
    tracking_uri: str | None = None,
    address: str | None = None,
    cache_gb: float = 20.0,
    json: bool = False,
) -> TrainingSettings:
    """Train a detector with a given configuration on a Ray cluster, track it in MLflow and write it to --out.

    The same command continues a training that was killed, and writes a finished detector again. Exit code 1 means
    that the training failed.

    Args:
        data: Folder of categories at the same path on every node, or s3://bucket/path.
        out: Folder that receives the detector.
        settings: Configuration of the run.
        category: Category to train on; not needed if the data hold only one, or with --from-run.
        name: Name of the MLflow experiment and of the folder in the storage.
        config: TOML file of the fields below, as written by dskd train --print-config; flags override it.
        preset: Method whose configuration is changed by the file and the other flags.
        from_run: MLflow run to repeat, a trial or a training: its configuration, category, teacher, textures and
            selection.
        workers: Processes that train together (DDP), on several nodes if needed.
        gpus_per_worker: GPUs of a worker, fractions allowed; by default 1 if the cluster has GPUs, else 0.
        cpus_per_worker: CPUs of a worker.
        teacher_weights: hub, lite0 (EfficientNet-Lite0 from an installed package), a .safetensors or .pth file at the
            same path on every node, or random (wiring tests); by default as in the repeated run, else hub.
        textures: Folder of texture images, such as DTD, for the synthetic defects, at the same path on every node;
            by default textures are drawn.
        selection: What selects the epoch: val, images without test labels, or oracle, the labelled test images, to
            reproduce papers; by default as in the repeated run, else val.
        storage: Folder or s3://bucket/path for checkpoints and detectors; reachable from every node.
        tracking_uri: MLflow server; by default $MLFLOW_TRACKING_URI, or an SQLite file in a local storage folder.
        address: Ray cluster: auto or ray://…; by default the job's cluster, or one started for this training.
        cache_gb: Size limit in GB of a node's cache; the same limit applies separately to its copies of data from s3://.
        json: Print one JSON document on stdout at the end.
    """
    return TrainingSettings(
        config=settings,
        data=data,
        out=out,
        category=category,
        name=name,
        from_run=from_run,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        cpus_per_worker=cpus_per_worker,
        teacher_weights=teacher_weights,
        textures=textures,
        selection=selection,
        storage=storage,
        tracking_uri=tracking_uri,
        address=address,
        cache_gb=cache_gb,
        json=json,
    )
