"""Export a detector as one ONNX graph, from RGB bytes to anomaly maps and scores, and check that both agree."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage
from torch import Tensor, nn

from dskd.anomaly import BLUR_REFERENCE, anomaly_maps, image_scores
from dskd.atomic import check_can_be_made, file_in_making
from dskd.checkpoint import Origin
from dskd.config import VERSION, RunConfig
from dskd.data.depth import PixelScale
from dskd.data.files import UnreadableImageError
from dskd.data.geometry import NEUTRAL, Geometry, RegionOfInterest, whole_frame
from dskd.data.images import Framed, load_framed
from dskd.data.tiles import MAP_STRIDE, stitched_map, tiled_score
from dskd.detector import Detector, Prediction, Unreadable, inside_of, predictions
from dskd.model.distances import discrepancies
from dskd.model.teacher import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    import onnx

SCHEMA_VERSION = 1
INPUT = "images"
INSIDE = "inside"
"""Second input of detectors with a polygon or mask as region of interest, or bars: which pixels are scored."""
OUTPUTS = ("maps", "scores")
TILE_OUTPUTS = ("maps",)
"""Of a detector with tiles: an image's score comes from the stitched map of all its tiles."""
OPSETS = range(18, 26)
"""Opsets that torch's exporter writes, or its converter reaches, without falling back to another opset."""
DEFAULT_OPSET = 18
"""The lowest of `OPSETS`: more runtimes can read an older opset."""
TOLERANCE = 1e-4
"""Largest allowed difference between detector and graph, relative to the image's highest map value or its score."""
BATCH_SIZES = (1, 2, 5)
NUM_GENERATED = 10

_SHORTEST = 1e-8
"""A shorter vector has no direction, as in torch's cosine_similarity."""
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_PREFIX = "dskd."


class ParityError(RuntimeError):
    """The exported graph and the detector give different results; the message says by how much."""


class Verdicts(NamedTuple):
    """The verdicts of detector and graph at one stored threshold."""

    false_alarm_rate: float
    threshold: float
    num_anomalous: int
    num_undecided: int
    """Images whose score equals the threshold up to the tolerance: rounding decides, so they are not compared."""
    num_differing: int = 0
    """Images of which the graph says something else; never in float32, where it would not be written."""


class Parity(NamedTuple):
    """How much the exported graph differs from the detector; errors are relative, as in `TOLERANCE`."""

    num_images: int
    batch_sizes: tuple[int, ...]
    map_error: float
    score_error: float
    verdicts: tuple[Verdicts, ...]


