"""What a search is asked to do: the flags of `tune/search.py`, and what they default to."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dskd.config import RunConfig
from dskd.data.datasets import find_categories
from dskd.presets import PRESETS

LOCAL_RESULTS = "dskd-results"


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """Search the hyperparameters of a detector for each category, on a Ray cluster."""

    data: str
    """Folder of categories, at the same path on every node; dskd check-data names the layouts."""
    categories: str = "all"
    """Categories to search, separated by commas, or all."""
    name: str = "search"
    """Name of the search and of its MLflow experiment; the same name again continues it."""
    trials: int = 8
    """Trials per category."""
    epochs: int = 100
    """Epochs of a trial that is not pruned."""
    image_size: int = 256
    """Side in pixels that images are resized to; a multiple of 32."""
    preset: Literal["dskd", "stfpm", "rd4ad", "aand"] = "dskd"
    """Method whose configuration the search starts from."""
    teacher_weights: str = "hub"
    """hub, a .safetensors or .pth file at the same path on every node, or random (wiring tests)."""
    batch_size: int | None = None
    """Images of one optimiser step over all workers; the preset's unless given."""
    score_candidates: int = 500
    """Score configurations tried on each trained trial without retraining it; 0: none."""
    workers_per_trial: int = 1
    """Processes of one trial; more than one train with DDP, on several nodes where needed."""
    gpus_per_worker: float | None = None
    """GPUs of a worker, fractions allowed; 1 where the cluster has GPUs, else 0, unless given."""
    cpus_per_worker: float = 1.0
    """CPUs of a worker."""
    max_concurrent: int | None = None
    """Trials running at once over all categories; what the cluster holds at the start unless given."""
    storage: str = LOCAL_RESULTS
    """Folder or s3://bucket/path for trial state and champions; reachable from every node."""
    tracking_uri: str | None = None
    """MLflow server; unless given, $MLFLOW_TRACKING_URI, or an SQLite file in a local storage folder."""
    study_storage: str | None = field(default=None, repr=False)
    """Optuna storage URL such as postgresql://…; unless given, $DSKD_STUDY_STORAGE, which keeps its password
    out of the command line, or an SQLite file in a local storage folder."""
    address: str | None = None
    """Ray cluster: auto or ray://…; unless given, the job's cluster or one started for this search."""
    seed: int = 0
    """Seed of the sampler."""
    cache_gb: float = 20.0
    """Size in GB of a node's cache of decoded images and teacher features."""
    promote: bool = True
    """Let the alias champion of MLflow's registered model move to a better winner; else only register a version."""
    json: bool = False
    """Print one JSON document on stdout at the end."""

    def __post_init__(self) -> None:
        # Read once, here: the processes on other nodes get these values and not their own environment's.
        for name, variable in (("tracking_uri", "MLFLOW_TRACKING_URI"), ("study_storage", "DSKD_STUDY_STORAGE")):
            object.__setattr__(self, name, getattr(self, name) or os.environ.get(variable) or None)
        for name in ("trials", "workers_per_trial"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise ValueError(f"--max-concurrent must be at least 1, got {self.max_concurrent}.")
        if self.cpus_per_worker <= 0:
            raise ValueError(f"--cpus-per-worker must be positive, got {self.cpus_per_worker}.")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise ValueError(f"--gpus-per-worker must not be negative, got {self.gpus_per_worker}.")
        if not self.name or set(self.name) & set("/\\ ") or self.name.startswith("."):
            raise ValueError(f"--name becomes a folder name: no slash, no space, no leading dot, got {self.name!r}.")
        if self.is_remote_storage and not (self.tracking_uri and self.study_storage):
            raise ValueError(
                f"with --storage {self.storage} give --tracking-uri and --study-storage too: "
                "their embedded defaults are files in a local storage folder."
            )
        self.run_config()

    @property
    def is_remote_storage(self) -> bool:
        return "://" in self.storage

    @property
    def storage_uri(self) -> str:
        """Absolute folder, or the URI as given without a trailing slash."""
        return self.storage.rstrip("/") if self.is_remote_storage else str(Path(self.storage).absolute())

    @property
    def tracking(self) -> str:
        return self.tracking_uri or f"sqlite:///{self.storage_uri}/mlflow.db"

    @property
    def artifact_location(self) -> str | None:
        """Where MLflow keeps artifacts; None leaves it to the server."""
        return None if self.tracking_uri else f"file://{self.storage_uri}/mlflow-artifacts"

    @property
    def studies(self) -> str:
        return self.study_storage or f"sqlite:///{self.storage_uri}/optuna.db"

    @property
    def search_uri(self) -> str:
        """Where everything of this search lies."""
        return f"{self.storage_uri}/{self.name}"

    def run_config(self) -> RunConfig:
        """The configuration that trials vary.

        Raises ValueError on values out of range.
        """
        changes: dict[str, object] = {
            "epochs": self.epochs,
            "image_size": self.image_size,
            "score_candidates": self.score_candidates,
        }
        if self.batch_size is not None:
            changes["batch_size"] = self.batch_size
        return PRESETS[self.preset].with_values(changes)

    def chosen_categories(self) -> tuple[str, ...]:
        """The categories to search, in the order asked for.

        Raises ValueError on an unknown one.
        """
        known = find_categories(Path(self.data))
        if self.categories == "all":
            return tuple(known)
        wanted = tuple(dict.fromkeys(name.strip() for name in self.categories.split(",") if name.strip()))
        if unknown := [name for name in wanted if name not in known]:
            raise ValueError(f"no category {unknown[0]!r} in {self.data}; it holds: {', '.join(known)}.")
        if not wanted:
            raise ValueError("--categories names none; give names separated by commas, or all.")
        return wanted

    @property
    def ray_address(self) -> str | None:
        """None means: start a cluster on this machine for this search alone."""
        return self.address or os.environ.get("RAY_ADDRESS") or None
