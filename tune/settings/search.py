"""What a search is asked to do: the flags of `tune/search.py`, and what they default to."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dskd.config import RunConfig, Selection
from dskd.data.datasets import find_categories
from dskd.presets import PRESETS
from tune.settings.space import Space, build_space
from tune.settings.space_file import SpaceFile, read_space
from tune.storage import uris as places
from tune.storage.uris import LOCAL_RESULTS


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """Search the hyperparameters of a detector for each category, on a Ray cluster."""

    data: str
    """Folder of categories, at the same path on every node, or s3://bucket/path, of which each node copies the
    categories that it trains on; dskd check-data names the layouts."""
    categories: str = "all"
    """Categories to search, separated by commas, or all."""
    name: str = "search"
    """Name of the search and of its MLflow experiment; the same name again continues it."""
    trials: int = 8
    """Trials per category; more than a finished search had adds to it."""
    time_budget: str | None = None
    """Wall time of the whole search, such as 2h, 1h30m or 90s; every category gets its share of what is left when
    it begins. Trials running at its end are cut: the same command goes on with them."""
    epochs: int = 100
    """Epochs of a trial that is not pruned."""
    image_size: int = 256
    """Side in pixels that images are resized to; a multiple of 32."""
    preset: str = "dskd"
    """Method to start from: dskd, stfpm, rd4ad or aand; several, separated by commas, or all are searched
    together, each of them untuned first."""
    space: Path | None = None
    """TOML file of what differs from the default search space: field = value, [values] or {low, high, log}, for
    all categories or below [category.NAME] or [preset.NAME]."""
    start_from: str = ""
    """Earlier searches in the same storage, separated by commas, whose champions are tried first too."""
    sampler: Literal["tpe", "gp", "cmaes", "qmc", "random"] = "tpe"
    """Optuna's sampler: multivariate TPE, Gaussian process, CMA-ES, quasi-random or random; with several presets
    tpe or random."""
    selection: Selection = "val"
    """What chooses epochs and trials: val, images without test labels; or oracle, the labelled test images, to
    reproduce papers, marked in every output and never a champion in MLflow."""
    textures: Path | None = None
    """Folder of images, such as DTD, that feed the synthetic defects; at the same path on every node."""
    teacher_weights: str = "hub"
    """hub, a .safetensors or .pth file at the same path on every node, or random (wiring tests)."""
    batch_size: int | None = None
    """Images of one optimiser step over all workers; the preset's unless given."""
    score_candidates: int = 500
    """Score configurations tried on each trained trial without retraining it; 0: none."""
    workers_per_trial: int = 1
    """Processes of one trial; more than one train with DDP, on several nodes where needed."""
    min_workers_per_trial: int | None = None
    """Fewest processes that a trial may start or go on with where the cluster has no more; it grows again to
    --workers-per-trial. Their number is fixed unless given."""
    gpus_per_worker: float | None = None
    """GPUs of a worker, fractions allowed; 1 where the cluster has GPUs, else 0, unless given."""
    cpus_per_worker: float = 1.0
    """CPUs of a worker."""
    max_concurrent: int | None = None
    """Trials running at once over all categories; what the cluster holds at the time unless given."""
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
    """Size in GB of a node's cache of decoded images and teacher features, and once more of its copies of data
    from s3://."""
    dry_run: bool = False
    """Check everything, measure a training step, print the plan with a forecast of time, and leave no trace."""
    promote: bool = True
    """Let the alias champion of MLflow's registered model move to a better winner; else only register a version."""
    json: bool = False
    """Print one JSON document on stdout at the end."""

    def __post_init__(self) -> None:
        # Read once, here: the processes on other nodes get these values and not their own environment's.
        for name, variable in (("tracking_uri", "MLFLOW_TRACKING_URI"), ("study_storage", "DSKD_STUDY_STORAGE")):
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
        if self.is_remote_storage and not (self.tracking_uri and self.study_storage):
            raise ValueError(
                f"with --storage {self.storage} give --tracking-uri and --study-storage too: "
                "their embedded defaults are files in a local storage folder."
            )
        if self.trials < len(self.run_configs()):
            raise ValueError(
                f"--trials {self.trials} cannot hold the {len(self.run_configs())} presets untuned, which come first; "
                f"give at least {len(self.run_configs())}."
            )
        if len(self.run_configs()) > 1 and self.sampler not in ("tpe", "random"):
            raise ValueError(
                f"--sampler {self.sampler} cannot search several presets, whose parameters differ; use tpe or random."
            )
        if self.name in self.earlier_searches:
            raise ValueError(f"--start-from names this search itself, {self.name!r}; it continues by its own name.")
        self.budget_seconds  # noqa: B018 - refuses what it cannot read
        self._space_file()

    @property
    def is_remote_storage(self) -> bool:
        return places.is_remote(self.storage)

    @property
    def storage_uri(self) -> str:
        return places.absolute_storage(self.storage)

    @property
    def tracking(self) -> str:
        return places.tracking_address(self.tracking_uri, self.storage)

    @property
    def artifact_location(self) -> str | None:
        return places.artifact_location(self.tracking, self.storage)

    @property
    def studies(self) -> str:
        return self.study_storage or f"sqlite:///{self.storage_uri}/optuna.db"

    @property
    def search_uri(self) -> str:
        """Where everything of this search lies."""
        return f"{self.storage_uri}/{self.name}"

    def run_config(self) -> RunConfig:
        """The configuration that trials vary; of several presets the first one's.

        Raises ValueError on values out of range.
        """
        return next(iter(self.run_configs().values()))

    def run_configs(self) -> dict[str, RunConfig]:
        """The configuration of each preset asked for, in their order: alike in epochs, image and batch size.

        Raises ValueError on an unknown preset, and on values out of range.
        """
        names = tuple(PRESETS) if self.preset == "all" else _words(self.preset)
        if not names or (unknown := [name for name in names if name not in PRESETS]):
            got = unknown[0] if names else self.preset
            raise ValueError(f"--preset takes {', '.join(PRESETS)} or all, got {got!r}.")
        changes = {
            "epochs": self.epochs,
            "image_size": self.image_size,
            "score_candidates": self.score_candidates,
            "batch_size": self.batch_size if self.batch_size is not None else PRESETS[names[0]].train.batch_size,
        }
        return {name: PRESETS[name].with_values(changes) for name in names}

    def spaces(self, categories: Sequence[str], root: Path | None = None) -> dict[str, Space]:
        """The search space of each category, without the points of earlier searches; `root` as below.

        Raises ValueError naming file and entry where --space does not fit.
        """
        file = self._space_file()
        if file is None:
            return dict.fromkeys(categories, build_space(self.run_configs()))
        file.check_names(tuple(self.run_configs()), tuple(find_categories(root or Path(self.data))))
        general = file.space(self.run_configs(), "")
        return {
            category: file.space(self.run_configs(), category) if category in file.by_category else general
            for category in categories
        }

    def _space_file(self) -> SpaceFile | None:
        return read_space(self.space) if self.space is not None else None

    @property
    def earlier_searches(self) -> tuple[str, ...]:
        return _words(self.start_from)

    @property
    def budget_seconds(self) -> float | None:
        """None where the search may take as long as it takes.

        Raises ValueError on a time that cannot be read.
        """
        if self.time_budget is None:
            return None
        parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", self.time_budget)
        hours, minutes, seconds = (int(part or 0) for part in parts.groups()) if parts else (0, 0, 0)
        total = 3600 * hours + 60 * minutes + seconds
        if total == 0:
            raise ValueError(f"--time-budget must be a time such as 2h, 1h30m or 90s, got {self.time_budget!r}.")
        return float(total)

    def chosen_categories(self, root: Path | None = None) -> tuple[str, ...]:
        """The categories to search, in the order asked for; `root` is where the data's names can be read.

        Raises ValueError on an unknown one.
        """
        known = find_categories(root or Path(self.data))
        if self.categories == "all":
            return tuple(known)
        wanted = _words(self.categories)
        if unknown := [name for name in wanted if name not in known]:
            raise ValueError(f"no category {unknown[0]!r} in {self.data}; it holds: {', '.join(known)}.")
        if not wanted:
            raise ValueError("--categories names none; give names separated by commas, or all.")
        return wanted

    @property
    def ray_address(self) -> str | None:
        """None means: start a cluster on this machine for this search alone."""
        return self.address or os.environ.get("RAY_ADDRESS") or None


def _words(text: str) -> tuple[str, ...]:
    """What stands between commas, each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
