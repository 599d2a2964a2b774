"""A finished detector: load a folder, inspect images."""

import base64
import functools
import html
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy import ndimage
from torch import nn

from dskd import metrics
from dskd.calibration import Threshold, images_for, normal_floor, p_value
from dskd.checkpoint import BrokenDetectorError, DetectorRecord, Origin, read_detector
from dskd.config import Precision, TeacherSource
from dskd.data.files import UnreadableImageError
from dskd.data.geometry import Frame, Geometry, whole_frame
from dskd.data.images import Framed, in_threads
from dskd.data.memory import GivenImage, ImageLike, given_images, is_one_image
from dskd.data.parts import PartVerdict, judge_parts
from dskd.data.tiles import MAP_STRIDE
from dskd.draw.verdict import Panel, draw_verdict, to_webp
from dskd.evaluate import (
    AnomalyScores,
    Evaluation,
    SeenImage,
    evaluate_tiled,
    inspect_images,
    labelled,
    metric_state,
    score_canvas,
    test_samples,
)
from dskd.metrics import Scores
from dskd.model.amplification import AmplifiedTeacher, build_amplifier
from dskd.model.frozen import FrozenNetworks, check_precision
from dskd.model.network import build_students
from dskd.model.teacher import Teacher, build_teacher

PREDICT_CHUNK = 32
"""Images that `Detector.predict` scores together; the next as many are read meanwhile."""
_EIGHT_NEIGHBOURS = np.ones((3, 3), np.int8)


Verdict = Literal["good", "anomalous", "unreadable"]


class Region(NamedTuple):
    """Connected anomalous pixels: a box around them, and their outline. Of a prediction in pixels of its image."""

    left: int
    top: int
    right: int
    """Exclusive."""
    bottom: int
    """Exclusive."""
    peak: float
    """Highest map value inside."""
    contour: tuple[tuple[int, int], ...] = ()
    """Corners (x, y) of the outer border, clockwise from the top; they lie between pixels, as the box's edges do."""

    def to_dict(self) -> dict[str, Any]:
        """The region as plain values."""
        return self._asdict() | {"contour": [list(corner) for corner in self.contour]}


