"""The detector folder: written whole or not at all, verified when read, no pickle anywhere."""

import dataclasses
import datetime
import hashlib
import json
import math
import platform
import shutil
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import msgspec
import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from dskd.atomic import check_can_be_made, file_in_making, folder_in_making
from dskd.calibration import Threshold, calibrate, nearest_threshold
from dskd.config import VERSION, RunConfig, Selection, TeacherSource
from dskd.data.depth import PixelScale
from dskd.data.geometry import RegionOfInterest
from dskd.model.teacher import IMAGENET_MEAN, IMAGENET_STD

SCHEMA_VERSION = 4
RECORD_FILE = "detector.json"
WEIGHTS_FILE = "model.safetensors"
PREVIEW_FILE = "preview.png"
FEEDBACK_FOLDER = "feedback"
"""Images judged after the training (`dskd.jobs.feedback`); a new training into the same folder keeps them."""
_LIBRARIES = ("torch", "timm", "numpy", "pillow")


class Origin(NamedTuple):
    """Which detector a verdict comes from."""

    category: str = ""
    detector_version: str = ""
    """`DetectorRecord.detector_version`."""
    teacher: str = ""


class BrokenDetectorError(ValueError):
    """A detector folder that must not be used; the message names the file and what is wrong with it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DetectorRecord:
    """Everything about a detector except its weights: the content of `detector.json`."""

    category: str
    config: RunConfig
    teacher: str
    """Where the teacher's weights came from: "hub", "random" (untrained) or a file name."""
    teacher_sha256: str
    data_sha256: str
    """Fingerprint of the training and validation images, and of the masks among the latter."""
    validation_files: tuple[str, ...]
    """Normal images held out from training to select on: file names of training images, or paths below the
    category's folder where it has validation images of its own."""
    calibration_files: tuple[str, ...]
    """The held-out normal images that the thresholds are computed from, named in the same way; in older records all."""
    step: int | None
    """Steps of the optimiser that these students were trained for; None in older records, which count epochs."""
    thresholds: tuple[Threshold, ...]
    """Loosest first."""
    metrics: Mapping[str, float]
    """`val/…` and `test/…` figures; `val/` rests on synthetic defects and on `num_validation_defects` real ones, or
    on the test images where `selection` is "oracle"."""
    revision: str = ""
    """Revision of the code that trained it, empty where it is not known."""
    num_validation_defects: int = 0
    """Real labelled defects among the validation images."""
    num_textures: int = 0
    """Image files that fed the synthetic defects; 0: textures were drawn."""
    textures_sha256: str = ""
    """Fingerprint of those files."""
    selection: Selection = "val"
    """What chose the step; figures of an "oracle" detector have seen the test labels."""
    scale: PixelScale | None = None
    """How images of more than 8 bits are read, found in the training images; None in older records, whose images of
    16 bits lose the low 8."""
    region: RegionOfInterest | None = None
    """The part of every image that is inspected; None: all."""
    part_thresholds: tuple[Threshold, ...] = ()
    """Of parts that several images show (`DataConfig.group_by`), from the held-out normal parts; else none."""
    normal_scores: tuple[float, ...] = ()
    """Scores of `calibration_files`, in their order; none in older records, which have thresholds alone."""
    normal_part_scores: tuple[float, ...] = ()
    """The worst score of each of their parts, where several images show one; else none."""
    num_folds: int = 0
    """Folds that the normal images were cut into, of which this detector's training left out one; 0: none."""
    calibration_folds: int = 0
    """Detectors that gave `normal_scores`, each to the images that it was not trained on; 0: this detector alone."""
    num_feedback: int = 0
    """Of `normal_scores`, the last: those of good images that people judged after the training."""
    detector_version: str = dataclasses.field(default="", compare=False)
    """12 hex digits that name what decides its verdicts: weights, configuration, thresholds; empty before it is
    written."""

    @property
    def is_untrained_teacher(self) -> bool:
        return TeacherSource(self.teacher).is_untrained

    @property
    def origin(self) -> Origin:
        return Origin(self.category, self.detector_version, self.teacher)

    @property
    def is_approximate(self) -> bool:
        """Whether the rates of the thresholds hold only roughly.

        So it is where images that selected the model also set its thresholds, where other detectors scored them, or
        where people chose some of them.
        """
        return (
            self.calibration_folds > 0
            or self.num_feedback > 0
            or not set(self.validation_files).isdisjoint(self.calibration_files)
        )

    @property
    def guarantee(self) -> str:
        return "approximate" if self.is_approximate else "guaranteed"

    def threshold(self, false_alarm_rate: float) -> Threshold:
        """The threshold for that rate, never for a lower one than the normal images can vouch for.

        Of an older record the nearest that is stored, never a stricter one.
        """
        if self.normal_scores:
            return nearest_threshold(self.normal_scores, false_alarm_rate)
        return threshold_for(self.thresholds, false_alarm_rate)

    def part_threshold(self, false_alarm_rate: float) -> Threshold:
        """As `threshold`, of the worst score of a part; needs `part_thresholds`."""
        if self.normal_part_scores:
            return nearest_threshold(self.normal_part_scores, false_alarm_rate)
        return threshold_for(self.part_thresholds, false_alarm_rate)

    def guaranteed_rate(self, threshold: Threshold) -> float | None:
        """The rate that is proven for a threshold of this detector; None if it is approximate."""
        return None if self.is_approximate else threshold.false_alarm_rate

    def rates(self, false_alarm_rate: float) -> dict[str, float | None]:
        """What was asked for, what is to be expected and what is proven (None: nothing), for any document."""
        found = self.threshold(false_alarm_rate)
        return {
            "requested_rate": false_alarm_rate,
            "expected_rate": found.false_alarm_rate,
            "guaranteed_rate": self.guaranteed_rate(found),
        }

    def suspects(self, count: int = 10) -> list[tuple[str, float]]:
        """The good images that look least like the others, each with its score as a multiple of their median.

        Only images that the scoring detector did not see are compared; none in older records. Scores of several folds'
        detectors are ranked together, although their scales differ a little.
        """
        if not self.normal_scores:
            return []
        middle = statistics.median(self.normal_scores) or 1.0
        return [(name, score / middle) for name, score in self.most_anomalous(count)]

    def most_anomalous(self, count: int = 10) -> tuple[tuple[str, float], ...]:
        """The good images of `suspects`, each with its score."""
        ranked = sorted(zip(self.normal_scores, self.calibration_files, strict=bool(self.normal_scores)), reverse=True)
        return tuple((name, score) for score, name in ranked[:count])

    def with_normal_scores(
        self, files: Sequence[str], scores: Sequence[float], part_scores: Sequence[float], num_folds: int
    ) -> Self:
        """The same detector with thresholds from the scores of `files`, each by the fold that did not see it."""
        return dataclasses.replace(
            self,
            calibration_files=tuple(files),
            normal_scores=tuple(scores),
            normal_part_scores=tuple(part_scores),
            thresholds=calibrate(scores),
            part_thresholds=calibrate(part_scores) if part_scores else (),
            calibration_folds=num_folds,
        )

    def with_metrics(self, metrics: Mapping[str, float]) -> Self:
        """The same record with more figures; those that do not exist (NaN, as no mask was given) stay out."""
        known = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return dataclasses.replace(self, metrics={**self.metrics, **known})

    def to_json(self, weights_sha256: str) -> str:
        """Text of `detector.json` beside weights of the given hash."""
        document: dict[str, Any] = {
            "schema": SCHEMA_VERSION,
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "config": self.config.to_dict(),
            "thresholds": [threshold._asdict() for threshold in self.thresholds],
            "part_thresholds": [threshold._asdict() for threshold in self.part_thresholds],
            "scale": dataclasses.asdict(self.scale) if self.scale else None,
            "region": dataclasses.asdict(self.region) if self.region else None,
            "false_alarm_rates": self.guarantee,
            "preprocessing": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "resize": "bilinear, antialiased"},
            "weights": {"file": WEIGHTS_FILE, "sha256": weights_sha256},
            "versions": {"dskd": VERSION, "python": platform.python_version()}
            | {name: version(name) for name in _LIBRARIES},
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        document["detector_version"] = _version_of(document)
        return json.dumps(document, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_document(cls, values: Mapping[str, Any]) -> Self:
        """The record in a parsed `detector.json`, every field of its type and within its bounds.

        A field that is newer than the document takes its default. Raises ValueError where it does not fit this schema.
        """
        document = msgspec.convert(values, _Document)
        limits = (*document.thresholds, *document.part_thresholds)
        scores = (*document.normal_scores, *document.normal_part_scores)
        for number in (*document.metrics.values(), *(each.value for each in limits), *scores):
            if not math.isfinite(number):
                raise ValueError(f"a threshold, score or figure is not finite: {number}")
        config = document.config
        if "decoder_output" not in config.get("model", {}):  # of the time when every level ended in a ReLU
            config = {**config, "model": {**config.get("model", {}), "decoder_output": "relu"}}
        calibration_files = document.calibration_files
        if calibration_files is None:  # of the time when all held-out images served both
            config = {**config, "data": {**config.get("data", {}), "calibration_fraction": 0.0}}
            calibration_files = document.validation_files
        names = [field.name for field in dataclasses.fields(cls) if field.name != "detector_version"]
        given = {name: getattr(document, name) for name in names}
        return cls(
            **given
            | {
                "detector_version": _version_of(values),
                "config": RunConfig.from_dict(config),
                "thresholds": tuple(Threshold(*msgspec.structs.astuple(each)) for each in document.thresholds),
                "part_thresholds": tuple(
                    Threshold(*msgspec.structs.astuple(each)) for each in document.part_thresholds
                ),
                "calibration_files": calibration_files,
            }
        )


def _version_of(document: Mapping[str, Any]) -> str:
    """`DetectorRecord.detector_version` of a `detector.json`: test figures, added later, do not change it."""
    decisive = {name: document.get(name) for name in ("config", "thresholds", "part_thresholds", "scale", "region")}
    # The scores give the thresholds of all rates, not of the stored ones alone; older documents have none.
    decisive |= {name: known for name in ("normal_scores", "normal_part_scores") if (known := document.get(name))}
    decisive["weights"] = document["weights"]["sha256"]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


class _Threshold(msgspec.Struct):
    """`Threshold` as it stands in the file."""

    false_alarm_rate: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    value: float
    num_normals: Annotated[int, msgspec.Meta(ge=1)]


_Text = Annotated[str, msgspec.Meta(max_length=4096)]


class _Weights(msgspec.Struct):
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Document(msgspec.Struct, kw_only=True):
    """What a `detector.json` may hold; fields that are not named here are passed over."""

    category: _Text
    config: dict[str, dict[str, Any]]
    teacher: _Text
    teacher_sha256: _Text
    data_sha256: _Text
    validation_files: tuple[_Text, ...]
    calibration_files: tuple[_Text, ...] | None = None
    step: Annotated[int, msgspec.Meta(ge=1)] | None = None
    thresholds: Annotated[list[_Threshold], msgspec.Meta(min_length=1, max_length=1000)]
    metrics: dict[_Text, float]
    revision: _Text = ""
    num_validation_defects: Annotated[int, msgspec.Meta(ge=0)] = 0
    num_textures: Annotated[int, msgspec.Meta(ge=0)] = 0
    textures_sha256: _Text = ""
    selection: Selection = "val"
    scale: PixelScale | None = None
    region: RegionOfInterest | None = None
    part_thresholds: Annotated[list[_Threshold], msgspec.Meta(max_length=1000)] = []
    normal_scores: tuple[float, ...] = ()
    normal_part_scores: tuple[float, ...] = ()
    num_folds: Annotated[int, msgspec.Meta(ge=0)] = 0
    calibration_folds: Annotated[int, msgspec.Meta(ge=0)] = 0
    num_feedback: Annotated[int, msgspec.Meta(ge=0)] = 0
    weights: _Weights


def first_not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or infinity; None where all are finite."""
    return next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)


def write_detector(
    folder: Path, record: DetectorRecord, weights: Mapping[str, Tensor], preview: np.ndarray | None = None
) -> None:
    """Write a detector folder; `folder` appears complete, replacing an older detector of that name.

    Raises ValueError when `folder` exists and is no detector, which is never overwritten, and on weights that are not
    finite, OSError where it cannot be written.
    """
    check_replaceable(folder)
    if name := first_not_finite(weights):
        raise ValueError(f"the weights {name!r} are not finite: {folder} would judge nothing, and is not written.")
    with folder_in_making(folder) as temporary:
        # Written by Python: on a full disk the writers of safetensors and torch raise other errors than OSError.
        (temporary / WEIGHTS_FILE).write_bytes(
            safetensors.torch.save({name: value.contiguous() for name, value in weights.items()})
        )
        (temporary / RECORD_FILE).write_text(record.to_json(sha256_of(temporary / WEIGHTS_FILE)))
        if preview is not None:
            Image.fromarray(preview).save(temporary / PREVIEW_FILE)
        carry_feedback(folder, temporary)


def carry_feedback(old: Path, new: Path) -> None:
    """Copy what people judged from a detector folder to the one that takes its place."""
    if (old / FEEDBACK_FOLDER).is_dir():
        shutil.copytree(old / FEEDBACK_FOLDER, new / FEEDBACK_FOLDER, dirs_exist_ok=True)


def check_replaceable(folder: Path) -> None:
    """Raise ValueError when `folder` is something else or cannot be made: ask before the training, not after it."""
    if folder.exists() and not (folder / RECORD_FILE).is_file():
        raise ValueError(f"{folder} exists and is not a detector folder; choose another --out.")
    check_can_be_made(folder, "--out")


def rewrite_record(folder: Path, record: DetectorRecord) -> str:
    """Replace `detector.json` beside unchanged weights, atomically; returns the `detector_version` that it has now."""
    text = record.to_json(sha256_of(folder / WEIGHTS_FILE))
    with file_in_making(folder / RECORD_FILE) as partial:
        partial.write_text(text)
    return str(json.loads(text)["detector_version"])


def read_record(folder: Path) -> DetectorRecord:
    """The verified record of a detector folder; the weights' hash is checked too.

    Raises BrokenDetectorError naming the file that is missing, damaged, changed, or too new.
    """
    path = folder / RECORD_FILE
    for name in (RECORD_FILE, WEIGHTS_FILE):
        if (folder / name).is_symlink():
            raise BrokenDetectorError(f"{folder / name} is a symbolic link; a detector folder holds plain files.")
        if not (folder / name).is_file():
            raise BrokenDetectorError(f"{folder} is not a detector folder: it has no {name}.")
    try:
        content = path.read_bytes()
        # Python's own reader: names of files need not be text, which stricter ones refuse
        document = json.loads(content, parse_constant=_no_number)
        schema = document["schema"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenDetectorError(f"{path} is damaged ({error!r}); fetch the detector again.") from None
    if not isinstance(schema, int) or schema > SCHEMA_VERSION:
        raise BrokenDetectorError(
            f"{path} has schema {schema!r}, this dskd reads up to {SCHEMA_VERSION}; upgrade dskd."
        )
    try:
        record = DetectorRecord.from_document(document)
        expected = document["weights"]["sha256"]
    except (ValueError, TypeError) as error:
        raise BrokenDetectorError(f"{path} is damaged ({error}); fetch the detector again.") from None
    if (found := sha256_of(folder / WEIGHTS_FILE)) != expected:
        raise BrokenDetectorError(
            f"{folder / WEIGHTS_FILE} was changed or cut short: sha256 {found[:12]}…, expected {expected[:12]}…; "
            "fetch the detector again."
        )
    return record


def read_detector(folder: Path) -> tuple[DetectorRecord, dict[str, Tensor]]:
    """Record and weights of a verified detector folder, on the CPU.

    Raises BrokenDetectorError as `read_record`, and where the weights cannot be parsed.
    """
    record = read_record(folder)
    try:
        weights = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise BrokenDetectorError(f"{folder / WEIGHTS_FILE} cannot be read ({error}).") from None
    if name := first_not_finite(weights):
        raise BrokenDetectorError(
            f"{folder / WEIGHTS_FILE} holds values that are not finite, in {name!r}: it would call every image good."
        )
    return record, weights


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def threshold_for(thresholds: Sequence[Threshold], false_alarm_rate: float) -> Threshold:
    """The strictest stored threshold whose false-alarm rate is at least the given one; else the loosest."""
    loose_enough = [threshold for threshold in thresholds if threshold.false_alarm_rate >= false_alarm_rate]
    return loose_enough[-1] if loose_enough else thresholds[0]
