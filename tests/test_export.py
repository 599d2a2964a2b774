import contextlib
import dataclasses
import io
import itertools
import json
import typing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dskd import export as module
from dskd.calibration import Threshold
from dskd.checkpoint import DetectorRecord
from dskd.cli.main import main
from dskd.config import RunConfig, ScoreConfig
from dskd.detector import UNTRAINED_TEACHER, Detector
from dskd.export import (
    OnnxDetector,
    ParityError,
    as_inputs,
    build_model,
    check_exportable,
    compare,
    export_onnx,
    generated_images,
    network_inputs,
)
from dskd.model.amplification import AmplifiedTeacher, build_amplifier
from dskd.model.distances import Pyramid
from dskd.model.network import StudentPyramids, build_students
from dskd.model.teacher import Teacher, build_teacher
from dskd.presets import PRESETS

NETWORK: dict[str, Any] = {
    "backbone": "test_resnet", "levels": (1, 2), "level_weights": (1.0, 1.0), "score_level_weights": (1.0, 0.5),
    "embedding_depth": 1, "image_size": 32,
}  # fmt: skip
LEVEL_FUSIONS = typing.get_args(typing.get_type_hints(ScoreConfig)["level_fusion"])
STUDENT_FUSIONS = typing.get_args(typing.get_type_hints(ScoreConfig)["student_fusion"])


def with_thresholds(config: RunConfig, teacher: Any, students: nn.Module) -> Detector:
    """A detector of two thresholds, three of the ten generated images below the one and three above the other."""

    def detector(*thresholds: Threshold) -> Detector:
        record = DetectorRecord(
            category="tile", config=config, teacher="random", teacher_sha256="", data_sha256="", validation_files=(),
            calibration_files=(),
            step=1, thresholds=thresholds, metrics={},
        )  # fmt: skip
        return Detector(record, teacher, students.eval(), torch.device("cpu"))

    scores = np.sort(detector().score_images(generated_images(32)).scores)
    low, high = (float((scores[rank - 1] + scores[rank]) / 2) for rank in (3, 7))
    return detector(Threshold(0.05, low, 20), Threshold(0.01, high, 100))


def check_agreement(detector: Detector, model: bytes) -> None:
    """The graph alone in onnxruntime, at several batch sizes, against the detector; and what `compare` says of both."""
    session = onnxruntime.InferenceSession(model)
    rng = np.random.default_rng(5)
    for batch in (1, 2, 5):
        images = rng.integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8)
        maps, scores = session.run(["maps", "scores"], {"images": images})
        expected = detector.score_images(images)
        assert maps.dtype == scores.dtype == np.float32 and maps.shape == (batch, 32, 32)
        np.testing.assert_allclose(maps, expected.maps, rtol=1e-4, atol=1e-5 * float(expected.maps.max()))
        np.testing.assert_allclose(scores, expected.scores, rtol=1e-5)
    parity = compare(detector, model, as_inputs(generated_images(32)))
    assert parity.num_images == 10 and max(parity.map_error, parity.score_error) < 1e-5


def check_openvino(detector: Detector, model: bytes) -> None:
    """The same graph in OpenVINO's runtime on the CPU, in full precision: its default may round to 16 bits."""
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = np.random.default_rng(6).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    found = compiled({"images": images})
    expected = detector.score_images(images)
    np.testing.assert_allclose(found["maps"], expected.maps, rtol=1e-4, atol=1e-4 * float(expected.maps.max()))
    np.testing.assert_allclose(found["scores"], expected.scores, rtol=1e-4)


@pytest.mark.parametrize(("preset", "opset"), [("stfpm", 18), ("aand", 23)])
def test_the_graph_of_a_method_says_what_its_detector_says(preset: str, opset: int) -> None:
    config = PRESETS[preset].with_values(NETWORK)
    teacher = build_teacher(config.model.backbone, config.model.levels, "random")
    if config.amplification.amplification:
        teacher = AmplifiedTeacher(teacher, build_amplifier(teacher, config.amplification.memory_size, 0))
    detector = with_thresholds(config, teacher, build_students(config.model, teacher, seed=3))
    model = build_model(detector, opset)
    assert [item.version for item in model.opset_import if item.domain == ""] == [opset]
    check_agreement(detector, model.SerializeToString())
    check_openvino(detector, model.SerializeToString())


class _Levels(nn.Module):
    """The least that makes a pyramid of two levels, with weights of its own: no timm."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.kernels = nn.Parameter(torch.randn(2, 4, 3, 3, 3, generator=generator), requires_grad=False)

    def forward(self, images: Tensor) -> Pyramid:
        return tuple(F.conv2d(images, kernel, stride=4 * 2**i) for i, kernel in enumerate(self.kernels))


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = _Levels(1), _Levels(2)

    def forward(self, images: Tensor, teacher_pyramid: Pyramid) -> StudentPyramids:
        return StudentPyramids(self.encoder(images), self.decoder(images))


@pytest.mark.parametrize(
    ("level_fusion", "student_fusion"),
    list(zip(itertools.cycle(LEVEL_FUSIONS[::-1]), STUDENT_FUSIONS, strict=False)),
)
def test_every_fusion_exports_whatever_the_teacher_is(level_fusion: str, student_fusion: str) -> None:
    fused = {"level_fusion": level_fusion, "student_fusion": student_fusion}
    weighted = {"score_top_fraction": 0.05, "decoder_score_weight": 0.3}
    config = PRESETS["dskd"].with_values(NETWORK | fused | weighted)
    detector = with_thresholds(config, Teacher(_Levels(0)), _Pair())
    check_agreement(detector, build_model(detector).SerializeToString())


class Exported(NamedTuple):
    """What `dskd export` made of the trained detector, whose two students are DSKD's."""

    path: Path
    report: dict[str, Any]
    said: list[str]