class Prediction(NamedTuple):
    """What the detector says of one image."""

    path: Path
    score: float
    threshold: float
    is_anomalous: bool
    regions: tuple[Region, ...]
    """Connected pixels above the threshold, the highest peak first, in pixels of the image as it is in the file."""
    image: npt.NDArray[np.uint8]
    """(H, W, 3), the whole image, reduced to at most 1024 pixels a side."""
    heat: npt.NDArray[np.float32]
    """(h, w), the map as it was scored, on the network's canvas."""
    num_clipped: int = 0
    """Values of the image beyond the scale of images of more than 8 bits: what is brighter there was not seen."""
    frame: Frame | None = None
    """Where the canvas lies in the image; None if the canvas is the image."""
    stride: int = 1
    """Pixels of the canvas per value of `heat`, along one side."""
    origin: Origin = Origin()
    """Which detector says so."""
    p_value: float | None = None
    """How rare such a score is among good images, in (0, 1]; None of detectors that keep no scores of theirs."""
    floor: float | None = None
    """Map value that few good images exceed (`normal_floor`), below which nothing is drawn; None as for `p_value`."""

    @property
    def width(self) -> int:
        """Of the image as it is in the file, upright."""
        return self.frame.width if self.frame else self.image.shape[1]

    @property
    def height(self) -> int:
        return self.frame.height if self.frame else self.image.shape[0]

    @property
    def map(self) -> npt.NDArray[np.float32]:
        """(height, width): a value for every pixel of the image as it is in the file, 0 where nothing is inspected.

        Computed at every access, since a large image's map is larger than the image.
        """
        return self.frame.to_image(self.heat, self.stride) if self.frame else self.heat

    def map_of(self, width: int, height: int) -> npt.NDArray[np.float32]:
        """The map (height, width) of a copy of the image of that size."""
        frame = self.frame or whole_frame(self.width, self.height)
        return frame.to_image(self.heat, self.stride, (width, height))

    @property
    def verdict(self) -> Verdict:
        return "anomalous" if self.is_anomalous else "good"

    def panel(
        self, note: str = "", *, is_defective: bool | None = None, truth: npt.NDArray[np.bool_] | None = None
    ) -> Panel:
        """What there is to draw; `is_defective` and the mask `truth` (h, w) of the whole image where they are known.

        `note` stands in a corner, by default the warning of an untrained teacher.
        """
        height, width = self.image.shape[:2]
        if not note and self.origin.teacher and TeacherSource(self.origin.teacher).is_untrained:
            note = UNTRAINED_TEACHER
        return Panel(
            self.image,
            self.map_of(width, height),
            [(region.left, region.top, region.right, region.bottom) for region in self.regions],
            (self.width, self.height),
            self.score,
            self.threshold,
            self.is_anomalous,
            self.floor,
            is_defective,
            truth,
            f"{self.path.parent.name}/{self.path.name}".removeprefix("/"),
            note,
        )

    def plot(
        self, note: str = "", *, is_defective: bool | None = None, truth: npt.NDArray[np.bool_] | None = None
    ) -> Image.Image:
        """A picture: below the verdict the image with its regions, and beside it the image below its map.

        Arguments as for `panel`.
        """
        return draw_verdict(self.panel(note, is_defective=is_defective, truth=truth))

    def __repr__(self) -> str:
        regions = f", {len(self.regions)} regions" if self.is_anomalous else ""
        return f"<{self.path}: {self.verdict}, score {self.score:.4g}, threshold {self.threshold:.4g}{regions}>"

    def _repr_html_(self) -> str:
        """The picture, which Jupyter shows."""
        picture = base64.b64encode(to_webp(self.plot())).decode()
        return f'<img alt="{html.escape(repr(self))}" src="data:image/webp;base64,{picture}">'

    def to_dict(self, *, overlay: str | None = None) -> dict[str, Any]:
        """The prediction as plain values: one line of `dskd predict`, one row of `tune/score.py`, one served answer.

        `overlay` is where its picture lies. The boxes and outlines in `regions`, none where the image is good, are in
        pixels of the image as it is in the file, whose `width` and `height` are given.
        """
        return _prediction_fields(self.origin, str(self.path), self.threshold, self.verdict) | {
            "score": self.score,
            "relative_score": self.score / self.threshold if self.threshold > 0 else None,
            "p_value": self.p_value,
            "is_anomalous": self.is_anomalous,
            "regions": [region.to_dict() for region in self.regions] if self.is_anomalous else [],
            "width": self.width,
            "height": self.height,
            "overlay": overlay,
            "num_clipped": self.num_clipped,
        }


class Unreadable(NamedTuple):
    """An image without a verdict."""

    path: Path
    threshold: float
    error: str
    """One line that names the file and says why."""
    origin: Origin = Origin()
    """Which detector could not see it."""

    @property
    def verdict(self) -> Verdict:
        return "unreadable"

    def to_dict(self) -> dict[str, Any]:
        """As `Prediction.to_dict`: `error` says why, score and regions are None."""
        return unreadable_to_dict(self.origin, str(self.path), self.threshold, self.error)


def unreadable_to_dict(origin: Origin, image: str, threshold: float, error: str) -> dict[str, Any]:
    """`Prediction.to_dict` of an image that cannot be read: `error` says why, score and regions are None."""
    return _prediction_fields(origin, image, threshold, "unreadable") | {"error": error}


def _prediction_fields(origin: Origin, image: str, threshold: float, verdict: Verdict) -> dict[str, Any]:
    """All fields of a prediction, in their order; what the image alone can tell is None."""
    return {
        "image": image,
        "verdict": verdict,
        "score": None,
        "threshold": threshold,
        "relative_score": None,
        "p_value": None,
        "is_anomalous": None,
        "regions": None,
        "width": None,
        "height": None,
        "overlay": None,
        "num_clipped": None,
        **origin._asdict(),
        "error": None,
    }


