"""The run of one category: train the students on prepared inputs and keep those of the best validation."""

import copy
import dataclasses
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dskd.atomic import file_in_making
from dskd.calibration import calibrate
from dskd.checkpoint import DetectorRecord
from dskd.config import RunConfig
from dskd.data.geometry import Geometry
from dskd.data.parts import part_name, worst_scores
from dskd.device import WorkerRank, to_device
from dskd.evaluate import (
    compute_metrics,
    compute_metrics_shared,
    disagreements,
    inspect_images,
    score_files,
    score_images,
)
from dskd.metrics import Scores
from dskd.model.batchnorm import share_batchnorm
from dskd.model.features import FeatureTable
from dskd.model.frozen import FrozenNetworks
from dskd.model.network import build_students
from dskd.model.seeding import seeded
from dskd.model.teacher import UNREADABLE, normalize
from dskd.training.evidence import Evidence, resampled_objectives
from dskd.training.inputs import TrainingData
from dskd.training.loop import Interval, NonFiniteLossError, Step, build_optimizer, fit
from dskd.training.recorded import quickest_step
from dskd.training.score_search import CoarseImages, search_scores

STATE_FILE = "training.pt"
_START_AFRESH = "start afresh (dskd train --restart), or in another folder"


class IntervalResult(NamedTuple):
    """One interval with the validation at its end."""

    interval: Interval
    scores: Scores
    """Metrics on held-out normals, synthetic defects, and real labelled defects if there are some."""
    objective: float
    best_objective: float
    """Highest objective so far; a search compares this value, because a run keeps its best students."""


def objective(scores: Scores) -> float:
    """The value by which steps and trials are selected: mean of image AUROC and AUPRO on the validation images.

    Image AUROC alone if no image has a mask, as in one-class novelty.
    """
    return scores.image_auroc if math.isnan(scores.aupro) else (scores.image_auroc + scores.aupro) / 2


