"""The flags of `tune/search.py` and their defaults, checked."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dskd.config import RunConfig, Selection
from dskd.presets import PRESETS
from tune.storage.uris import LOCAL_RESULTS, is_address

SamplerName = Literal["tpe", "gp", "cmaes", "qmc", "random"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """Search the hyperparameters of a detector for each category, on a Ray cluster."""

    data: str
    """Folder of categories at the same path on every node, or s3://bucket/path, from which each node copies the
    categories that it trains on; dskd check-data lists the supported layouts."""
    categories: str = "all"
    """Categories to search, separated by commas, or all."""
    name: str = "search"
    """Name of the search and of its MLflow experiment; using the same name again continues the search."""
    trials: int = 8
    """Trials per category; a larger number than before extends a finished search."""
    time_budget: str | None = None
    """Wall time of the whole search, such as 2h, 1h30m or 90s; each category gets its share of the remaining time when
    it starts. Trials still running at the end are interrupted; the same command continues them."""
    epochs: int = 100
    """Epochs of a trial that is not pruned."""
    image_size: int = 256
    """Side in pixels that images are resized to; a multiple of 32."""
    resize: str = "square"
    """square: stretched to image_size; letterbox: aspect ratio kept between bars; or WIDTHxHEIGHT."""
    tile: int = 0
    """Side in pixels of the tiles that images are cut into at their own size, instead of being resized; 0: none."""
    overlap: int = 32
    """Pixels that neighbouring tiles share."""
    group_by: str = ""
    """Regular expression that finds a part's name in an image's path, for parts with several images."""
    preset: str = "dskd"
    """Method to start from: dskd, stfpm, rd4ad or aand. Several, separated by commas, or all are searched
    together; each is first tried untuned."""
    space: Path | None = None
    """TOML file with changes to the default search space: field = value, [values] or {low, high, log}, for all
    categories or below [category.NAME] or [preset.NAME]."""
    start_from: str = ""
    """Earlier searches in the same storage, separated by commas, whose champions are also tried first."""
    sampler: SamplerName = "tpe"
    """Optuna's sampler: multivariate TPE, Gaussian process, CMA-ES, quasi-random or random; with several presets
    tpe or random."""
    selection: Selection = "val"
    """What selects epochs and trials: val, images without test labels; or oracle, the labelled test images, to
    reproduce papers. An oracle result is marked in every output and never becomes champion in MLflow."""
    textures: Path | None = None
    """Folder of texture images, such as DTD, for the synthetic defects; at the same path on every node."""
    teacher_weights: str = "hub"
    """hub, a .safetensors or .pth file at the same path on every node, or random (wiring tests)."""
    batch_size: int | None = None
    """Images per optimiser step over all workers; by default that of the preset."""
    score_candidates: int = 500
    """Score configurations tried on each trained trial without retraining; 0: none."""
    workers_per_trial: int = 1
    """Processes of one trial; several train with DDP, on several nodes if needed."""
    min_workers_per_trial: int | None = None
    """Smallest number of processes with which a trial may start or continue while the cluster has no room for more;
    it grows back to --workers-per-trial. By default the number is fixed."""
    gpus_per_worker: float | None = None
    """GPUs of a worker, fractions allowed; by default 1 if the cluster has GPUs, else 0."""
    cpus_per_worker: float = 1.0
    """CPUs of a worker."""
    max_concurrent: int | None = None
    """Trials that run at once over all categories; by default as many as the cluster can hold at that time."""
    storage: str = LOCAL_RESULTS
    """Folder or s3://bucket/path for trial state and champions; reachable from every node."""
    tracking_uri: str | None = None
    """MLflow server; by default $MLFLOW_TRACKING_URI, or an SQLite file in a local storage folder."""
    study_storage: str | None = field(default=None, repr=False)
    """Optuna storage URL such as postgresql://…; by default $DSKD_STUDY_STORAGE, which keeps its password out of
    the command line, or an SQLite file in a local storage folder."""
    address: str | None = None
    """Ray cluster: auto or ray://…; by default the job's cluster, or one started for this search."""
    seed: int = 0
    """Seed of the sampler."""
    cache_gb: float = 20.0
    """Size limit in GB of a node's cache of decoded images and teacher features; the same limit applies separately to
    its copies of data from s3://."""
    dry_run: bool = False
    """Check everything, measure a training step, print the plan with a forecast of time, and leave no files."""
    promote: bool = True
    """Move the alias champion of MLflow's registered model to a better winner; else only register a version."""
    json: bool = False
    """Print one JSON document on stdout at the end."""

    def __post_init__(self) -> None:
        # Read here once: processes on other nodes must use these values, not those of their own environment.
        for name, variable in (
            ("tracking_uri", "MLFLOW_TRACKING_URI"),
            ("study_storage", "DSKD_STUDY_STORAGE"),
            ("address", "RAY_ADDRESS"),
        ):
            object.__setattr__(self, name, getattr(self, name) or os.environ.get(variable) or None)
        if self.min_workers_per_trial is not None and not 1 <= self.min_workers_per_trial < self.workers_per_trial:
            raise ValueError(
                "--min-workers-per-trial must be at least 1 and below --workers-per-trial "
                f"{self.workers_per_trial}, got {self.min_workers_per_trial}."
            )
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
        if is_address(self.storage) and not (self.tracking_uri and self.study_storage):
            raise ValueError(
                f"with --storage {self.storage} give --tracking-uri and --study-storage too: "
                "their embedded defaults are files in a local storage folder."
            )
        presets = self.run_configs()
        if self.trials < len(presets):
            raise ValueError(
                f"--trials {self.trials} cannot hold the {len(presets)} presets untuned, which come first; "
                f"give at least {len(presets)}."
            )
        if len(presets) > 1 and self.sampler not in ("tpe", "random"):
            raise ValueError(
                f"--sampler {self.sampler} cannot search several presets, whose parameters differ; use tpe or random."
            )
        if self.name in split_words(self.start_from):
            raise ValueError(f"--start-from names this search itself, {self.name!r}; it continues by its own name.")
        self.budget_seconds()

    def run_configs(self) -> dict[str, RunConfig]:
        """The configuration of each given preset, in their order, all with the same epochs, image and batch size.

        Raises ValueError on an unknown preset or a value out of range.
        """
        names = tuple(PRESETS) if self.preset == "all" else split_words(self.preset)
        if not names or (unknown := [name for name in names if name not in PRESETS]):
            got = unknown[0] if names else self.preset
            raise ValueError(f"--preset takes {', '.join(PRESETS)} or all, got {got!r}.")
        changes = {
            "epochs": self.epochs,
            "image_size": self.image_size,
            "resize": self.resize,
            "tile": self.tile,
            "overlap": self.overlap,
            "group_by": self.group_by,
            "score_candidates": self.score_candidates,
            "batch_size": self.batch_size if self.batch_size is not None else PRESETS[names[0]].train.batch_size,
        }
        return {name: PRESETS[name].with_values(changes) for name in names}

    def budget_seconds(self) -> float | None:
        """Wall time of the whole search; None: no limit.

        Raises ValueError if the text is not a valid time.
        """
        if self.time_budget is None:
            return None
        parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", self.time_budget)
        hours, minutes, seconds = (int(part or 0) for part in parts.groups()) if parts else (0, 0, 0)
        total = 3600 * hours + 60 * minutes + seconds
        if total == 0:
            raise ValueError(f"--time-budget must be a time such as 2h, 1h30m or 90s, got {self.time_budget!r}.")
        return float(total)


def split_words(text: str) -> tuple[str, ...]:
    """The words between the commas, each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
