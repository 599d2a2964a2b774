import dataclasses
import itertools
import json
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dskd import export as module
from dskd.calibration import Threshold
from dskd.checkpoint import DetectorRecord
from dskd.config import ScoreConfig
from dskd.detector import Detector
from dskd.export import ParityFailure, build_model, check_exportable, compare, export_onnx, generated_images
from dskd.model.amplification import AmplifiedTeacher, build_amplifier
from dskd.model.network import build_students
from dskd.model.teacher import Pyramid, Teacher, build_teacher, create_features
from dskd.presets import PRESETS

onnx = pytest.importorskip("onnx", reason="needs pip install 'dskd[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install 'dskd[onnx]'")

NETWORK: dict[str, Any] = {
    "backbone": "test_resnet", "levels": (1, 2), "level_weights": (1.0, 1.0), "score_level_weights": (1.0, 0.5),
    "embedding_depth": 1, "image_size": 32,
}  # fmt: skip
LEVEL_FUSIONS = typing.get_args(typing.get_type_hints(ScoreConfig)["level_fusion"])
STUDENT_FUSIONS = typing.get_args(typing.get_type_hints(ScoreConfig)["student_fusion"])
CASES: dict[str, dict[str, Any]] = {
    "stfpm": {"preset": "stfpm"},
    "dskd": {"preset": "dskd"},
    "aand": {"preset": "aand"},
    # With the presets, every value of both fusions.
    **{
        f"levels by {level}, students by {student}": {
            "level_fusion": level,
            "student_fusion": student,
            "score_top_fraction": 0.05,
            "decoder_score_weight": 0.3,
        }
        for level, student in zip(itertools.cycle(LEVEL_FUSIONS[:0:-1]), STUDENT_FUSIONS[1:], strict=False)
    },
}


def untrained(teacher: Teacher | None = None, preset: str = "dskd", **values: Any) -> Detector:
    """A detector of two thresholds, each amid the scores of the generated images."""
    config = PRESETS[preset].with_values(NETWORK | values)
    teacher = teacher or build_teacher(config.model.backbone, config.model.levels, "random")
    if config.amplification.amplification:
        teacher = AmplifiedTeacher(teacher, build_amplifier(teacher, config.amplification.memory_size, seed=4))
    students = build_students(config.model, teacher, seed=3).eval()

    def detector(*thresholds: Threshold) -> Detector:
        record = DetectorRecord(
            category="tile", config=config, teacher="random", teacher_sha256="", data_sha256="", validation_files=(),
            calibration_files=(),
            epoch=0, thresholds=thresholds, metrics={},
        )  # fmt: skip
        return Detector(record, teacher, students, torch.device("cpu"))

    scores = np.sort(detector().inspect(generated_images(32)).scores)
    low, high = (float((scores[rank - 1] + scores[rank]) / 2) for rank in (3, 7))
    return detector(Threshold(0.05, low, 20), Threshold(0.01, high, 100))


def run(model: bytes, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    maps, scores = onnxruntime.InferenceSession(model).run(["maps", "scores"], {"images": images})
    return maps, scores


@pytest.mark.parametrize("case", CASES)
def test_the_graph_says_what_the_detector_says_for_every_method_and_fusion(case: str) -> None:
    detector = untrained(**CASES[case])
    model = build_model(detector).SerializeToString()
    rng = np.random.default_rng(5)
    for batch in (1, 2, 5):
        images = rng.integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8)
        maps, scores = run(model, images)
        expected = detector.inspect(images)
        assert maps.dtype == scores.dtype == np.float32 and maps.shape == (batch, 32, 32)
        np.testing.assert_allclose(maps, expected.maps, rtol=1e-4, atol=1e-5 * float(expected.maps.max()))
        np.testing.assert_allclose(scores, expected.scores, rtol=1e-5)
    parity = compare(detector, model, generated_images(32))
    assert parity.num_images == 10 and max(parity.map_error, parity.score_error) < 1e-5
    assert [(seen.num_anomalous, seen.num_undecided) for seen in parity.verdicts] == [(7, 0), (3, 0)]


