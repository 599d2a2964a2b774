import dataclasses
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import dskd
from dskd.calibration import Threshold
from dskd.checkpoint import (
    PREVIEW_FILE,
    RECORD_FILE,
    SCHEMA_VERSION,
    WEIGHTS_FILE,
    BrokenDetectorError,
    DetectorRecord,
    check_replaceable,
    read_detector,
    read_record,
    rewrite_record,
    sha256_of,
    write_detector,
)
from dskd.config import RunConfig
from dskd.data.depth import PixelScale
from dskd.data.geometry import RegionOfInterest
from dskd.detector import Detector

WEIGHTS = {"teacher.a": torch.arange(6.0).reshape(2, 3), "students.b": torch.tensor([7], dtype=torch.int64)}


@pytest.fixture
def record(tiny: RunConfig) -> DetectorRecord:
    return DetectorRecord(
        category="screw",
        config=tiny,
        teacher="weights.pth",
        teacher_sha256="ab" * 32,
        data_sha256="cd" * 32,
        validation_files=("003.png", "007.png"),
        calibration_files=("001.png",),
        step=400,
        thresholds=(Threshold(0.05, 0.123456789012345, 120), Threshold(0.01, 0.3, 120)),
        metrics={"val/objective": 0.9, "test/aupro": 1 / 3},
        revision="c0ffee",
    )


@pytest.fixture
def copied(detector_folder: Path, tmp_path: Path) -> Path:
    """A real detector to be damaged."""
    return Path(shutil.copytree(detector_folder, tmp_path / "detector"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / RECORD_FILE).read_text())
    change(document)
    (folder / RECORD_FILE).write_text(json.dumps(document))


def flip_last_byte(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(content)


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


def linked(name: str) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return act


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda folder: edit(folder, change)


def with_text(old: str, new: str) -> Callable[[Path], object]:
    """A record that no JSON writer of ours would write."""

    def act(folder: Path) -> None:
        text = (folder / RECORD_FILE).read_text()
        assert old in text
        (folder / RECORD_FILE).write_text(text.replace(old, new, 1))

    return act


def not_finite(folder: Path, value: float) -> None:
    """Weights with one such value, beside a record that vouches for them."""
    weights = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point() and "students" in name)
    weights[name].view(-1)[0] = value
    safetensors.torch.save_file(weights, folder / WEIGHTS_FILE)
    edit(folder, lambda document: document["weights"].update(sha256=sha256_of(folder / WEIGHTS_FILE)))


def test_a_record_of_the_time_when_every_length_was_in_epochs_is_read(copied: Path) -> None:
    def older(document: dict[str, Any]) -> None:
        del document["step"]
        for name in ("steps", "patience"):
            del document["config"]["train"][name]
        document.update(schema=2, epoch=4)
        document["config"]["train"]["epochs"] = 100

    before = read_record(copied)
    assert before.step is not None
    edit(copied, older)
    found = read_record(copied)
    assert found.config.train.length == "100 epochs" and found.step is None
    assert found == dataclasses.replace(before, step=None, config=before.config.with_values({"epochs": 100}))
    rewrite_record(copied, found)
    assert read_record(copied) == found


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such folder": (shutil.rmtree, RECORD_FILE),
    "no record": (lambda folder: (folder / RECORD_FILE).unlink(), RECORD_FILE),
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), WEIGHTS_FILE),
    "a changed weight": (flip_last_byte, WEIGHTS_FILE),
    "weights cut short": (cut(WEIGHTS_FILE), WEIGHTS_FILE),
    "record cut short": (cut(RECORD_FILE), RECORD_FILE),
    "record is a list": (lambda folder: (folder / RECORD_FILE).write_text("[1]"), RECORD_FILE),
    "record is no text": (lambda folder: (folder / RECORD_FILE).write_bytes(b"\xff\xfe\x00"), RECORD_FILE),
    "newer schema": (edited(lambda record: record.update(schema=SCHEMA_VERSION + 1)), "upgrade dskd"),
    "schema is a word": (edited(lambda record: record.update(schema="one")), "schema 'one'"),
    "no thresholds": (edited(lambda record: record.update(thresholds=[])), "threshold"),
    "no configuration": (edited(lambda record: record.pop("config")), "config"),
    "an unknown field": (edited(lambda record: record["config"]["train"].update(momentum=1)), "momentum"),
    "an impossible value": (edited(lambda record: record["config"]["data"].update(image_size=33)), "image_size"),
    "no hash": (edited(lambda record: record.pop("weights")), "weights"),
    "an address as backbone": (
        edited(lambda record: record["config"]["model"].update(backbone="hf-hub:someone/net")),
        "backbone must be",
    ),
    "a path as backbone": (
        edited(lambda record: record["config"]["model"].update(backbone="local-dir:/tmp/net")),
        "backbone must be",
    ),
    "a threshold that is no number": (with_text('"value": ', '"value": NaN, "was": '), "damaged"),
    "an infinite threshold": (with_text('"value": ', '"value": Infinity, "was": '), "damaged"),
    "a threshold beyond all numbers": (with_text('"value": ', '"value": 1e999, "was": '), "damaged"),
    "a threshold of text": (edited(lambda record: record["thresholds"][0].update(value="0.1")), "Expected `float`"),
    "an impossible rate": (edited(lambda record: record["thresholds"][0].update(false_alarm_rate=2)), "< 1"),
    "a figure that is no number": (with_text('"metrics": {', '"metrics": {"val/x": NaN, '), "damaged"),
    "a setting that is no number": (with_text('"learning_rate": ', '"learning_rate": NaN, "x": '), "damaged"),
    "a step below 1": (edited(lambda record: record.update(step=0)), ">= 1"),
    "a category that is a list": (edited(lambda record: record.update(category=["screw"])), "Expected `str`"),
    "a teacher without end": (edited(lambda record: record.update(teacher="x" * 10_000)), "length"),
    "images of a terabyte": (edited(lambda record: record["config"]["data"].update(image_size=2**20)), "image_size"),
    "a network without end": (
        edited(lambda record: record["config"]["model"].update(embedding_depth=10**9)),
        "embedding_depth",
    ),
    "an unknown scale": (edited(lambda record: record.update(scale={"kind": "other"})), "damaged"),
    "a scale of nothing": (
        edited(lambda record: record.update(scale={"kind": "integer", "step": 0})),
        "step above 0",
    ),
    "nested without end": (
        lambda folder: (folder / RECORD_FILE).write_text("[" * 100_000),
        RECORD_FILE,
    ),
    "linked weights": (linked(WEIGHTS_FILE), "symbolic link"),
    "linked record": (linked(RECORD_FILE), "symbolic link"),
}


