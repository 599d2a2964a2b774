"""One category's run: prepare its images, train the students, keep those of the best epoch."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from dskd.amplify import AmplificationEpoch, amplifier_optimizer, fit_amplifier
from dskd.calibration import calibrate
from dskd.checkpoint import DetectorRecord
from dskd.config import AmplificationConfig, DataConfig, RunConfig
from dskd.data.cache import ArrayCache
from dskd.data.datasets import fingerprint, read_category, set_apart, split_normals
from dskd.data.defects import choose_textures, load_textures
from dskd.data.images import load_images
from dskd.data.samples import Sample
from dskd.evaluate import LabelledImages, inspect, join, label, measure_shared, synthetic_validation
from dskd.metrics import Scores
from dskd.model.amplification import AmplifiedTeacher, build_amplifier
from dskd.model.batchnorm import share_batchnorm
from dskd.model.network import build_students
from dskd.model.teacher import UNREADABLE, Teacher, build_teacher, weights_fingerprint
from dskd.pyramids import FeatureTable, feature_table
from dskd.train import Epoch, NonFiniteLoss, Shard, Step, build_optimizer, fit_steps

_NUM_VALIDATION_DEFECTS = 32
STATE_FILE = "training.pt"
_START_AFRESH = "start afresh (dskd train --restart), or in another folder"


class Materials(NamedTuple):
    """What training needs of one category and one teacher; the same for every trial that shares them."""

    category: str
    teacher: Teacher
    """The amplified one where `amplification` asks for it."""
    teacher_source: str
    teacher_sha256: str
    """Of the pretrained weights, without the amplifier's."""
    train_images: npt.NDArray[np.uint8]
    train_features: FeatureTable
    validation: LabelledImages
    """Held-out normals that select, then copies of them with synthetic defects, then real labelled defects where
    there are some."""
    validation_features: FeatureTable
    validation_files: tuple[str, ...]
    calibration_images: npt.NDArray[np.uint8]
    """Held-out normals that the thresholds rest on; the same as select where none are set apart for it."""
    calibration_features: FeatureTable
    calibration_files: tuple[str, ...]
    data_sha256: str
    num_validation_defects: int
    """Real ones."""
    num_textures: int
    textures_sha256: str
    amplification: AmplificationConfig = AmplificationConfig()


