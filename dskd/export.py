"""Export a detector as one ONNX graph, from RGB bytes to anomaly maps and scores, and check that both agree."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, UInt8
from scipy import ndimage
from torch import Tensor, nn

from dskd.anomaly import anomaly_maps, discrepancies, image_scores
from dskd.atomic import check_can_be_made, file_in_making
from dskd.config import VERSION
from dskd.detector import Detector
from dskd.evaluate import AnomalyScores
from dskd.model.teacher import normalize

if TYPE_CHECKING:
    import onnx

SCHEMA_VERSION = 1
INPUT = "images"
OUTPUTS = ("maps", "scores")
OPSETS = range(18, 26)
"""Opsets that torch's exporter writes, or its converter reaches, without falling back to another opset."""
DEFAULT_OPSET = 18
"""The lowest of `OPSETS`: more runtimes can read an older opset."""
TOLERANCE = 1e-4
"""Largest allowed difference between detector and graph, relative to the image's highest map value or its score."""
BATCH_SIZES = (1, 2, 5)
NUM_GENERATED = 10

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


class Parity(NamedTuple):
    """How much the exported graph differs from the detector; errors are relative, as in `TOLERANCE`."""

    num_images: int
    batch_sizes: tuple[int, ...]
    map_error: float
    score_error: float
    verdicts: tuple[Verdicts, ...]


class DetectorGraph(nn.Module):
    """The whole computation of a detector as one module; any teacher that maps images to a pyramid can be used.

    The images are bytes as a camera or decoder gives them, channels last. The normalisation is inside, so
    no caller can get the range, the mean or the order of the axes wrong, and a quarter of the memory of
    float32 is moved. Resizing stays outside: Pillow's antialiased filter has no exact ONNX operator.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.teacher = detector.teacher
        self.students = detector.students
        self.config = detector.record.config

    def forward(
        self, images: UInt8[Tensor, "b size size 3"]
    ) -> tuple[Float[Tensor, "b size size"], Float[Tensor, " b"]]:
        """Anomaly maps and image scores of RGB images, `size` as in training."""
        pixels = normalize(images)
        targets = self.teacher(pixels)
        outputs = self.students(pixels, targets)
        found = discrepancies(targets, outputs.encoder, outputs.decoder)
        maps = anomaly_maps(found, self.config.score, self.config.data.image_size)
        return maps, image_scores(maps, self.config.score.score_top_fraction)


def export_onnx(detector: Detector, path: Path, images: npt.NDArray[np.uint8], opset: int = DEFAULT_OPSET) -> Parity:
    """Write the graph to `path` if it agrees with the detector on RGB images (N, S, S, 3), S as in training.

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

    size = detector.record.config.data.image_size
    # The exporter would treat a batch size of one as a constant.
    sample = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                DetectorGraph(detector).eval(),
                (sample,),
                dynamo=True,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}},
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


def compare(detector: Detector, model: bytes, images: npt.NDArray[np.uint8]) -> Parity:
    """Run detector and graph on RGB images (N, S, S, 3), the graph with each of `BATCH_SIZES`.

    Raises ParityError if an error is above `TOLERANCE`, if verdicts at a stored threshold differ, or if onnxruntime
    cannot run the graph.
    """
    expected = detector.score_images(images)
    found = [_run(model, images, size) for size in BATCH_SIZES]
    peaks, scores = np.abs(expected.maps).max(axis=(1, 2)), np.abs(expected.scores)
    map_error = max(_share(np.abs(seen.maps - expected.maps).max(axis=(1, 2)), peaks) for seen in found)
    score_error = max(_share(np.abs(seen.scores - expected.scores), scores) for seen in found)
    verdicts, num_unequal = [], 0
    for rate, threshold, _ in detector.record.thresholds:
        decided = np.abs(expected.scores - threshold) > TOLERANCE * abs(threshold)
        anomalous = expected.scores > threshold
        num_unequal += sum(int(((seen.scores > threshold) != anomalous)[decided].sum()) for seen in found)
        verdicts.append(Verdicts(rate, threshold, int(anomalous.sum()), int((~decided).sum())))
    if num_unequal or not max(map_error, score_error) < TOLERANCE:
        raise ParityError(
            f"on {len(images)} images onnxruntime differs from torch by {map_error:.2g} of the maps' and "
            f"{score_error:.2g} of the scores' values (at most {TOLERANCE:g} is allowed), and in {num_unequal} "
            f"of {len(images) * len(found) * len(verdicts)} verdicts."
        )
    return Parity(len(images), BATCH_SIZES, map_error, score_error, tuple(verdicts))


def generated_images(image_size: int) -> npt.NDArray[np.uint8]:
    """Generated images (N, S, S, 3) for the comparison if the user gave none: black, white, fine to coarse noise."""
    rng = np.random.default_rng(0)
    drawn = [np.zeros((image_size, image_size, 3)), np.full((image_size, image_size, 3), 255.0)]
    for index in range(NUM_GENERATED - len(drawn)):
        cells = 2 ** (1 + index % 5)
        zoom = image_size / cells
        drawn.append(ndimage.zoom(rng.uniform(0, 255, (cells, cells, 3)), (zoom, zoom, 1), order=1))
    return np.stack(drawn).round().astype(np.uint8)


def _run(model: bytes, images: npt.NDArray[np.uint8], batch_size: int) -> AnomalyScores:
    """The graph's maps and scores, computed in full batches: the last batch is filled up with the first images."""
    import onnxruntime

    num_batches = -(-len(images) // batch_size)
    batches = (np.arange(num_batches * batch_size) % len(images)).reshape(num_batches, batch_size)
    try:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        seen = [session.run(list(OUTPUTS), {INPUT: images[indices]}) for indices in batches]
    except Exception as error:  # onnxruntime's errors have no other common base class
        raise ParityError(f"onnxruntime cannot run the graph: {str(error).splitlines()[0]}") from error
    maps, scores = (np.concatenate(parts)[: len(images)] for parts in zip(*seen, strict=True))
    return AnomalyScores(maps, scores)


def _share(errors: npt.NDArray[np.float32], scales: npt.NDArray[np.float32]) -> float:
    """The largest error relative to its scale; infinite if an error is NaN."""
    shares = errors / np.maximum(scales, np.finfo(np.float32).tiny)
    return float(shares.max()) if np.isfinite(shares).all() else float("inf")


def _metadata(detector: Detector) -> dict[str, str]:
    record = detector.record
    values: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "version": VERSION,
        "category": record.category,
        "image_size": record.config.data.image_size,
        "thresholds": [threshold._asdict() for threshold in record.thresholds],
        "input": "RGB bytes, channels last, resized to a square of image_size: bilinear, antialiased, no crop",
        "teacher": record.teacher,
        "teacher_sha256": record.teacher_sha256,
        "data_sha256": record.data_sha256,
        "step": record.step,
        "config": record.config.to_dict(),
        "revision": record.revision,
    }
    return {_PREFIX + name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


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
