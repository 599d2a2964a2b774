"""The flags of `tune/search.py` and their defaults, checked."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dskd.arguments import given_length
from dskd.config import LayoutName, RunConfig, Selection, TeacherSource
from dskd.presets import PRESETS, read_config, read_document, with_backbone
from tune.settings.limits import (
    MLFLOW_EXAMPLE,
    STUDIES_EXAMPLE,
    Cpus,
    Errors,
    Finalists,
    Gigabytes,
    Gpus,
    Processes,
    Seed,
    Sharing,
    Together,
    Trials,
    check_name,
    check_ranges,
    check_storage_address,
    resolved_server,
)
from tune.storage.shown import host_of
from tune.storage.uris import LOCAL_RESULTS, is_address

USUAL_FOLDS = 5
Promote = Literal["auto", "always", "never"]
SamplerName = Literal["tpe", "gp", "cmaes", "qmc", "random"]
FIXED = (
    "steps", "epochs", "patience", "image_size", "resize", "tile", "overlap", "group_by", "batch_size",
    "score_candidates", "backbone", "levels", "folds", "validation_fraction", "calibration_fraction", "split_seed",
    "layout",
)  # fmt: skip
"""Flags that set the configuration's field of the same name for all trials."""
_LONGEST_TIME = 10_000 * 3600
"""In seconds."""


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
    trials: Trials = 8
    """Trials per category; a larger number than before extends a finished search."""
    time_budget: str | None = None
    """Wall time of the whole search, such as 2h, 1h30m or 90s; each category gets its share of the remaining time when
    it starts. Trials still running at the end are interrupted; the same command continues them."""
    steps: int | None = None
    """Optimiser steps of a trial that is not pruned; by default the length of --config, else that of each preset,
    however few images there are."""
    epochs: int | None = None
    """Length in passes over the training images instead of steps, with a validation after each."""
    patience: int | None = None
    """End a trial after this many validations in a row without a better objective, 0: never; by default that of
    --config, else 0."""
    image_size: int | None = None
    """Side in pixels that images are resized to, a multiple of 32, or of 28 for a teacher with patches of 14; by
    default that of --config, else 256."""
    resize: str | None = None
    """square: stretched to image_size; letterbox: aspect ratio kept between bars; or WIDTHxHEIGHT; by default that of
    --config, else square."""
    tile: int | None = None
    """Side in pixels of the tiles that images are cut into at their own size, instead of being resized; 0: none; by
    default that of --config, else 0."""
    overlap: int | None = None
    """Pixels that neighbouring tiles share; by default that of --config, else 96, or half of a smaller tile."""
    group_by: str | None = None
    """Regular expression that finds a part's name in an image's path, for parts with several images; by default that
    of --config, else none."""
    preset: str | None = None
    """Method to start from: dskd, stfpm, rd4ad or aand; by default that of --config, else dskd. Several, separated by
    commas, or all are searched together; each is first tried untuned."""
    config: Path | None = None
    """TOML file of fields, as dskd train --print-config writes them, that replace those of every preset: fixed for all
    trials where the space does not vary them."""
    backbone: str | None = None
    """timm model of the teacher and of the student encoder; by default that of --config, else resnet18.tv_in1k. Several
    as a dimension: backbone = ["…", "…"] in --space."""
    levels: tuple[int, ...] | None = None
    """timm feature indices of the pyramid; by default those of --config, else what goes with the backbone."""
    folds: int | None = None
    """Parts into which the good images are cut: trials are trained without the first, which chooses among them, and
    finalists without each of the others; 0: one share is held out (--validation-fraction). By default that of --config,
    else 5, or 0 where one of the two next flags or --selection oracle is given."""
    validation_fraction: float | None = None
    """Without folds: share of the normal training images held out; by default that of --config, else 0.2."""
    calibration_fraction: float | None = None
    """Without folds: share of the held-out images that set the thresholds alone; by default that of --config, else
    0.5."""
    finalists: Finalists = 3
    """Best trials of a category that are trained on the other folds too, and compared with the untuned preset there;
    0: the first fold chooses alone."""
    min_gain_errors: Errors = 1.5
    """A finalist becomes champion if it is ahead of the untuned preset by more than so many standard errors; else the
    preset stays."""
    split_seed: int | None = None
    """Seed of the held-out splits; by default that of --config, else 0."""
    layout: LayoutName | None = None
    """auto, or classes for a folder of class folders (one-class novelty); by default that of --config, else auto."""
    space: Path | None = None
    """TOML file with changes to the default search space: field = value, [values] or {low, high, log}, for all
    categories or below [category.NAME] or [preset.NAME]."""
    start_from: str = ""
    """Earlier searches in the same storage, separated by commas, whose champions are also tried first."""
    sampler: SamplerName = "tpe"
    """Optuna's sampler: multivariate TPE, Gaussian process, CMA-ES, quasi-random or random; with several presets
    tpe or random."""
    selection: Selection = "val"
    """What selects steps and trials: val, images without test labels; or oracle, the labelled test images, to
    reproduce papers. An oracle result is marked in every output and never becomes champion in MLflow."""
    exclude: Path | None = None
    """Text file with the names of good images to leave out, one per line: file names, or ends of paths such as
    flange/train/good/007.png. Each search names those that look worst."""
    textures: Path | None = None
    """Folder of texture images, such as DTD, for the synthetic defects; at the same path on every node."""
    teacher_weights: str = "hub"
    """hub, lite0 (EfficientNet-Lite0 from an installed package), a .safetensors or .pth file at the same path on every
    node, or random (wiring tests); for several backbones BACKBONE=WEIGHTS,BACKBONE=WEIGHTS."""
    batch_size: int | None = None
    """Images per optimiser step over all workers; by default that of --config, else of the preset."""
    score_candidates: int | None = None
    """Score configurations tried on each trained trial without retraining; 0: none; by default that of --config, else
    500."""
    workers_per_trial: Processes = 1
    """Processes of one trial; several train with DDP, on several nodes if needed."""
    min_workers_per_trial: Processes | None = None
    """Smallest number of processes with which a trial may start or continue while the cluster has no room for more;
    it grows back to --workers-per-trial. By default the number is fixed."""
    gpus_per_worker: Gpus | None = None
    """GPUs of a worker, fractions allowed; by default 1 if the cluster has GPUs, else 0."""
    cpus_per_worker: Cpus = 1.0
    """CPUs of a worker."""
    trials_per_gpu: Sharing = 1
    """Trials that share one worker, its CPUs and its GPUs, and take their training steps in one call per layer where
    their students have one architecture. Meant for GPUs that one trial leaves idle, and not measured on one yet; on
    CPUs it is slower than one trial after the other."""
    max_concurrent: Together | None = None
    """Trials that run at once over all categories; by default as many as the cluster can hold at that time."""
    wait_for_resources: str = "10m"
    """Time such as 10m or 2h to wait for nodes that neither the cluster nor its autoscaler's limits promise; where the
    autoscaler brings nodes, the search waits as long as they take."""
    storage: str = LOCAL_RESULTS
    """Folder or s3://bucket/path for trial state and champions; reachable from every node."""
    tracking_uri: str | None = field(default=None, repr=False)
    """MLflow server; by default $MLFLOW_TRACKING_URI, or an SQLite file in a local storage folder."""
    study_storage: str | None = field(default=None, repr=False)
    """Optuna storage URL such as postgresql://…; by default $DSKD_STUDY_STORAGE, which keeps its password out of
    the command line, or an SQLite file in a local storage folder."""
    address: str | None = None
    """Ray cluster: auto or ray://…; by default the job's cluster, or one started for this search."""
    seed: Seed = 0
    """Seed of the sampler."""
    cache_gb: Gigabytes = 20.0
    """Size limit in GB of a node's cache of decoded images and teacher features; the same limit applies separately to
    its copies of data from s3://."""
    dry_run: bool = False
    """Check everything, measure a training step, print the plan with a forecast of time, and leave no files."""
    promote: Promote = "auto"
    """Who gets the alias champion of MLflow's registered model: auto, a winner that is better on the same evaluation
    data (on other data it gets the alias candidate); always, any winner; never, none. Never one of an untrained
    teacher."""
    json: bool = False
    """Print one JSON document on stdout at the end."""
    log_format: Literal["text", "json"] = "text"
    """How progress is told on stderr: lines for people, or JSON objects with time, search, category, trial, message."""
    webhook: str | None = field(default=None, repr=False)
    """Address that is told by a POST of the document of --json when the search has ended, or failed; by default
    $DSKD_WEBHOOK. A stopped search tells nobody."""

    def __post_init__(self) -> None:
        # Read here once: processes on other nodes must use these values, not those of their own environment.
        for name, variable in (
            ("tracking_uri", "MLFLOW_TRACKING_URI"),
            ("webhook", "DSKD_WEBHOOK"),
            ("study_storage", "DSKD_STUDY_STORAGE"),
            ("address", "RAY_ADDRESS"),
        ):
            object.__setattr__(self, name, getattr(self, name) or os.environ.get(variable) or None)
        check_ranges(self)
        if self.webhook is not None and not host_of(self.webhook):  # not repeated: it may be a secret
            raise ValueError("--webhook must be an http:// or https:// address with a host; the one given is none.")
        check_name(self.name, "--name")
        for earlier in split_words(self.start_from):
            check_name(earlier, "--start-from")
        check_storage_address(self.data, "--data")
        check_storage_address(self.storage, "--storage")
        for name, example in (("tracking_uri", MLFLOW_EXAMPLE), ("study_storage", STUDIES_EXAMPLE)):
            flag = f"--{name.replace('_', '-')}"
            object.__setattr__(self, name, resolved_server(getattr(self, name), flag, example))
        if self.min_workers_per_trial is not None and not 1 <= self.min_workers_per_trial < self.workers_per_trial:
            raise ValueError(
                "--min-workers-per-trial must be at least 1 and below --workers-per-trial "
                f"{self.workers_per_trial}, got {self.min_workers_per_trial}."
            )
        if self.trials_per_gpu > 1 and self.workers_per_trial > 1:
            raise ValueError(
                f"--trials-per-gpu {self.trials_per_gpu} lets trials share a worker, and --workers-per-trial "
                f"{self.workers_per_trial} gives each several; give one of the two."
            )
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
        self.wait_seconds()

    @property
    def num_reports(self) -> int:
        """Reports of a trial that is not pruned, one after each validation."""
        return next(iter(self.run_configs().values())).train.num_validations

    def run_configs(self, backbone: str | None = None) -> dict[str, RunConfig]:
        """The configuration of each given preset, in their order, all with the same image and batch size.

        The length too is the same if it is given; else each preset has its own, with as many validations.

        `backbone` replaces that of the flag. Flags override --config, which overrides the presets. Raises ValueError on
        an unknown preset, an unusable file, a value out of range, and weights of another backbone.
        """
        own, document = (None, {}) if self.config is None else read_document(self.config)
        preset = self.preset if self.preset is not None else own or "dskd"
        names = tuple(PRESETS) if preset == "all" else split_words(preset)
        if not names or (unknown := [name for name in names if name not in PRESETS]):
            got = unknown[0] if names else preset
            raise ValueError(f"--preset takes {', '.join(PRESETS)} or all, got {got!r}.")
        given_length(self.steps, self.epochs)  # refuses two lengths in the words of the flags
        teacher = TeacherSource(self.teacher_weights)
        backbone = backbone or self.backbone
        family = backbone or teacher.backbone
        stated = {name: value for section in document.values() for name, value in section.items()}
        usual: dict[str, Any] = {
            "score_candidates": 500,
            "batch_size": PRESETS[names[0]].train.batch_size,
            "folds": self._usual_folds(stated),
        }
        changes = {name: value for name, value in usual.items() if name not in stated}
        changes |= {name: value for name in FIXED if (value := getattr(self, name)) is not None}
        if self.levels is not None:
            ones = (1.0,) * len(self.levels)
            changes |= {name: ones for name in ("level_weights", "score_level_weights") if name not in stated}
        bases = {}
        for name in names:
            if self.config is not None:
                base = read_config(self.config, name, family)
            else:
                base = PRESETS[name] if family is None else with_backbone(PRESETS[name], family)
            bases[name] = base.with_values(changes if backbone is None else changes | {"backbone": backbone})
            teacher.check_fits(bases[name].model.backbone)
        return bases

    def _usual_folds(self, stated: Mapping[str, Any]) -> int:
        """Folds where nothing is said of them: none where a held-out share is asked for, or the test images select."""
        shares = ("validation_fraction", "calibration_fraction")
        is_split = any(getattr(self, name) is not None or name in stated for name in shares)
        return 0 if is_split or self.selection == "oracle" else USUAL_FOLDS

    def budget_seconds(self) -> float | None:
        """Wall time of the whole search; None: no limit.

        Raises ValueError if the text is not a valid time.
        """
        return None if self.time_budget is None else read_time(self.time_budget, "--time-budget")

    def wait_seconds(self) -> float:
        """Seconds to wait for nodes that nothing promises; raises ValueError if the text is not a valid time."""
        return read_time(self.wait_for_resources, "--wait-for-resources")


def read_time(text: str, flag: str) -> float:
    """Seconds of a time such as 2h, 1h30m or 90s; raises ValueError, naming the flag, on anything else."""
    parts = re.fullmatch(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", text)
    hours, minutes, seconds = (int(part or 0) for part in parts.groups()) if parts else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + seconds
    if not 0 < total <= _LONGEST_TIME:
        raise ValueError(
            f"{flag} must be a time such as 2h, 1h30m or 90s, at most {_LONGEST_TIME // 3600}h, got {text[:40]!r}."
        )
    return float(total)


def split_words(text: str) -> tuple[str, ...]:
    """The words between the commas, each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