class _DoublingTeacher(Teacher):
    """A teacher that is more than its backbone, with weights of its own."""

    def __init__(self) -> None:
        super().__init__(create_features("test_resnet", (1, 2)))
        self.gains = torch.nn.Parameter(torch.tensor([2.0, -0.5]), requires_grad=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Pyramid:
        return tuple(level * torch.sigmoid(gain * level) for level, gain in zip(self.features(images), self.gains))  # noqa: B905


def test_rd4ad_exports_with_any_teacher_at_another_opset() -> None:
    detector = untrained(_DoublingTeacher(), preset="rd4ad")
    model = build_model(detector, opset=23)
    assert [item.version for item in model.opset_import if item.domain == ""] == [23]
    parity = compare(detector, model.SerializeToString(), generated_images(32))
    assert max(parity.map_error, parity.score_error) < 1e-5


@pytest.fixture(scope="module")
def detector(detector_folder: Path) -> Detector:
    return Detector.load(detector_folder)


@pytest.fixture(scope="module")
def model(detector: Detector) -> Any:
    return build_model(detector)


def tampered(model: Any) -> Any:
    """A copy of the graph, one of whose convolutions has its kernels the other way round."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    arrays = ((entry, onnx.numpy_helper.to_array(entry)) for entry in changed.graph.initializer)
    entry, kernels = next((entry, array) for entry, array in arrays if array.ndim == 4 and array.any())
    entry.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(kernels[::-1]), entry.name))
    return changed


def test_changed_weights_are_found_out(detector: Detector, model: Any) -> None:
    with pytest.raises(ParityFailure, match=r"differs from torch by .* verdicts"):
        compare(detector, tampered(model).SerializeToString(), generated_images(32))


def test_a_graph_that_cannot_run_is_found_out(detector: Detector) -> None:
    with pytest.raises(ParityFailure, match="onnxruntime cannot run the graph"):
        compare(detector, b"no graph", generated_images(32))


def test_a_score_on_the_threshold_is_counted_and_not_compared(detector: Detector, model: Any) -> None:
    images = generated_images(32)
    score = float(detector.inspect(images).scores[4])
    record = dataclasses.replace(detector.record, thresholds=(Threshold(0.05, score, 20),))
    on_it = Detector(record, detector.teacher, detector.students, torch.device("cpu"))
    (verdicts,) = compare(on_it, model.SerializeToString(), images).verdicts
    assert verdicts.num_undecided == 1


def test_a_file_tells_all_that_its_user_must_know_and_nothing_of_this_machine(
    detector: Detector, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "build_model", lambda *_: model)
    path = tmp_path / "new" / "tile.onnx"
    export_onnx(detector, path, generated_images(32))
    session = onnxruntime.InferenceSession(path)
    (entry,) = session.get_inputs()
    assert (entry.name, entry.type, entry.shape) == ("images", "tensor(uint8)", ["batch", 32, 32, 3])
    assert [(out.name, out.shape) for out in session.get_outputs()] == [
        ("maps", ["batch", 32, 32]),
        ("scores", ["batch"]),
    ]
    known = session.get_modelmeta().custom_metadata_map
    assert known["dskd.schema"] == "1" and known["dskd.category"] == "tile" and known["dskd.teacher"] == "random"
    assert known["dskd.image_size"] == "32"
    assert json.loads(known["dskd.thresholds"]) == [entry._asdict() for entry in detector.record.thresholds]
    assert json.loads(known["dskd.config"])["score"]["level_fusion"] == detector.record.config.score.level_fusion
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert str(Path(module.__file__).parent).encode() not in path.read_bytes()


def test_only_an_older_export_is_replaced(
    detector: Detector, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "build_model", lambda *_: model)
    path = tmp_path / "tile.onnx"
    export_onnx(detector, path, generated_images(32))
    first = path.read_bytes()
    monkeypatch.setattr(module, "build_model", lambda *_: tampered(model))
    with pytest.raises(ParityFailure):
        export_onnx(detector, path, generated_images(32))
    assert [file.name for file in tmp_path.iterdir()] == ["tile.onnx"] and path.read_bytes() == first
    other = onnx.ModelProto()
    other.CopyFrom(model)
    del other.metadata_props[:]
    for foreign in (b"my notes", b"", other.SerializeToString()):
        path.write_bytes(foreign)
        with pytest.raises(ValueError, match="is not a detector exported by dskd"):
            check_exportable(path, 18)
    path.write_bytes(first)
    check_exportable(path, 18)
    with pytest.raises(ValueError, match="no folder that you may write to; choose another --onnx"):
        check_exportable(path / "below.onnx", 18)


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ValueError, match=r"needs the package onnxscript: pip install 'dskd\[onnx\]'"):
        check_exportable(tmp_path / "new.onnx", 18)