def test_everything_written_is_read_again(record: DetectorRecord, tmp_path: Path) -> None:
    preview = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    write_detector(tmp_path / "deep/er/screw", record, WEIGHTS, preview)
    found, weights = read_detector(tmp_path / "deep/er/screw")
    assert found == record == read_record(tmp_path / "deep/er/screw")
    assert weights.keys() == WEIGHTS.keys()
    assert all(
        torch.equal(weights[name], value) and weights[name].dtype == value.dtype for name, value in WEIGHTS.items()
    )
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "deep/er/screw" / PREVIEW_FILE)), preview)
    assert sorted(path.name for path in (tmp_path / "deep/er").iterdir()) == ["screw"]
    assert (tmp_path / "deep/er/screw").stat().st_mode & 0o777 == 0o755


def test_weights_of_any_memory_order_are_kept(record: DetectorRecord, tmp_path: Path) -> None:
    strided = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    write_detector(tmp_path / "screw", record, {"w": strided})
    assert torch.equal(read_detector(tmp_path / "screw")[1]["w"], strided)


def test_a_record_from_before_a_field_existed_is_read_with_its_default(copied: Path) -> None:
    before = read_record(copied)
    edit(copied, lambda document: [document.pop(name) for name in ("num_textures", "textures_sha256")])
    edit(copied, lambda document: document.pop("num_validation_defects"))
    assert read_record(copied) == before and before.num_validation_defects == 0


def test_a_record_from_before_there_was_a_scale_reads_sixteen_bits_as_it_did(copied: Path) -> None:
    assert read_record(copied).scale == PixelScale(kind="none")
    edit(copied, lambda document: document.pop("scale"))
    assert read_record(copied).scale is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_though_the_record_vouches_for_them(value: float, copied: Path) -> None:
    not_finite(copied, value)
    read_record(copied)
    for read in (read_detector, Detector.load):
        with pytest.raises(BrokenDetectorError, match=r"model\.safetensors holds values that are not finite, in 'stud"):
            read(copied)


def test_a_scale_is_kept(record: DetectorRecord, tmp_path: Path) -> None:
    scaled = dataclasses.replace(record, scale=PixelScale(kind="integer", step=16.0))
    write_detector(tmp_path / "screw", scaled, WEIGHTS)
    assert read_record(tmp_path / "screw") == scaled