def distances_by_sums(teacher: Float[Tensor, "b c h w"], student: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """As `position_distances`: sums over channels as convolutions with ones, which runtimes do many times faster."""
    ones = torch.ones(1, teacher.shape[1], 1, 1)
    dots, *squares = (F.conv2d(each, ones) for each in (teacher * student, teacher * teacher, student * student))
    lengths = [each.sqrt().clamp_min(_SHORTEST) for each in squares]
    return (1 - dots / (lengths[0] * lengths[1]))[:, 0]


class DetectorGraph(nn.Module):
    """The whole computation of a detector as one module; any teacher that maps images to a pyramid can be used.

    The images are bytes as a camera or decoder gives them, channels last. The normalisation is inside, so
    no caller can get the range, the mean or the order of the axes wrong, and a quarter of the memory of
    float32 is moved. Resizing stays outside: Pillow's antialiased filter has no exact ONNX operator.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.teacher, self.students = detector.frozen.teacher, detector.frozen.students
        self.config = detector.record.config
        self.geometry = detector.geometry
        mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(
        self, images: UInt8[Tensor, "b height width 3"], inside: Bool[Tensor, "b height width"] | None = None
    ) -> tuple[Float[Tensor, "b h w"], Float[Tensor, " b"]] | Float[Tensor, "b h w"]:
        """Anomaly maps and image scores of RGB images of the size as in training; of tiles the maps, not blurred."""
        # As `normalize`, in the order in which a runtime has the least to do: bytes are moved, and not floats.
        pixels = images.permute(0, 3, 1, 2).contiguous().float() * self.scale + self.shift
        targets = self.teacher(pixels)
        outputs = self.students(pixels, targets)
        found = discrepancies(targets, outputs.encoder, outputs.decoder, distances_by_sums)
        score = self.config.score
        if self.geometry.tile:
            sharp = dataclasses.replace(score, blur_sigma=0.0)
            return anomaly_maps(found, sharp, self.geometry.tile // MAP_STRIDE)
        maps = anomaly_maps(found, score, (self.geometry.height, self.geometry.width))
        if inside is not None:
            maps = maps * inside
        return maps, image_scores(maps, score.score_top_fraction)


class OnnxDetector:
    """An exported graph in onnxruntime, with all that surrounds it: reading images, tiles, boxes in their pixels.

    The graph's metadata tell what it takes; a program in another language does the same with them.
    """

    def __init__(self, model: bytes) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        known = self._session.get_modelmeta().custom_metadata_map
        values = {name: json.loads(known[_PREFIX + name]) for name in ("config", "region", "scale")}
        self._origin = Origin(*(known.get(_PREFIX + name, "") for name in Origin._fields))
        self._config = RunConfig.from_dict(values["config"])
        self._normal_scores: list[float] = json.loads(known.get(f"{_PREFIX}normal_scores", "[]"))
        region = msgspec.convert(values["region"], RegionOfInterest | None)
        self.geometry = Geometry.of(self._config.data, region, self._config.model.tile_alignment)
        self.scale = msgspec.convert(values["scale"], PixelScale | None)

    def predict(self, paths: Sequence[Path], threshold: float) -> Iterator[Prediction | Unreadable]:
        """Verdicts as `Detector.predict`; errors too."""
        for path in paths:
            framed = [load_framed(path, self.geometry, self.scale)]
            seen = self.score_framed(framed)
            yield from predictions([path], framed, *seen, threshold, self.geometry, self._origin, self._normal_scores)

    def score_framed(
        self, images: Sequence[Framed], batch_size: int = 1
    ) -> tuple[Sequence[npt.NDArray[np.float32]], Sequence[float]]:
        """Maps and scores of whole images, computed in full batches: the last is filled up with the first images."""
        if not self.geometry.tile:
            given = {INPUT: np.stack([image.rgb for image in images])}
            inside = inside_of(images, self.geometry)
            maps, scores = self._run(given | ({} if inside is None else {INSIDE: inside}), OUTPUTS, batch_size)
            return list(maps), scores.tolist()
        score, tile = self._config.score, self.geometry.tile
        sigma = score.blur_sigma * (tile // MAP_STRIDE) / BLUR_REFERENCE

        def score_tiles(tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            (found,) = self._run({INPUT: tiles}, TILE_OUTPUTS, batch_size)
            return found

        heats = []
        for image in images:
            inside = self.geometry.inside(image.frame, MAP_STRIDE)
            heats.append(stitched_map(image.rgb, inside, self.geometry, sigma, score_tiles, batch_size))
        return heats, [tiled_score(heat, self.geometry, score.score_top_fraction) for heat in heats]

    def _run(
        self, inputs: dict[str, npt.NDArray[Any]], outputs: Sequence[str], batch_size: int
    ) -> list[npt.NDArray[np.float32]]:
        count = len(inputs[INPUT])
        num_batches = -(-count // batch_size)
        batches = (np.arange(num_batches * batch_size) % count).reshape(num_batches, batch_size)
        seen = [
            self._session.run(list(outputs), {name: values[batch] for name, values in inputs.items()})
            for batch in batches
        ]
        return [np.concatenate(parts)[:count] for parts in zip(*seen, strict=True)]


def export_onnx(detector: Detector, path: Path, images: Sequence[Framed], opset: int = DEFAULT_OPSET) -> Parity:
    """Write the graph to `path` if it agrees with the detector on these images.

    The file is written completely or not at all, and replaces an older export. Raises ParityError if the graph
    disagrees; ValueError if `path` is something else, a package is missing or the opset is outside `OPSETS`.
    """
    check_exportable(path, opset)
    model = build_model(detector, opset).SerializeToString()
    parity = compare(detector, model, images)
    with file_in_making(path) as partial:
        partial.write_bytes(model)
    return parity


def check_exportable(path: Path, opset: int) -> None:
    """Raise ValueError for every problem that can be found before the detector is read."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ValueError(f"exporting needs the package {missing[0]}: run .ci/setup onnx or pip install -e '.[onnx]'.")
    if opset not in OPSETS:
        raise ValueError(f"--opset must lie in {OPSETS[0]} to {OPSETS[-1]}, got {opset}.")
    if path.exists() and not _is_ours(path):
        raise ValueError(f"{path} exists and is not a detector exported by dskd; choose another --onnx.")
    check_can_be_made(path, "--onnx")


def build_model(detector: Detector, opset: int = DEFAULT_OPSET) -> "onnx.ModelProto":
    """The graph of a detector on the CPU, for any batch size; its metadata hold what a user of the graph needs.

    Raises ValueError if the exporter cannot write this network or this opset.
    """
    import onnx

    geometry = detector.geometry
    # The exporter would treat a batch size of one as a constant.
    samples = [torch.zeros(2, geometry.height, geometry.width, 3, dtype=torch.uint8)]
    names = [INPUT]
    if geometry.is_masked and not geometry.tile:
        samples.append(torch.ones(2, geometry.height, geometry.width, dtype=torch.bool))
        names.append(INSIDE)
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                DetectorGraph(detector).eval(),
                tuple(samples),
                dynamo=True,
                input_names=names,
                output_names=list(TILE_OUTPUTS if geometry.tile else OUTPUTS),
                # The second input has the first one's batch size; the exporter warns of a name for it.
                dynamic_shapes={name: {0: batch if name == INPUT else torch.export.Dim.AUTO} for name in names},
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"torch cannot export backbone {detector.record.config.model.backbone}: {reason}") from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    written = next(item.version for item in model.opset_import if item.domain == "")
    if written != opset:
        raise ValueError(f"this network could not be written with --opset {opset}, only with {written}; ask for that.")
    _forget_sources(model)
    onnx.helper.set_model_props(model, _metadata(detector))
    onnx.checker.check_model(model, full_check=True)
    return model