class Detector:
    """A frozen teacher and the students that imitate it on one category."""

    def __init__(
        self,
        record: DetectorRecord,
        teacher: Teacher,
        students: nn.Module,
        device: torch.device,
        precision: Precision = "float32",
    ) -> None:
        check_precision(precision, device)
        self.record = record
        self._precision = precision
        self._teacher = teacher
        self._students = students
        self._device = device
        self.geometry = Geometry.of(record.config.data, record.region, record.config.model.tile_alignment)

    @classmethod
    def load(cls, folder: "str | os.PathLike[str]", device: str = "cpu", precision: Precision = "float32") -> Self:
        """Read and verify a detector folder; needs neither the network nor the training images.

        On a GPU a lower `precision` than float32 is several times as fast, and moves scores a little. Raises
        BrokenDetectorError where the folder is damaged, changed, or too new, ValueError for a precision that the
        device does not have.
        """
        folder = Path(folder)
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
        return cls(record, teacher.to(place), students.to(place).eval(), place, precision)

    @property
    def teacher(self) -> Teacher:
        return self._teacher

    @property
    def students(self) -> nn.Module:
        return self._students

    def score_images(self, images: npt.NDArray[np.uint8], inside: npt.NDArray[np.bool_] | None = None) -> AnomalyScores:
        """Anomaly maps and scores of the network's inputs (N, H, W, 3), of the size as in training.

        The maps are 0 where `inside` (N, H, W) is false. With tiles these are tiles and not whole images.
        """
        return inspect_images(self.frozen, images, self.record.config, self._device, inside)

    @functools.cached_property
    def frozen(self) -> FrozenNetworks:
        """Teacher and students as they inspect: equal to those of the detector up to rounding, and faster."""
        side = 2 * self.record.config.model.image_multiple[0]
        return FrozenNetworks.folded(self._teacher, self._students, side, self._precision)

    def threshold(self, false_alarm_rate: float) -> Threshold:
        """The threshold for the wanted share of false alarms; for a higher one if the images vouch for no lower."""
        return self.record.threshold(false_alarm_rate)

    def part_threshold(self, false_alarm_rate: float) -> Threshold:
        """As `threshold`, of the worst score of a part that several images show.

        Raises ValueError if the detector was not trained with `group_by`.
        """
        if not self.record.part_thresholds:
            raise ValueError(
                "this detector has no thresholds of parts; train it with --group-by PATTERN, which finds the name of a "
                "part in an image's path."
            )
        return self.record.part_threshold(false_alarm_rate)

    def judge_parts(
        self,
        images: Iterable[tuple[str, float | None]],
        false_alarm_rate: float = 0.01,
        *,
        group_by: str = "",
        threshold: float | None = None,
    ) -> list[PartVerdict]:
        """A verdict per part from its images' paths and scores, None for one that cannot be read: the worst decides.

        `group_by` finds a part's name in a path, by default as in training; `threshold` is taken as it is where given.
        Raises ValueError as `part_threshold`.
        """
        limit = self.part_threshold(false_alarm_rate).value if threshold is None else threshold
        return judge_parts(images, group_by or self.record.config.data.group_by, limit)

    @overload
    def predict(  # type: ignore[overload-overlap]  # to a checker a path as text is text in a row, too
        self, images: ImageLike, threshold: float | None = None, *, false_alarm_rate: float = 0.01
    ) -> Prediction: ...

    @overload
    def predict(
        self, images: Iterable[ImageLike], threshold: float | None = None, *, false_alarm_rate: float = 0.01
    ) -> Iterator[Prediction]: ...

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        threshold: float | None = None,
        *,
        false_alarm_rate: float = 0.01,
    ) -> Prediction | Iterator[Prediction]:
        """The verdict on one image, or an iterator over the verdicts on several, in their order.

        An image is a path, a PIL image, a numpy array (H, W, 3) or a torch tensor (3, H, W); several are a list or a
        generator of them, or one array or tensor of four dimensions. They are seen in batches, a bounded number of
        them in memory at a time. The threshold is the stored one for `false_alarm_rate` in (0, 1), unless given.

        Raises ValueError or TypeError, in a sentence, on what is no image, naming the file that cannot be read, on an
        impossible rate, and on a threshold that is no finite number.
        """
        seen = self._predicted(self.inspect(images, threshold, false_alarm_rate=false_alarm_rate))
        return next(seen) if is_one_image(images) else seen

    def _predicted(self, seen: Iterator[Prediction | Unreadable]) -> Iterator[Prediction]:
        for found in seen:
            if isinstance(found, Unreadable):
                raise UnreadableImageError(found.error)
            yield found

    def inspect(
        self,
        images: ImageLike | Iterable[ImageLike],
        threshold: float | None = None,
        *,
        false_alarm_rate: float = 0.01,
    ) -> Iterator[Prediction | Unreadable]:
        """As `predict` of several, which goes on after an image that cannot be read or judged, and says why."""
        limit = self._limit(false_alarm_rate) if threshold is None else threshold
        check_threshold(limit)
        return self._inspected(given_images(images), limit)

    def _limit(self, false_alarm_rate: object) -> float:
        if not isinstance(false_alarm_rate, int | float) or not 0 < false_alarm_rate < 1:  # neither True nor False is
            raise ValueError(f"false_alarm_rate must lie in (0, 1), got {false_alarm_rate!r}; 0.05 is one in twenty.")
        return self.threshold(false_alarm_rate).value

    def _inspected(self, images: Iterator[GivenImage], threshold: float) -> Iterator[Prediction | Unreadable]:
        # Of tiled images one is large enough to be alone in memory.
        step = 1 if self.geometry.tile else PREDICT_CHUNK
        chunks = iter(lambda: list(itertools.islice(images, step)), [])
        for chunk, loaded in self._read_ahead(chunks):
            seen = self.predict_framed(
                [image.path for image, each in zip(chunk, loaded, strict=True) if not isinstance(each, str)],
                [each for each in loaded if not isinstance(each, str)],
                threshold,
            )
            for image, each in zip(chunk, loaded, strict=True):
                if isinstance(each, str):
                    yield Unreadable(image.path, threshold, each, self.record.origin)
                else:
                    yield next(seen)

    def _read_ahead(
        self, chunks: Iterator[list[GivenImage]]
    ) -> Iterator[tuple[list[GivenImage], Sequence[Framed | str]]]:
        """Each chunk with its images, which are read while the chunk before it is scored."""
        chunk, following = next(chunks, None), next(chunks, None)
        if chunk is not None and len(chunk) == 1 and following is None:  # threads would cost more than they save
            yield chunk, [self._framed(chunk[0])]
            return
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(self._read, chunk or ())
            while chunk is not None:
                loaded = reading.result()
                if following is not None:
                    reading = pool.submit(self._read, following)
                yield chunk, loaded
                chunk, following = following, next(chunks, None)

    def _read(self, chunk: Sequence[GivenImage]) -> Sequence[Framed | str]:
        return in_threads(self._framed, chunk, [image.path for image in chunk])

    def load_image(self, path: Path) -> Framed | str:
        """An image as `predict_framed` takes it, or one line that says why it cannot be read."""
        return self._framed(GivenImage(path))

    def _framed(self, image: GivenImage) -> Framed | str:
        try:
            return image.framed(self.geometry, self.record.scale)
        except ValueError as error:
            return str(error)

    def predict_framed(
        self, paths: Sequence[Path], images: Sequence[Framed], threshold: float
    ) -> Iterator[Prediction | Unreadable]:
        """Verdicts on images that `load_image` read from `paths`; one whose score or map is not finite has none."""
        return predictions(
            paths,
            images,
            *self.score_framed(images),
            threshold,
            self.geometry,
            self.record.origin,
            self.record.normal_scores,
        )

    def score_framed(self, images: Sequence[Framed]) -> tuple[Sequence[npt.NDArray[np.float32]], Sequence[float]]:
        """Maps and scores of whole images, by tiles if the detector has tiles."""
        if not images:
            return (), ()
        if self.geometry.tile:
            parts = [
                score_canvas(
                    self.frozen,
                    image.rgb,
                    image.frame,
                    self.record.config,
                    self.geometry,
                    self._device,
                )
                for image in images
            ]
            return [heat for heat, _ in parts], [score for _, score in parts]
        seen = self.score_images(np.stack([image.rgb for image in images]), inside_of(images, self.geometry))
        return list(seen.maps), seen.scores.tolist()

    def __repr__(self) -> str:
        record = self.record
        return f"<Detector of {record.category}, version {record.detector_version}, teacher {record.teacher}>"

    def _repr_html_(self) -> str:
        """A table of what it is and how good it was, which Jupyter shows."""
        record = self.record
        rows = {
            "category": record.category,
            "version": record.detector_version,
            "backbone": f"{record.config.model.backbone}, weights {record.teacher}",
            "input": " × ".join(map(str, record.config.data.input_size)),
            **{f"threshold at {limit.false_alarm_rate:.1%}": f"{limit.value:.4g}" for limit in record.thresholds},
            **{name: f"{value:.4f}" for name, value in record.metrics.items() if "auroc" in name or "aupro" in name},
        }
        cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows.items())
        return f"<table>{''.join(cells)}</table>"

    def evaluate(
        self,
        data: "str | os.PathLike[str]",
        category: str | None = None,
        on_note: Callable[[str], object] = lambda note: None,
    ) -> Scores:
        """All metrics on the labelled test split of a category; notes and errors as `labelled_test_split`."""
        return self.evaluation(data, category, on_note).scores

    def evaluation(
        self,
        data: "str | os.PathLike[str]",
        category: str | None = None,
        on_note: Callable[[str], object] = lambda note: None,
    ) -> Evaluation:
        """As `evaluate`, with the score of each test image, which tells what every threshold would do.

        The category is the detector's own unless given.
        """
        layout = self.record.config.data.layout
        samples = test_samples(Path(data), category or self.record.category, on_note, layout)
        if self.geometry.tile:
            return evaluate_tiled(
                self.frozen,
                samples,
                self.record.config,
                self.geometry,
                self._device,
                self.record.scale,
                on_note,
            )
        truth = labelled(samples, self.geometry, self.record.scale, on_note)
        seen = self.score_images(truth.images, truth.inside)
        found = zip(samples, truth.labels.tolist(), seen.scores.tolist(), strict=True)
        images = (SeenImage(each.path, each.defect, is_defective, score) for each, is_defective, score in found)
        state = metric_state(seen, truth)
        return Evaluation(metrics.compute(state), tuple(images), state)