def test_one_schema_holds_steps_shapes_teachers_and_parts_and_the_second_is_read_without_them(
    record: DetectorRecord, tmp_path: Path
) -> None:
    shown = {
        "steps": 80, "patience": 3, "resize": "64x32", "group_by": "part(.)", "layout": "classes",
        "decoder_output": "linear",
    }  # fmt: skip
    full = dataclasses.replace(
        record,
        config=record.config.with_values(shown),
        region=RegionOfInterest(width=8, height=6, left=1, top=1, right=7, bottom=5, outline=((1, 1), (6, 1), (3, 4))),
        part_thresholds=(Threshold(0.1, 0.5, 12),),
    )
    write_detector(tmp_path / "screw", full, WEIGHTS)
    assert read_record(tmp_path / "screw") == full

    def older(document: dict[str, Any]) -> None:
        document.update(schema=2, epoch=7)
        for name in ("step", "region", "part_thresholds"):
            del document[name]
        for name in ("resize", "tile", "overlap", "group_by", "layout"):
            del document["config"]["data"][name]
        for name in ("steps", "patience"):
            del document["config"]["train"][name]
        del document["config"]["model"]["decoder_output"]
        document["config"]["train"]["epochs"] = 100

    edit(tmp_path / "screw", older)
    asked = {"epochs": 100, "decoder_output": "relu"}
    assert read_record(tmp_path / "screw") == dataclasses.replace(
        record, step=None, config=record.config.with_values(asked)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_written(value: float, record: DetectorRecord, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'w' are not finite"):
        write_detector(tmp_path / "screw", record, {"w": torch.tensor([1.0, value])})
    with pytest.raises(ValueError, match="not JSON compliant"):
        dataclasses.replace(record, metrics={"val/x": value}).to_json("ab" * 32)
    assert list(tmp_path.iterdir()) == []


def test_an_older_detector_is_replaced_whole(record: DetectorRecord, tmp_path: Path) -> None:
    write_detector(tmp_path / "screw", record, WEIGHTS, np.zeros((2, 2, 3), np.uint8))
    newer = dataclasses.replace(record, step=900)
    write_detector(tmp_path / "screw", newer, WEIGHTS)
    assert read_record(tmp_path / "screw") == newer
    assert sorted(path.name for path in (tmp_path / "screw").iterdir()) == [RECORD_FILE, WEIGHTS_FILE]
    assert [path.name for path in tmp_path.iterdir()] == ["screw"]


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_what_is_no_detector_is_never_overwritten(record: DetectorRecord, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "photos"
    if kind == "file":
        out.write_text("precious")
    else:
        out.mkdir()
    if kind == "folder":
        (out / "holiday.png").write_text("precious")
    with pytest.raises(ValueError, match="photos exists and is not a detector folder; choose another --out"):
        check_replaceable(out)
    with pytest.raises(ValueError, match="photos exists and is not a detector folder; choose another --out"):
        write_detector(out, record, WEIGHTS)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    assert kind != "file" or out.read_text() == "precious"
    assert kind != "folder" or (out / "holiday.png").read_text() == "precious"


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_while_writing_leaves_what_was_there(record: DetectorRecord, tmp_path: Path, exists: bool) -> None:
    if exists:
        write_detector(tmp_path / "screw", record, WEIGHTS)
    with pytest.raises(TypeError):
        write_detector(
            tmp_path / "screw", dataclasses.replace(record, step=900), WEIGHTS, np.zeros((2, 2, 7), np.uint8)
        )
    assert [path.name for path in tmp_path.iterdir()] == (["screw"] if exists else [])
    assert not exists or read_record(tmp_path / "screw") == record


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_detector_is_refused_in_one_line(copied: Path, damage: str) -> None:
    act, word = DAMAGES[damage]
    act(copied)
    for read in (read_record, Detector.load):
        with pytest.raises(BrokenDetectorError, match=word) as raised:
            read(copied)
        assert "\n" not in str(raised.value) and str(copied) in str(raised.value)


class Touch:
    """Unpickled, it would run a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch pickle-was-here",)


@pytest.mark.parametrize(
    "forged",
    [
        pickle.dumps(Touch()),
        (2**40).to_bytes(8, "little") + b"{" * 1000,  # a header of a terabyte
        (8).to_bytes(8, "little") + b"{" * 8,
        b'@\0\0\0\0\0\0\0{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999999]}}',
    ],
    ids=["a pickle", "an oversized header", "a header that is no JSON", "offsets beyond the file"],
)
def test_forged_weights_are_refused_though_the_record_vouches_for_them(
    copied: Path, forged: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copied.parent)
    (copied / WEIGHTS_FILE).write_bytes(forged)
    edit(copied, lambda record: record["weights"].update(sha256=sha256_of(copied / WEIGHTS_FILE)))
    with pytest.raises(BrokenDetectorError, match=WEIGHTS_FILE) as raised:
        Detector.load(copied)
    assert "\n" not in str(raised.value)
    assert not (copied.parent / "pickle-was-here").exists()


def test_weights_that_do_not_fit_the_configuration_are_refused(copied: Path) -> None:
    weights = safetensors.torch.load_file(copied / WEIGHTS_FILE)
    weights.pop(next(name for name in weights if name.startswith("students.") and name.endswith("weight")))
    safetensors.torch.save_file(weights, copied / WEIGHTS_FILE)
    edit(copied, lambda document: document["weights"].update(sha256=sha256_of(copied / WEIGHTS_FILE)))
    read_record(copied)
    with pytest.raises(BrokenDetectorError, match="do not fit its configuration") as raised:
        Detector.load(copied)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_safetensors_is_refused_whatever_its_hash(copied: Path) -> None:
    torch.save({"teacher.a": torch.zeros(3)}, copied / WEIGHTS_FILE)
    edit(copied, lambda document: document["weights"].update(sha256=sha256_of(copied / WEIGHTS_FILE)))
    with pytest.raises(BrokenDetectorError, match="cannot be read") as raised:
        read_detector(copied)
    assert "\n" not in str(raised.value)


def test_fields_that_a_later_writer_adds_beside_the_known_are_passed_over(copied: Path) -> None:
    before = read_record(copied)
    edit(copied, lambda document: document.update(operator="Ada"))
    assert read_record(copied) == before


def test_a_detector_of_the_first_schema_loads_with_defaults_for_what_it_did_not_know(
    detector_folder: Path, copied: Path
) -> None:
    def age(document: dict[str, Any]) -> None:
        document["schema"] = 1
        del document["versions"]["dskd"]
        del document["config"]["amplification"]

    edit(copied, age)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    old, new = Detector.load(copied), Detector.load(detector_folder)
    assert old.record == new.record and not old.record.config.amplification.amplification
    np.testing.assert_array_equal(old.score_images(images).maps, new.score_images(images).maps)


def test_a_record_from_before_calibration_was_split_off_says_that_its_rates_are_approximate(
    copied: Path,
) -> None:
    def to_older(document: dict[str, Any]) -> None:
        del document["calibration_files"], document["false_alarm_rates"]
        del document["config"]["data"]["calibration_fraction"]

    assert not read_record(copied).is_approximate
    edit(copied, to_older)
    older = Detector.load(copied).record
    assert older.calibration_files == older.validation_files and older.is_approximate
    assert older.config.data.calibration_fraction == 0


def test_loading_never_unpickles(detector_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a detector must load without pickle")

    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, refuse)
    detector = Detector.load(detector_folder)
    assert detector.score_images(np.zeros((1, 32, 32, 3), np.uint8)).maps.shape == (1, 32, 32)


def test_figures_can_be_added_beside_unchanged_weights(copied: Path) -> None:
    before, weights = read_record(copied), sha256_of(copied / WEIGHTS_FILE)
    rewrite_record(copied, before.with_metrics({"test/aupro": 0.5}))
    assert read_record(copied).metrics == {**before.metrics, "test/aupro": 0.5}
    assert "test/aupro" not in before.metrics
    assert sha256_of(copied / WEIGHTS_FILE) == weights
    assert not list(copied.glob(".*"))


def test_the_record_says_how_to_preprocess_and_what_wrote_it(detector_folder: Path) -> None:
    document = json.loads((detector_folder / RECORD_FILE).read_text())
    assert document["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert document["versions"]["dskd"] == dskd.__version__
    assert document["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert document["weights"] == {"file": WEIGHTS_FILE, "sha256": sha256_of(detector_folder / WEIGHTS_FILE)}
    assert document["schema"] == SCHEMA_VERSION


def test_the_version_names_what_decides_the_verdicts(copied: Path, detector_folder: Path) -> None:
    before = read_record(copied)
    assert re.fullmatch(r"[0-9a-f]{12}", before.detector_version)
    assert json.loads((copied / RECORD_FILE).read_text())["detector_version"] == before.detector_version
    rewrite_record(copied, before.with_metrics({"test/aupro": 0.5}))
    assert read_record(copied).detector_version == before.detector_version, "a figure changes no verdict"
    edit(copied, lambda document: document.pop("detector_version"))
    assert read_record(copied).detector_version == before.detector_version, "older records have one too"
    scores = json.loads((copied / RECORD_FILE).read_text())["normal_scores"]
    edit(copied, lambda document: document.update(normal_scores=[score / 2 for score in scores]))
    assert read_record(copied).detector_version != before.detector_version, "they give the thresholds of other rates"
    edit(copied, lambda document: document.update(normal_scores=scores))
    edit(copied, lambda document: document["thresholds"][0].update(value=before.thresholds[0].value + 1))
    assert read_record(copied).detector_version != before.detector_version