def compare(detector: Detector, model: bytes, images: Sequence[Framed], tolerance: float | None = TOLERANCE) -> Parity:
    """Run detector and graph on whole images, the graph with each of `BATCH_SIZES`; without a tolerance just tell.

    Raises ParityError if an error is above `TOLERANCE`, if verdicts at a stored threshold differ, or if onnxruntime
    cannot run the graph.
    """
    maps, values = detector.score_framed(images)
    expected, peaks = np.array(values), np.array([np.abs(heat).max() for heat in maps])
    try:
        graph = OnnxDetector(model)
        answers = [graph.score_framed(images, size) for size in BATCH_SIZES]
    except Exception as error:  # onnxruntime's errors have no other common base class
        raise ParityError(f"onnxruntime cannot run the graph: {str(error).splitlines()[0]}") from error
    map_errors, score_errors, found = [], [], []
    for heats, scores in answers:
        apart = [np.abs(heat - other).max() for heat, other in zip(heats, maps, strict=True)]
        map_errors.append(_share(np.array(apart), peaks))
        found.append(np.array(scores))
        score_errors.append(_share(np.abs(found[-1] - expected), np.abs(expected)))
    map_error, score_error = max(map_errors), max(score_errors)
    verdicts, num_unequal = [], 0
    undecided = TOLERANCE if tolerance is None else tolerance
    for rate, threshold, _ in detector.record.thresholds:
        decided = np.abs(expected - threshold) > undecided * abs(threshold)
        anomalous = expected > threshold
        unequal = [int(((scores > threshold) != anomalous)[decided].sum()) for scores in found]
        num_unequal += sum(unequal)
        verdicts.append(Verdicts(rate, threshold, int(anomalous.sum()), int((~decided).sum()), max(unequal)))
    if tolerance is not None and (num_unequal or not max(map_error, score_error) < tolerance):
        raise ParityError(
            f"on {len(images)} images onnxruntime differs from torch by {map_error:.2g} of the maps' and "
            f"{score_error:.2g} of the scores' values (at most {tolerance:g} is allowed), and in {num_unequal} "
            f"of {len(images) * len(found) * len(verdicts)} verdicts."
        )
    return Parity(len(images), BATCH_SIZES, map_error, score_error, tuple(verdicts))