def inside_of(images: Sequence[Framed], geometry: Geometry) -> npt.NDArray[np.bool_] | None:
    """Which pixels (N, H, W) of the images' canvases are scored; None if all are."""
    return np.stack([geometry.inside(image.frame) for image in images]) if geometry.is_masked else None


def predictions(
    paths: Sequence[Path],
    images: Sequence[Framed],
    maps: Sequence[npt.NDArray[np.float32]],
    scores: Sequence[float],
    threshold: float,
    geometry: Geometry,
    origin: Origin,
    normal_scores: Sequence[float] = (),
) -> Iterator[Prediction | Unreadable]:
    """The verdicts that maps and scores of images give; an image whose score or map is not finite has none.

    `normal_scores` are those of good images, which give the p-values and what is worth drawing.
    """
    stride = MAP_STRIDE if geometry.tile else 1
    floor = normal_floor(normal_scores) if normal_scores else None
    for path, image, heat, score in zip(paths, images, maps, scores, strict=True):
        if not (math.isfinite(score) and np.isfinite(heat).all()):
            yield Unreadable(path, threshold, f"{path} gets no finite score, so that no verdict can be given.", origin)
            continue
        regions = tuple(in_image(region, image.frame, stride) for region in find_regions(heat, threshold))
        yield Prediction(
            path,
            score,
            threshold,
            score > threshold,
            regions,
            image.picture,
            heat,
            image.num_clipped,
            image.frame,
            stride,
            origin,
            p_value=p_value(normal_scores, score) if normal_scores else None,
            floor=floor,
        )