@dataclasses.dataclass
class TrainingRun:
    """The students of one run, their optimiser, and the best of them so far."""

    config: RunConfig
    inputs: TrainingData
    device: torch.device
    students: nn.Module
    optimizer: torch.optim.Optimizer
    next_interval: int = 0
    best_interval: int = -1
    best_objective: float = -1.0
    best_scores: Scores | None = None
    best_weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    history: list[IntervalResult] = dataclasses.field(default_factory=list)
    """All intervals so far, including those before an interruption."""

    @classmethod
    def begin(
        cls, config: RunConfig, inputs: TrainingData, device: torch.device, num_workers: int = 1
    ) -> "TrainingRun":
        """A run with untrained students, initialised from the configuration's seed, equal on every worker.

        Several workers share their BatchNorm statistics. Raises ValueError if `inputs` were prepared
        for another stage I, or if a batch holds one value per channel, on which BatchNorm cannot train.
        """
        if config.amplification != inputs.amplification:
            raise ValueError(
                "inputs and run must have the same amplification, got "
                f"{inputs.amplification} and {config.amplification}; prepare with the run's."
            )
        students: nn.Module = build_students(config.model, inputs.teacher, config.train.seed).to(device)
        _check_batch_of_one(students, config, inputs, device)
        if num_workers > 1:
            students = share_batchnorm(students, device)
        return cls(config, inputs, device, students, build_optimizer(students, config.train))

    @property
    def step(self) -> int:
        """Steps of the optimiser up to the last validation."""
        return self.history[-1].interval.step if self.history else 0

    @property
    def num_steps(self) -> int:
        """Steps of the whole training, where patience does not end it before."""
        return self.config.train.num_steps(len(self.inputs.train_images))

    @property
    def is_finished(self) -> bool:
        """Whether the last interval is trained, or the configured patience is at its end."""
        train = self.config.train
        without_gain = self.next_interval - 1 - self.best_interval
        return self.next_interval == train.num_validations or 0 < train.patience <= without_gain

    def intervals(
        self,
        trained: nn.Module | None = None,
        worker: WorkerRank = WorkerRank(),  # noqa: B008 - an immutable tuple
    ) -> Iterator[IntervalResult]:
        """Train to the end, with a validation after each interval.

        `trained` is `students` wrapped for DDP if several workers train together; every worker
        then yields the same results.
        """
        return (each for each in self.steps(trained, worker) if isinstance(each, IntervalResult))

    def steps(
        self,
        trained: nn.Module | None = None,
        worker: WorkerRank = WorkerRank(),  # noqa: B008 - an immutable tuple
    ) -> Iterator[Step | IntervalResult]:
        """Like `intervals`, but also yields every optimiser step, before its interval."""
        if self.is_finished:  # restored
            return
        inputs = self.inputs
        training = fit(
            trained or self.students,
            self.optimizer,
            inputs.train_images,
            inputs.train_features,
            self.config,
            device=self.device,
            worker=worker,
            first_interval=self.next_interval,
            take_step=quickest_step(self.device, worker.world_size),
        )
        validation_features = inputs.validation_features.resident(self.device)
        for each in training:
            if isinstance(each, Step):
                yield each
                continue
            scores = self._validate(each, validation_features, worker)
            value = objective(scores)
            if value > self.best_objective:
                self.best_interval, self.best_objective, self.best_scores = each.number, value, scores
                self.best_weights = {
                    name: tensor.detach().cpu().clone() for name, tensor in self.students.state_dict().items()
                }
            self.next_interval = each.number + 1
            self.history.append(IntervalResult(each, scores, value, self.best_objective))
            yield self.history[-1]
            if self.is_finished:
                return

    def _validate(self, interval: Interval, features: FeatureTable, worker: WorkerRank) -> Scores:
        inputs = self.inputs
        try:
            return compute_metrics_shared(
                features,
                self.students,
                inputs.validation,
                self.config,
                self.device,
                worker.rank,
                worker.world_size,
            )
        except ValueError as error:
            # Images and labels are valid: the error can only come from maps that are not finite after the last update.
            raise NonFiniteLossError(
                f"the students of step {interval.step} give no finite anomaly maps; "
                f"learning_rate {self.config.train.learning_rate:g} is probably too high, try a tenth of it."
            ) from error

    def save(self, folder: Path) -> None:
        """Write the state to resume from, atomically; a resumed training gives the same result as an uninterrupted one.

        Raises OSError if it cannot be written.
        """
        state = {
            "identity": self._identity(),
            "students": self.students.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "next_interval": self.next_interval,
            "best_interval": self.best_interval,
            "best_objective": self.best_objective,
            "best_scores": tuple(self.best_scores) if self.best_scores else None,
            "best_weights": self.best_weights,
            "history": [(tuple(each.interval), tuple(each.scores), *each[2:]) for each in self.history],
        }
        content = io.BytesIO()  # on a full disk torch's own writer raises a RuntimeError about file positions
        torch.save(state, content)
        with file_in_making(folder / STATE_FILE) as partial:
            partial.write_bytes(content.getbuffer())

    def restore(self, folder: Path) -> None:
        """Resume from the state that `save` wrote.

        Raises ValueError if it is damaged or belongs to another configuration, other data or another teacher.
        """
        path = folder / STATE_FILE
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            there = state["identity"]
        except UNREADABLE as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{path} is no readable training state ({reason}); {_START_AFRESH}.") from None
        # A field newer than the state has its default there; before there were steps every length was in epochs.
        here, there = self._identity(), RunConfig().flat() | {"steps": None} | there
        if differing := sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name)):
            name = differing[0]
            raise ValueError(
                f"{folder} holds the training state of another run: {name} is {there.get(name)} there and "
                f"{here.get(name)} here; {_START_AFRESH}."
            )
        self.students.load_state_dict(state["students"])
        self.optimizer.load_state_dict(state["optimizer"])
        if "next_epoch" in state:  # of the time when every length was in epochs, which are intervals too
            ends = self.config.train.interval_ends(len(self.inputs.train_images))
            state["next_interval"], state["best_interval"] = state["next_epoch"], state["best_epoch"]
            state["history"] = [((*epoch, ends[epoch[0]]), *rest) for epoch, *rest in state["history"]]
        self.next_interval, self.best_interval = state["next_interval"], state["best_interval"]
        self.best_objective = state["best_objective"]
        self.best_scores = Scores(*state["best_scores"]) if state["best_scores"] else None
        self.best_weights = {name: tensor.cpu() for name, tensor in state["best_weights"].items()}
        self.history = [
            IntervalResult(Interval(*interval), Scores(*scores), *rest) for interval, scores, *rest in state["history"]
        ]

    def _identity(self) -> dict[str, Any]:
        """All that determines the result of this training, by name; runs with equal values give equal results."""
        inputs = self.inputs
        return self.config.flat() | {
            "category": inputs.category,
            "data": f"sha256 {inputs.data_sha256[:12]}…",
            "teacher": f"sha256 {inputs.teacher_sha256[:12]}…",
            "textures": f"sha256 {inputs.textures_sha256[:12]}…" if inputs.num_textures else "drawn",
            **({} if inputs.selection == "val" else {"selection": inputs.selection}),
        }

    def detector(self, revision: str = "") -> tuple[DetectorRecord, dict[str, Tensor]]:
        """Record and weights (teacher and best students) of the finished detector.

        With `score_candidates` its score configuration is the one that `search_scores` found, and the record's
        `val/` metrics are those of that configuration. Afterwards `students` has the weights of the best validation.
        """
        assert self.best_scores is not None, "no interval has been trained"
        self.students.load_state_dict(self.best_weights)
        inputs = self.inputs
        config, scores, searched = self._with_best_score()
        normal_scores, pattern = self._normal_scores(config), config.data.group_by
        part_scores = worst_scores(inputs.calibration_paths, normal_scores, pattern) if pattern else []
        record = DetectorRecord(
            category=inputs.category,
            config=config,
            teacher=inputs.teacher_source,
            teacher_sha256=inputs.teacher_sha256,
            data_sha256=inputs.data_sha256,
            validation_files=inputs.validation_files,
            num_validation_defects=inputs.num_validation_defects,
            num_textures=inputs.num_textures,
            textures_sha256=inputs.textures_sha256,
            selection=inputs.selection,
            scale=inputs.scale,
            region=inputs.region,
            calibration_files=inputs.calibration_files,
            step=self.history[self.best_interval].interval.step,
            thresholds=calibrate(normal_scores),
            part_thresholds=calibrate(part_scores) if pattern else (),
            normal_scores=tuple(normal_scores),
            normal_part_scores=tuple(part_scores),
            num_folds=inputs.num_folds,
            metrics={
                "val/objective": objective(scores),
                **{f"val/{name}": value for name, value in scores._asdict().items() if math.isfinite(value)},
                **searched,
            },
            revision=revision,
        )
        weights = {f"teacher.{name}": value.cpu() for name, value in inputs.teacher.state_dict().items()}
        weights |= {f"students.{name}": value for name, value in self.best_weights.items()}
        return record, weights

    def evidence(self, record: DetectorRecord) -> Evidence:
        """What the held-out fold says of the detector that `detector` has just given."""
        inputs, truth = self.inputs, self.inputs.validation
        found = disagreements(inputs.validation_features, self.students, truth.images, self.device)
        images = CoarseImages.of(found, truth.masks, truth.labels, truth.has_mask, truth.inside)
        return Evidence(
            record.metrics["val/objective"],
            resampled_objectives(images, record.config.score, self._parts(), self.config.data.split_seed),
            record.calibration_files,
            record.normal_scores,
            record.normal_part_scores,
        )

    def _parts(self) -> npt.NDArray[np.int64]:
        """The same number for the validation images of one part, (N,); of tiles one is as good as a part."""
        inputs, pattern = self.inputs, self.config.data.group_by
        if not pattern or self.config.data.tile:
            return inputs.validation.sources
        names = [part_name(path.as_posix(), pattern) for path in inputs.calibration_paths]
        first = [names.index(name) for name in names]
        return np.array([first[source] if source < len(first) else source for source in inputs.validation.sources])

    def _normal_scores(self, config: RunConfig) -> list[float]:
        """Scores of the held-out normal images that the thresholds rest on; whole images, also with tiles."""
        inputs = self.inputs
        geometry = Geometry.of(config.data, inputs.region, config.model.tile_alignment)
        # As the detector will see images: a good one that a threshold rests on must not lie above it by rounding.
        networks = FrozenNetworks.folded(inputs.teacher, self.students, 2 * config.model.image_multiple[0])
        if geometry.tile:
            return score_files(networks, inputs.calibration_paths, config, geometry, self.device, inputs.scale)
        seen = inspect_images(
            networks, inputs.calibration_images, config, self.device, inside=inputs.calibration_inside
        )
        found: list[float] = seen.scores.tolist()
        return found

    def _with_best_score(self) -> tuple[RunConfig, Scores, dict[str, float]]:
        """The configuration with the best score parameters found for `students`, its metrics, and the search's gain."""
        assert self.best_scores is not None
        if not self.config.score.score_candidates:
            return self.config, self.best_scores, {}
        inputs, truth = self.inputs, self.inputs.validation
        found = search_scores(
            disagreements(inputs.validation_features, self.students, truth.images, self.device),
            truth.masks,
            truth.labels,
            truth.has_mask,
            truth.sources,
            self.config.score,
            num_candidates=self.config.score.score_candidates,
            seed=self.config.train.seed,
            inside=truth.inside,
        )
        searched = {"val/score_candidates": float(found.num_candidates)}
        if found.num_candidates:
            searched |= {"val/score_gain": found.gain, "val/score_gain_error": found.standard_error}
        config = dataclasses.replace(self.config, score=found.best)
        seen = score_images(
            inputs.validation_features, self.students, truth.images, config, self.device, inside=truth.inside
        )
        scores = compute_metrics(seen, truth)
        # The candidates were compared on a coarse grid; at full size the given configuration may still be better.
        if objective(scores) < objective(self.best_scores):
            return self.config, self.best_scores, searched | {"val/score_adopted": 0.0}
        return config, scores, searched | {"val/score_adopted": float(found.is_adopted)}


def _check_batch_of_one(students: nn.Module, config: RunConfig, inputs: TrainingData, device: torch.device) -> None:
    """Raise ValueError before the training if batches of one image give the deepest layer only one position."""
    if min(config.train.batch_size, len(inputs.train_images)) > 1:
        return
    trial = copy.deepcopy(students).train()  # a copy: a forward pass in train mode changes BatchNorm's statistics
    with torch.no_grad(), seeded(0):
        try:
            first = np.zeros(1, np.int64)
            pixels = normalize(to_device(device, inputs.train_images, first))
            trial(pixels, inputs.train_features.pyramid(first, device))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            width, height = config.data.input_size
            raise ValueError(
                f"batches of one image of {width} x {height} pixels leave the deepest layer one value per channel, on "
                f"which BatchNorm cannot train; raise --batch-size (now {config.train.batch_size}, with "
                f"{len(inputs.train_images)} training images), or --image-size, --resize or --tile."
            ) from None