def generated_inputs(detector: Detector) -> list[Framed]:
    """Generated images for the comparison if the user gave none; for tiles larger than one of them."""
    geometry = detector.geometry
    more = geometry.tile // 2
    return as_inputs(generated_images(geometry.width + more, geometry.height + more))


def network_inputs(detector: Detector, paths: Sequence[Path]) -> list[Framed]:
    """Image files as the detector reads them.

    Raises UnreadableImageError on a file that is no readable image.
    """
    found = []
    for path in paths:
        framed = detector.load_image(path)
        if isinstance(framed, str):
            raise UnreadableImageError(framed)
        found.append(framed)
    return found


def as_inputs(images: npt.NDArray[np.uint8]) -> list[Framed]:
    """Pixels (N, H, W, 3) as images that are their own canvas."""
    return [Framed(image, whole_frame(images.shape[2], images.shape[1]), image) for image in images]


def generated_images(width: int, height: int | None = None) -> npt.NDArray[np.uint8]:
    """Generated images (N, height, width, 3), by default squares, for the comparison if the user gave none.

    Black, white, fine to coarse noise.
    """
    rng = np.random.default_rng(0)
    size = (width if height is None else height, width)
    drawn = [np.zeros((*size, 3)), np.full((*size, 3), 255.0)]
    for index in range(NUM_GENERATED - len(drawn)):
        cells = 2 ** (1 + index % 5)
        zoom = (size[0] / cells, size[1] / cells, 1)
        drawn.append(ndimage.zoom(rng.uniform(0, 255, (cells, cells, 3)), zoom, order=1))
    return np.stack(drawn).round().astype(np.uint8)


def _share(errors: npt.NDArray[np.floating[Any]], scales: npt.NDArray[np.floating[Any]]) -> float:
    """The largest error relative to its scale; infinite if an error is NaN."""
    shares = errors / np.maximum(scales, np.finfo(np.float32).tiny)
    return float(shares.max()) if np.isfinite(shares).all() else float("inf")


def _metadata(detector: Detector) -> dict[str, str]:
    record = detector.record
    values: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "version": VERSION,
        "category": record.category,
        "detector_version": record.detector_version,
        "image_size": record.config.data.image_size,
        "width": detector.geometry.width,
        "height": detector.geometry.height,
        "thresholds": [threshold._asdict() for threshold in record.thresholds],
        "normal_scores": record.normal_scores,
        "input": _input_in_words(detector.geometry),
        "region": dataclasses.asdict(record.region) if record.region else None,
        "scale": dataclasses.asdict(record.scale) if record.scale else None,
        "teacher": record.teacher,
        "teacher_sha256": record.teacher_sha256,
        "data_sha256": record.data_sha256,
        "step": record.step,
        "config": record.config.to_dict(),
        "revision": record.revision,
    }
    return {_PREFIX + name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def _input_in_words(geometry: Geometry) -> str:
    """What a program that feeds the graph has to do, in words."""
    size = f"{geometry.width} x {geometry.height}"
    if geometry.tile:
        how = (
            f"cut into tiles of {size} that share {geometry.overlap} pixels and start at multiples of "
            f"{geometry.alignment}; the maps have one value per {MAP_STRIDE} pixels and are to be stitched, blurred "
            "and scored as dskd.data.tiles does"
        )
    elif geometry.letterbox:
        how = f"resized into {size} with its aspect ratio, in the middle between bars: bilinear, antialiased"
    else:
        how = f"resized to {size}: bilinear, antialiased, no crop"
    text = f"RGB bytes, channels last, {how}"
    if geometry.region is not None:
        text += "; first cut to the box of region, given in pixels of images of its width and height"
    if geometry.is_masked:
        text += f"; bars and what lies outside of region are {NEUTRAL}, and false in {INSIDE} where the graph takes it"
    return text


def _is_ours(path: Path) -> bool:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError):
        return False
    return any(entry.key == f"{_PREFIX}schema" for entry in model.metadata_props)


def _forget_sources(model: "onnx.ModelProto") -> None:
    """Remove the exporter's notes, which contain paths of source files on this machine."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