@pytest.fixture(scope="module")
def exported(detector_folder: Path, mvtec_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("exported") / "new" / "tile.onnx"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main(["export", str(detector_folder), "--onnx", str(path), "--images", str(mvtec_root / "tile/test"), "--json"])
    return Exported(path, json.loads(out.getvalue()), err.getvalue().splitlines())


@pytest.fixture(scope="module")
def detector(detector_folder: Path) -> Detector:
    return Detector.load(detector_folder)


@pytest.fixture(scope="module")
def model(exported: Exported) -> Any:
    return onnx.load(exported.path)


def test_the_command_says_how_near_the_graph_is_on_the_images_given(exported: Exported, detector: Detector) -> None:
    report = exported.report
    assert (report["images"], report["num_images"], report["teacher"]) == ("given", 8, "random")
    assert report["map_error"] < 1e-5 and report["score_error"] < 1e-5 and report["batch_sizes"] == [1, 2, 5]
    assert [seen["threshold"] for seen in report["verdicts"]] == [t.value for t in detector.record.thresholds]
    assert exported.said[0] == UNTRAINED_TEACHER and exported.said[-1].startswith(f"wrote {exported.path}")
    assert [file.name for file in exported.path.parent.iterdir()] == ["tile.onnx"]
    check_agreement(detector, exported.path.read_bytes())


def test_verdicts_are_counted_at_every_threshold(detector: Detector, model: Any) -> None:
    scores = np.sort(detector.score_images(generated_images(32)).scores).astype(float)
    limits = tuple(Threshold(rate, value, 20) for rate, value in ((0.1, scores[1:3].mean()), (0.05, scores[6])))
    stricter = Detector(
        dataclasses.replace(detector.record, thresholds=limits),
        detector.teacher,
        detector.students,
        torch.device("cpu"),
    )
    seen = compare(stricter, model.SerializeToString(), as_inputs(generated_images(32))).verdicts
    assert [(at.num_anomalous, at.num_undecided) for at in seen] == [(8, 0), (3, 1)]


def tampered(model: Any) -> Any:
    """A copy of the graph, one of whose convolutions has its kernels the other way round."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    arrays = ((entry, onnx.numpy_helper.to_array(entry)) for entry in changed.graph.initializer)
    entry, kernels = next((entry, array) for entry, array in arrays if array.ndim == 4 and array.any())
    entry.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(kernels[::-1]), entry.name))
    return changed


def test_changed_weights_are_found_out(detector: Detector, model: Any) -> None:
    with pytest.raises(ParityError, match=r"differs from torch by .* verdicts"):
        compare(detector, tampered(model).SerializeToString(), as_inputs(generated_images(32)))


def test_a_graph_that_cannot_run_is_found_out(detector: Detector) -> None:
    with pytest.raises(ParityError, match="onnxruntime cannot run the graph"):
        compare(detector, b"no graph", as_inputs(generated_images(32)))


def test_a_file_tells_all_that_its_user_must_know_and_nothing_of_this_machine(
    exported: Exported, detector: Detector, model: Any
) -> None:
    session = onnxruntime.InferenceSession(exported.path)
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
    assert str(Path(module.__file__).parent).encode() not in exported.path.read_bytes()


def test_only_an_older_export_is_replaced(
    detector: Detector, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "build_model", lambda *_: model)
    path = tmp_path / "tile.onnx"
    export_onnx(detector, path, as_inputs(generated_images(32)))
    first = path.read_bytes()
    monkeypatch.setattr(module, "build_model", lambda *_: tampered(model))
    with pytest.raises(ParityError):
        export_onnx(detector, path, as_inputs(generated_images(32)))
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
    with pytest.raises(
        ValueError, match=r"needs the package onnxscript: run \.ci/setup onnx or pip install -e '\.\[onnx\]'"
    ):
        check_exportable(tmp_path / "new.onnx", 18)


def test_an_8_bit_graph_is_nearly_the_detector_and_tells_by_how_much_it_differs(
    detector_folder: Path, detector: Detector, mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, good = tmp_path / "int8.onnx", str(mvtec_root / "tile/train/good")
    words = ["export", str(detector_folder), "--onnx", str(path), "--int8", "--json"]
    with pytest.raises(SystemExit) as refused:
        main(words)
    assert refused.value.code == 2 and "give some with --images FOLDER" in capsys.readouterr().err
    main([*words, "--images", good])
    report = json.loads(capsys.readouterr().out)
    assert report["precision"] == "int8" and 1e-4 < report["score_error"] < 0.2
    found = onnx.load(path)
    kinds = {tensor.name: tensor.data_type for tensor in found.graph.initializer}
    into = {node.output[0]: node for node in found.graph.node}
    convolutions = [node for node in found.graph.node if node.op_type == "Conv"]
    assert convolutions and all(
        kinds[into[node.input[1]].input[0]] == onnx.TensorProto.INT8 for node in convolutions
    ), "every convolution's weights are of 8 bits"
    images = network_inputs(detector, sorted((mvtec_root / "tile/test").rglob("*.png")))
    maps, _ = detector.score_framed(images)
    heats, _ = OnnxDetector(path.read_bytes()).score_framed(images)
    assert np.corrcoef(np.ravel(maps), np.ravel(heats))[0, 1] > 0.9