def prepare(
    config: DataConfig,
    backbone: str,
    levels: tuple[int, ...],
    *,
    data: Path,
    category: str,
    teacher_weights: str,
    device: torch.device,
    cache: ArrayCache | None,
    textures: Path | None = None,
    progress: bool = False,
    amplification: AmplificationConfig = AmplificationConfig(),  # noqa: B008 - frozen
    on_amplification: Callable[[AmplificationEpoch], object] = lambda epoch: None,
) -> Materials:
    """Decode, split, amplify the teacher, draw the validation defects and run it, each at most once per machine.

    `teacher_weights` is "hub", "random" or a file; `textures` a folder of images that feed the synthetic
    defects, instead of drawn ones. `on_amplification` hears of every epoch of stage I that is computed here
    and now, and of none that the cache knows. In a process group every process gets the amplifier of the
    first. With `progress` a bar counts what takes long, on a terminal.
    Raises ValueError on unusable data, textures or weights, NonFiniteLoss where stage I diverges.
    """
    teacher = build_teacher(backbone, levels, teacher_weights).to(device)
    teacher_sha256 = weights_fingerprint(teacher)
    texture_files = choose_textures(textures) if textures is not None else []
    texture_images = load_textures(texture_files, config.image_size) if texture_files else None
    samples = read_category(data, category)
    train, held, held_names = split_normals(samples, config.validation_fraction, config.split_seed)
    defects = [sample for sample in samples.validation if sample.is_defective]

    def pixels(chosen: Sequence[Sample], what: str) -> tuple[npt.NDArray[np.uint8], str]:
        return _pixels([sample.path for sample in chosen], config, cache, f"reading {what}" if progress else None)

    train_images, train_sha256 = pixels(train, "training images")
    held_images, held_sha256 = pixels(held, "held-out images")
    content = train_sha256 + held_sha256
    textures_sha256 = fingerprint(texture_files) if texture_files else ""
    if amplification.amplification:
        teacher = _amplified(
            teacher,
            train_images,
            texture_images,
            amplification,
            device,
            cache,
            f"{_content(train_images)}|{textures_sha256}|{teacher_sha256}|{backbone}|{levels}|{device.type}",
            on_amplification,
        )
    used_sha256 = weights_fingerprint(teacher)
    names = dict(zip(held, held_names, strict=True))
    selecting, calibrating = set_apart(held, config.calibration_fraction, config.split_seed)
    selection_images = held_images[[held.index(sample) for sample in selecting]]
    calibration_images = held_images[[held.index(sample) for sample in calibrating]]
    validation = synthetic_validation(
        selection_images, seed=config.split_seed, num_defective=_NUM_VALIDATION_DEFECTS, textures=texture_images
    )
    if defects:
        defect_images, defect_sha256 = pixels(defects, "validation defects")
        validation = join(validation, label(defects, defect_images))
        masks_sha256 = fingerprint(sample.mask for sample in defects if sample.mask is not None)
        content += defect_sha256 + masks_sha256

    def features(images: npt.NDArray[np.uint8], what: str) -> FeatureTable:
        # the images' content names textures and seeds too: whatever drew the defects has changed the pixels
        key = f"{_content(images)}|{used_sha256}|{backbone}|{levels}|{device.type}"
        bar = f"teacher on {what}" if progress else None
        return feature_table(teacher, images, device, cache=cache, key=key, progress=bar)

    return Materials(
        category=category,
        teacher=teacher,
        teacher_source=teacher_weights if teacher_weights in ("hub", "random") else Path(teacher_weights).name,
        teacher_sha256=teacher_sha256,
        train_images=train_images,
        train_features=features(train_images, "training images"),
        validation=validation,
        validation_features=features(validation.images, "validation images"),
        validation_files=tuple(names[sample] for sample in selecting),
        calibration_images=calibration_images,
        calibration_features=features(calibration_images, "calibration images"),
        calibration_files=tuple(names[sample] for sample in calibrating),
        data_sha256=hashlib.sha256(content.encode()).hexdigest(),
        num_validation_defects=len(defects),
        num_textures=len(texture_files),
        textures_sha256=textures_sha256,
        amplification=amplification,
    )


