"""A finished detector: load a folder, inspect images."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import nn

from dskd.calibration import Threshold
from dskd.checkpoint import BrokenDetectorError, DetectorRecord, read_detector, threshold_for
from dskd.data.files import UnreadableImageError
from dskd.data.images import Pixels, in_threads, load_pixels
from dskd.evaluate import AnomalyScores, compute_metrics, labelled_test_split, score_images
from dskd.metrics import Scores
from dskd.model.amplification import AmplifiedTeacher, build_amplifier
from dskd.model.network import build_students
from dskd.model.teacher import Teacher, build_teacher

PREDICT_CHUNK = 64
"""Images that `Detector.predict` holds in memory at a time."""
_EIGHT_NEIGHBOURS = np.ones((3, 3), np.int8)


Verdict = Literal["good", "anomalous", "unreadable"]


class Region(NamedTuple):
    """A box around connected anomalous pixels, in pixels of the resized image."""

    left: int
    top: int
    right: int
    """Exclusive."""
    bottom: int
    """Exclusive."""
    peak: float
    """Highest map value inside."""


class Prediction(NamedTuple):
    """What the detector says of one image."""

    path: Path
    score: float
    threshold: float
    is_anomalous: bool
    regions: tuple[Region, ...]
    """Connected pixels above the threshold, the highest peak first."""
    image: npt.NDArray[np.uint8]
    """(S, S, 3)"""
    map: npt.NDArray[np.float32]
    """(S, S)"""
    num_clipped: int = 0
    """Values of the image beyond the scale of images of more than 8 bits: what is brighter there was not seen."""

    @property
    def verdict(self) -> Verdict:
        return "anomalous" if self.is_anomalous else "good"

    def to_dict(self, record: DetectorRecord, *, overlay: str | None = None) -> dict[str, Any]:
        """The prediction as plain values: one line of `dskd predict`, one row of `tune/score.py`, one served answer.

        `overlay` is where its picture lies. The boxes in `regions`, none where the image is good, are in pixels of
        the square of side `map_size` that the image was resized to.
        """
        return _prediction_fields(record, str(self.path), self.threshold, self.verdict) | {
            "score": self.score,
            "is_anomalous": self.is_anomalous,
            "regions": [region._asdict() for region in self.regions] if self.is_anomalous else [],
            "overlay": overlay,
            "num_clipped": self.num_clipped,
        }


class Unreadable(NamedTuple):
    """An image without a verdict."""

    path: Path
    threshold: float
    error: str
    """One line that names the file and says why."""

    @property
    def verdict(self) -> Verdict:
        return "unreadable"

    def to_dict(self, record: DetectorRecord) -> dict[str, Any]:
        """As `Prediction.to_dict`: `error` says why, score and regions are None."""
        return unreadable_to_dict(record, str(self.path), self.threshold, self.error)


def unreadable_to_dict(record: DetectorRecord, image: str, threshold: float, error: str) -> dict[str, Any]:
    """`Prediction.to_dict` of an image that cannot be read: `error` says why, score and regions are None."""
    return _prediction_fields(record, image, threshold, "unreadable") | {"error": error}


def _prediction_fields(record: DetectorRecord, image: str, threshold: float, verdict: Verdict) -> dict[str, Any]:
    """All fields of a prediction, in their order; what the image alone can tell is None."""
    return {
        "image": image,
        "verdict": verdict,
        "score": None,
        "threshold": threshold,
        "is_anomalous": None,
        "regions": None,
        "map_size": record.config.data.image_size,
        "overlay": None,
        "num_clipped": None,
        "category": record.category,
        "teacher": record.teacher,
        "error": None,
    }


class Detector:
    """A frozen teacher and the students that imitate it on one category."""

    def __init__(self, record: DetectorRecord, teacher: Teacher, students: nn.Module, device: torch.device) -> None:
        self.record = record
        self._teacher = teacher
        self._students = students
        self._device = device

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Self:
        """Read and verify a detector folder; needs neither the network nor the training images.

        Raises BrokenDetectorError where the folder is damaged, changed, or too new.
        """
        record, weights = read_detector(folder)
        model = record.config.model
        teacher = build_teacher(model.backbone, model.levels, "random")
        if "teacher.input_scale" not in weights:  # of the time when every backbone saw ImageNet's normalisation
            teacher = Teacher(teacher.features)
        if record.config.amplification.amplification:
            teacher = AmplifiedTeacher(teacher, build_amplifier(teacher, record.config.amplification.memory_size, 0))
        students = build_students(model, teacher, seed=0)
        for prefix, module in (("teacher.", teacher), ("students.", students)):
            part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            try:
                module.load_state_dict(part)
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].strip()
                raise BrokenDetectorError(f"the weights in {folder} do not fit its configuration: {reason}") from None
        place = torch.device(device)
        return cls(record, teacher.to(place), students.to(place).eval(), place)

    @property
    def teacher(self) -> Teacher:
        return self._teacher

    @property
    def students(self) -> nn.Module:
        return self._students

    def score_images(self, images: npt.NDArray[np.uint8]) -> AnomalyScores:
        """Anomaly maps and scores of RGB images (N, S, S, 3), S as in training."""
        return score_images(self._teacher, self._students, images, self.record.config, self._device)

    def threshold(self, false_alarm_rate: float) -> Threshold:
        """The stored threshold nearest to the wanted share of false alarms, never a stricter one."""
        return threshold_for(self.record.thresholds, false_alarm_rate)

    def predict(self, paths: Sequence[Path], threshold: float) -> Iterator[Prediction]:
        """Verdicts in the order of `paths`, a bounded number of images in memory at a time.

        Raises ValueError naming the file that is not a readable image, and on a threshold that is no finite number.
        """
        for found in self.inspect(paths, threshold):
            if isinstance(found, Unreadable):
                raise UnreadableImageError(found.error)
            yield found

    def inspect(self, paths: Sequence[Path], threshold: float) -> Iterator[Prediction | Unreadable]:
        """As `predict`, which goes on after an image that cannot be read or judged, and says why there is no verdict.

        Raises ValueError on a threshold that is no finite number.
        """
        check_threshold(threshold)
        size, scale = self.record.config.data.image_size, self.record.scale

        def load(path: Path) -> Pixels | str:
            try:
                return load_pixels(path, size, scale)
            except ValueError as error:
                return str(error)

        for start in range(0, len(paths), PREDICT_CHUNK):
            chunk = paths[start : start + PREDICT_CHUNK]
            loaded = in_threads(load, chunk)
            sound = [index for index, each in enumerate(loaded) if not isinstance(each, str)]
            pixels = [each for each in loaded if not isinstance(each, str)]
            seen = self.predict_pixels(
                [chunk[index] for index in sound],
                np.stack([each.rgb for each in pixels]) if pixels else np.empty((0, size, size, 3), np.uint8),
                threshold,
                [each.num_clipped for each in pixels],
            )
            for path, each in zip(chunk, loaded, strict=True):
                yield Unreadable(path, threshold, each) if isinstance(each, str) else next(seen)

    def predict_pixels(
        self,
        paths: Sequence[Path],
        images: npt.NDArray[np.uint8],
        threshold: float,
        num_clipped: Sequence[int] | None = None,
    ) -> Iterator[Prediction | Unreadable]:
        """Verdicts on RGB images (N, S, S, 3), S as in training, that were read from `paths`.

        An image whose score or map is not finite has none. `num_clipped` are the counts of clipped values.
        """
        if not len(images):
            return
        seen = self.score_images(images)
        counts = num_clipped or [0] * len(images)
        found = zip(paths, images, seen.maps, seen.scores.tolist(), counts, strict=True)
        for path, image, heat, score, clipped in found:
            if not (math.isfinite(score) and np.isfinite(heat).all()):
                yield Unreadable(path, threshold, f"{path} gets no finite score, so that no verdict can be given.")
                continue
            regions = find_regions(heat, threshold)
            yield Prediction(path, score, threshold, score > threshold, regions, image, heat, clipped)

    def evaluate(self, data: Path, category: str, on_note: Callable[[str], object] = lambda note: None) -> Scores:
        """All metrics on the labelled test split of a category; notes and errors as `labelled_test_split`."""
        size = self.record.config.data.image_size
        truth = labelled_test_split(data, category, size, self.record.scale, on_note, self.record.config.data.layout)
        return compute_metrics(self.score_images(truth.images), truth)


def find_regions(heat: npt.NDArray[np.float32], threshold: float) -> tuple[Region, ...]:
    """Boxes of the 8-connected pixels of a map (S, S) above `threshold`, the highest peak first."""
    labels, count = ndimage.label(heat > threshold, _EIGHT_NEIGHBOURS)
    peaks = ndimage.maximum(heat, labels, range(1, count + 1)) if count else []
    regions = [
        Region(columns.start, rows.start, columns.stop, rows.stop, float(peak))
        for (rows, columns), peak in zip(ndimage.find_objects(labels), peaks, strict=True)
    ]
    return tuple(sorted(regions, key=lambda region: -region.peak))


UNTRAINED_TEACHER = "UNTRAINED TEACHER: fit to see the machinery, not for inspection"
APPROXIMATE = "approximate: the images behind it also selected the model"


def chosen_limit(detector: "Detector", false_alarm_rate: float, threshold: float | None) -> tuple[float, str]:
    """The threshold of the score, and a note on where it comes from; `threshold` is taken as it is where given.

    Raises ValueError on a rate outside (0, 1) and on a threshold that is no finite number.
    """
    if threshold is not None:
        check_threshold(threshold)
        return threshold, f"threshold {threshold:g} as given"
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"--false-alarm-rate must lie in (0, 1), got {false_alarm_rate}.")
    found = detector.threshold(false_alarm_rate)
    note = f"threshold {found.value:.4g} for at most {found.false_alarm_rate:.1%} false alarms"
    if found.false_alarm_rate > false_alarm_rate:
        note += (
            f" ({found.num_normals} held-out normals cannot guarantee {false_alarm_rate:.1%}: "
            f"it takes {round(1 / false_alarm_rate) - 1})"
        )
    if detector.record.is_approximate:
        note += f" ({APPROXIMATE})"
    return found.value, note


def check_threshold(threshold: float) -> None:
    """Raise ValueError on NaN, above which no score lies, and on infinite thresholds, which end all inspection."""
    if not math.isfinite(threshold):
        raise ValueError(f"--threshold must be a finite number, got {threshold}.")