def find_regions(heat: npt.NDArray[np.float32], threshold: float) -> tuple[Region, ...]:
    """Boxes and outlines of the 8-connected pixels of a map (H, W) above `threshold`, the highest peak first."""
    labels, count = ndimage.label(heat > threshold, _EIGHT_NEIGHBOURS)
    peaks = ndimage.maximum(heat, labels, range(1, count + 1)) if count else []
    regions = []
    for number, ((rows, columns), peak) in enumerate(zip(ndimage.find_objects(labels), peaks, strict=True), 1):
        corners = outline(labels[rows, columns] == number)
        contour = tuple((columns.start + x, rows.start + y) for x, y in corners)
        regions.append(Region(columns.start, rows.start, columns.stop, rows.stop, float(peak), contour))
    return tuple(sorted(regions, key=lambda region: -region.peak))


def outline(mask: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Corners (x, y) of the outer border of the one 8-connected region of a mask (H, W), clockwise from the top left.

    Walks along the edges of pixels with the region on the right. Where two of its pixels touch at a corner, it turns
    left, so that both lie within one border.
    """
    padded = np.pad(mask, 1)
    top, left = divmod(int(np.flatnonzero(mask)[0]), mask.shape[1])
    start = (top, left)
    y, x = start
    # right, down, left, up: the step, and where the pixels ahead on the left and on the right lie
    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
    lefts, rights = ((-1, 0), (0, 0), (0, -1), (-1, -1)), ((0, 0), (0, -1), (-1, -1), (-1, 0))
    direction, corners = 0, [(left, top)]
    while True:
        y, x = y + steps[direction][0], x + steps[direction][1]
        if padded[y + 1 + lefts[direction][0], x + 1 + lefts[direction][1]]:
            turned = (direction - 1) % 4
        elif padded[y + 1 + rights[direction][0], x + 1 + rights[direction][1]]:
            turned = direction
        else:
            turned = (direction + 1) % 4
        if (y, x) == start and turned == 0:
            return corners
        if turned != direction:
            corners.append((x, y))
        direction = turned


def in_image(region: Region, frame: Frame, stride: int) -> Region:
    """A region of a map of one value per `stride` pixels of a canvas, in pixels of the image."""

    def corner(x: float, y: float) -> tuple[int, int]:
        return round(frame.column(x * stride)), round(frame.row(y * stride))

    contour = dict.fromkeys(corner(x, y) for x, y in region.contour)  # corners of a fine map may fall together
    return Region(
        math.floor(frame.column(region.left * stride)),
        math.floor(frame.row(region.top * stride)),
        math.ceil(frame.column(region.right * stride)),
        math.ceil(frame.row(region.bottom * stride)),
        region.peak,
        tuple(contour),
    )


UNTRAINED_TEACHER = "UNTRAINED TEACHER: fit to see the machinery, not for inspection"
APPROXIMATE = "approximate: the images behind it also selected the model"
JUDGED_LATER = "approximate: people chose some of the images behind it"
OUT_OF_FOLD = "expected, not proven: each image behind it was scored by a detector that did not see it"


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
            f" ({found.num_normals} normal images cannot vouch for {false_alarm_rate:.1%}: "
            f"it takes {images_for(false_alarm_rate)})"
        )
    return found.value, note + basis_of(detector.record)


def basis_of(record: DetectorRecord) -> str:
    """In brackets why a rate of this detector is not proven; empty if it is."""
    if record.num_feedback:
        return f" ({JUDGED_LATER})"
    if record.calibration_folds:
        return f" ({OUT_OF_FOLD})"
    return f" ({APPROXIMATE})" if record.is_approximate else ""


def rates_of(record: DetectorRecord, false_alarm_rate: float, threshold: float | None) -> dict[str, float | None]:
    """What was asked for, what is to be expected and what is proven; None where a `threshold` was given instead."""
    if threshold is not None:
        return {"requested_rate": None, "expected_rate": None, "guaranteed_rate": None}
    return record.rates(false_alarm_rate)


def check_threshold(threshold: float) -> None:
    """Raise ValueError on NaN, above which no score lies, and on infinite thresholds, which end all inspection."""
    if not math.isfinite(threshold):
        raise ValueError(f"--threshold must be a finite number, got {threshold}.")