def _content(images: npt.NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()


def _amplified(
    teacher: Teacher,
    images: npt.NDArray[np.uint8],
    textures: npt.NDArray[np.uint8] | None,
    config: AmplificationConfig,
    device: torch.device,
    cache: ArrayCache | None,
    key: str,
    on_epoch: Callable[[AmplificationEpoch], object],
) -> AmplifiedTeacher:
    """The teacher after stage I; its weights come from the cache where `key` and `config` are known."""
    amplifier = build_amplifier(teacher, config.memory_size, config.amplification_seed).to(device)
    parameters = list(amplifier.parameters())
    sizes = [parameter.numel() for parameter in parameters]

    def fill(out: npt.NDArray[np.float32]) -> None:
        optimizer = amplifier_optimizer(amplifier, config)
        for epoch in fit_amplifier(amplifier, optimizer, teacher, images, config, device=device, textures=textures):
            on_epoch(epoch)
        out[:] = parameters_to_vector(parameters).detach().cpu().numpy()

    found = np.empty(sum(sizes), np.float32)
    if cache is None:
        fill(found)
    else:
        found = cache.get(f"amplifier|{key}|{config}", found.shape, np.float32, fill)
    weights = torch.from_numpy(np.array(found)).to(device)
    if dist.is_available() and dist.is_initialized():
        # Stage I ran on every machine, and not every device rounds alike: the students need one teacher.
        dist.broadcast(weights, 0)
    with torch.no_grad():
        for parameter, values in zip(parameters, weights.split(sizes), strict=True):
            parameter.copy_(values.view_as(parameter))
    return AmplifiedTeacher(teacher, amplifier)


def _pixels(
    paths: list[Path], config: DataConfig, cache: ArrayCache | None, progress: str | None
) -> tuple[npt.NDArray[np.uint8], str]:
    content = fingerprint(paths)
    if cache is None:
        return load_images(paths, config.image_size, progress=progress), content
    shape = (len(paths), config.image_size, config.image_size, 3)
    fill = lambda out: load_images(paths, config.image_size, out, progress=progress)  # noqa: E731
    return cache.get(f"bilinear pixels|{content}", shape, np.uint8, fill), content


class Progress(NamedTuple):
    """One epoch with its validation."""

    epoch: Epoch
    scores: Scores
    """On held-out normals, synthetic defects, and real labelled ones where there are some."""
    objective: float
    best_objective: float
    """Highest objective of the epochs so far: what a search compares, as it is what a run keeps."""


def objective(scores: Scores) -> float:
    """The one honest figure that selects: mean of image AUROC and AUPRO on the validation images."""
    return (scores.image_auroc + scores.aupro) / 2


@dataclasses.dataclass
class Distillation:
    """The students of one run, their optimiser, and the best of them so far."""

    config: RunConfig
    materials: Materials
    device: torch.device
    students: nn.Module
    optimizer: torch.optim.Optimizer
    next_epoch: int = 0
    best_epoch: int = -1
    best_objective: float = -1.0
    best_scores: Scores | None = None
    best_weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    history: list[Progress] = dataclasses.field(default_factory=list)
    """Every epoch so far, those before an interruption included."""

    @classmethod
    def begin(
        cls, config: RunConfig, materials: Materials, device: torch.device, num_workers: int = 1
    ) -> "Distillation":
        """Untrained students, initialised from the configuration's seed alike on every worker.

        Several workers share their BatchNorm statistics. Raises ValueError where `materials` were prepared
        for another stage I.
        """
        if config.amplification != materials.amplification:
            raise ValueError(
                "materials and run must have the same amplification, got "
                f"{materials.amplification} and {config.amplification}; prepare with the run's."
            )
        students: nn.Module = build_students(config.model, materials.teacher, config.train.seed).to(device)
        if num_workers > 1:
            students = share_batchnorm(students, device)
        return cls(config, materials, device, students, build_optimizer(students, config.train))

    def epochs(self, trained: nn.Module | None = None, shard: Shard = Shard()) -> Iterator[Progress]:  # noqa: B008
        """Train to the configured last epoch, validating after each.

        `trained` is `students` wrapped for DDP where several workers train together; every worker
        then yields the same figures.
        """
        return (each for each in self.steps(trained, shard) if isinstance(each, Progress))

    def steps(
        self,
        trained: nn.Module | None = None,
        shard: Shard = Shard(),  # noqa: B008 - an immutable tuple
    ) -> Iterator[Step | Progress]:
        """`epochs` for those who watch: every optimiser step is yielded as well."""
        materials = self.materials
        training = fit_steps(
            trained or self.students,
            self.optimizer,
            materials.train_images,
            materials.train_features,
            self.config,
            device=self.device,
            shard=shard,
            first_epoch=self.next_epoch,
        )
        for each in training:
            if isinstance(each, Step):
                yield each
                continue
            scores = self._validate(each, shard)
            value = objective(scores)
            if value > self.best_objective:
                self.best_epoch, self.best_objective, self.best_scores = each.number, value, scores
                self.best_weights = {
                    name: tensor.detach().cpu().clone() for name, tensor in self.students.state_dict().items()
                }
            self.next_epoch = each.number + 1
            self.history.append(Progress(each, scores, value, self.best_objective))
            yield self.history[-1]

    def _validate(self, epoch: Epoch, shard: Shard) -> Scores:
        materials = self.materials
        try:
            return measure_shared(
                materials.validation_features,
                self.students,
                materials.validation,
                self.config,
                self.device,
                shard.rank,
                shard.world_size,
            )
        except ValueError as error:
            # Images and labels are sound: only maps of the epoch's last update can be refused.
            raise NonFiniteLoss(
                f"the students of epoch {epoch.number + 1} give no finite anomaly maps; "
                f"learning_rate {self.config.train.learning_rate:g} is probably too high, try a tenth of it."
            ) from error

    def save(self, folder: Path) -> None:
        """Write all that is needed to go on training exactly as if never interrupted; whole or not at all."""
        partial = folder / f".{STATE_FILE}.partial"
        with partial.open("wb") as file:
            torch.save(
                {
                    "identity": self._identity(),
                    "students": self.students.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "next_epoch": self.next_epoch,
                    "best_epoch": self.best_epoch,
                    "best_objective": self.best_objective,
                    "best_scores": tuple(self.best_scores) if self.best_scores else None,
                    "best_weights": self.best_weights,
                    "history": [(tuple(each.epoch), tuple(each.scores), *each[2:]) for each in self.history],
                },
                file,
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / STATE_FILE)

    def restore(self, folder: Path) -> None:
        """Go on from what `save` wrote.

        Raises ValueError when it is damaged or belongs to another configuration, data or teacher.
        """
        path = folder / STATE_FILE
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            there = state["identity"]
        except UNREADABLE as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{path} is no readable training state ({reason}); {_START_AFRESH}.") from None
        here = self._identity()
        if differing := sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name)):
            name = differing[0]
            raise ValueError(
                f"{folder} holds the training state of another run: {name} is {there.get(name)} there and "
                f"{here.get(name)} here; {_START_AFRESH}."
            )
        self.students.load_state_dict(state["students"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.next_epoch, self.best_epoch = state["next_epoch"], state["best_epoch"]
        self.best_objective = state["best_objective"]
        self.best_scores = Scores(*state["best_scores"]) if state["best_scores"] else None
        self.best_weights = {name: tensor.cpu() for name, tensor in state["best_weights"].items()}
        self.history = [Progress(Epoch(*epoch), Scores(*scores), *rest) for epoch, scores, *rest in state["history"]]

    def _identity(self) -> dict[str, Any]:
        """By name, all that decides what this training gives: two runs alike in it go the same way."""
        materials = self.materials
        return self.config.flat() | {
            "category": materials.category,
            "data": f"sha256 {materials.data_sha256[:12]}…",
            "teacher": f"sha256 {materials.teacher_sha256[:12]}…",
            "textures": f"sha256 {materials.textures_sha256[:12]}…" if materials.num_textures else "drawn",
        }

    def detector(self, revision: str = "") -> tuple[DetectorRecord, dict[str, Tensor]]:
        """Record and weights (teacher and best students) of the finished detector.

        Leaves `students` with the weights of the best epoch.
        """
        assert self.best_scores is not None, "no epoch has been trained"
        self.students.load_state_dict(self.best_weights)
        materials = self.materials
        seen = inspect(
            materials.calibration_features, self.students, materials.calibration_images, self.config, self.device
        )
        record = DetectorRecord(
            category=materials.category,
            config=self.config,
            teacher=materials.teacher_source,
            teacher_sha256=materials.teacher_sha256,
            data_sha256=materials.data_sha256,
            validation_files=materials.validation_files,
            num_validation_defects=materials.num_validation_defects,
            num_textures=materials.num_textures,
            textures_sha256=materials.textures_sha256,
            calibration_files=materials.calibration_files,
            epoch=self.best_epoch,
            thresholds=calibrate(seen.scores.tolist()),
            metrics={
                "val/objective": self.best_objective,
                **{f"val/{name}": value for name, value in self.best_scores._asdict().items()},
            },
            revision=revision,
        )
        weights = {f"teacher.{name}": value.cpu() for name, value in materials.teacher.state_dict().items()}
        weights |= {f"students.{name}": value for name, value in self.best_weights.items()}
        return record, weights
