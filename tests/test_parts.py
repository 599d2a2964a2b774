"""Parts that several images show: together when images are held out, and one verdict each."""

import base64
import json
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dskd.calibration import Threshold, calibrate
from dskd.checkpoint import RECORD_FILE, write_detector
from dskd.cli.main import main
from dskd.config import DataConfig, DataSpec, RunConfig, TeacherSource
from dskd.data.datasets import hold_out, split_calibration
from dskd.data.parts import PartVerdict, judge_parts, part_name, worst_scores
from dskd.data.samples import Sample
from dskd.detector import Detector
from dskd.predict import PARTS_FILE, PREDICTIONS_FILE, SUMMARY_FILE, predict_images
from dskd.training.inputs import prepare
from dskd.training.run import TrainingRun
from tune.jobs.score import SCHEMA, VERDICTS, write_parts
from tune.settings.score import ScoringSettings
from tune.storage.files import Storage
from tune.tracking.registry import pack

PATTERN = r"part(\d+)_cam"


def views(parts: int, cameras: int = 3) -> list[Sample]:
    return [
        Sample(Path(f"/a/b/part{part}_cam{cam}.png"), "good", None) for part in range(parts) for cam in range(cameras)
    ]


@pytest.mark.parametrize(
    ("image", "pattern", "name"),
    [
        ("lot/A12_cam1.png", r"([^/]+)_cam", "A12"),
        ("day2/cam1/A12.png", r"(day\d)/cam\d/(\w+)", "day2/A12"),
        ("A12_cam1.png", r"A\d+", "A12"),
        ("/part9_cam/x/y/part3_cam1.png", PATTERN, "3"),
        ("other.png", PATTERN, "other.png"),
        ("x_cam1.png", r"(\d)?x_(?:cam)", "x_cam"),
    ],
)
def test_a_part_is_named_by_the_pattern(image: str, pattern: str, name: str) -> None:
    assert part_name(image, pattern) == name


def test_no_part_is_torn_when_images_are_held_out() -> None:
    for seed in range(8):
        train, held = hold_out(views(10), 0.2, seed, PATTERN)
        select, calibrate_on = split_calibration(held, 0.5, seed, PATTERN)
        sides = [{part_name(str(sample.path), PATTERN) for sample in side} for side in (train, select, calibrate_on)]
        assert all(sides) and sum(map(len, sides)) == 10 == len(set.union(*sides))
        assert len(train) + len(held) == 30 and len(held) == 6
        assert hold_out(views(10)[::-1], 0.2, seed, PATTERN)[1] == held[::-1], "by name, not by order"
    torn = hold_out(views(10), 0.2, 0)[1]
    assert len({part_name(str(sample.path), PATTERN) for sample in torn}) > 2, "without a pattern parts are torn"
    train, held = hold_out(views(1), 0.2, 0, PATTERN)
    assert len(train) == 2 and len(held) == 1


def test_the_worst_view_decides() -> None:
    images = [
        ("1_a.png", 0.2), ("2_a.png", 0.1), ("1_b.png", 0.9), ("3_a.png", 0.4), ("3_b.png", None),
        ("4_a.png", 0.8), ("4_b.png", None), ("5_a.png", None), ("2_b.png", 0.5),
    ]  # fmt: skip
    assert judge_parts(images, r"(\d)_", 0.5) == [
        PartVerdict("1", "anomalous", 0.9, 0.5, "1_b.png", 2, 0),
        PartVerdict("2", "good", 0.5, 0.5, "2_b.png", 2, 0),
        PartVerdict("3", "unreadable", 0.4, 0.5, "3_b.png", 2, 1),
        PartVerdict("4", "anomalous", 0.8, 0.5, "4_a.png", 2, 1),
        PartVerdict("5", "unreadable", None, 0.5, "5_a.png", 1, 1),
    ]
    assert worst_scores([Path(name) for name, _ in images[:3]], [0.2, 0.1, 0.9], r"(\d)_") == [0.9, 0.1]


@pytest.mark.parametrize(
    ("pattern", "message"), [("(", "group_by must be a regular expression, got '\\('"), ("a" * 501, "at most 500")]
)
def test_a_pattern_that_is_none_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(group_by=pattern)


@pytest.fixture(scope="module")
def parts_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 good parts of two views each to train on; to test a good part, one with a defect in its second view."""
    root = tmp_path_factory.mktemp("parts")
    rng = np.random.default_rng(0)
    for part in range(14):
        for camera in range(2):
            pixels = np.full((40, 40, 3), 100 + 40 * camera) + rng.normal(0, 5, (40, 40, 3))
            if part == 13 and camera == 1:
                pixels[10:26, 10:26] = (250, 10, 10)
            place = "train/good" if part < 12 else "test"
            path = root / "nut" / place / f"part{part}_cam{camera}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def folder(parts_root: Path, tiny: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.with_values({"group_by": PATTERN, "validation_fraction": 0.5, "epochs": 8})
    spec = DataSpec(data=parts_root, category="nut", teacher=TeacherSource("random"))
    run = TrainingRun.begin(config, prepare(config, spec, device=torch.device("cpu"), cache=None), torch.device("cpu"))
    for _ in run.intervals():
        pass
    folder = tmp_path_factory.mktemp("detectors") / "nut"
    write_detector(folder, *run.detector())
    return folder


def test_thresholds_of_parts_rest_on_parts(folder: Path, parts_root: Path) -> None:
    record = Detector.load(folder).record
    assert len(record.calibration_files) == 6
    paths = [parts_root / "nut/train/good" / name for name in record.calibration_files]
    scores = [seen.score for seen in Detector.load(folder).predict(paths, 1.0)]
    pairs: dict[str, list[float]] = {}
    for path, score in zip(paths, scores, strict=True):
        pairs.setdefault(part_name(path.name, PATTERN), []).append(score)
    assert len(pairs) == 3 and all(len(pair) == 2 for pair in pairs.values())
    (expected,) = calibrate([max(pair) for pair in pairs.values()])
    (found,) = record.part_thresholds
    assert found.num_normals == 3 and found.false_alarm_rate == expected.false_alarm_rate == 0.25
    assert found.value == pytest.approx(expected.value, rel=1e-4)
    assert record.thresholds[0].num_normals == 6


def test_parts_get_a_verdict_beside_those_of_their_images(folder: Path, parts_root: Path, tmp_path: Path) -> None:
    paths = sorted((parts_root / "nut/test").iterdir())
    (tmp_path / "part12_cam2.png").write_bytes(b"cut")
    detector = Detector.load(folder)
    scores = [seen.score for seen in detector.predict(paths, 1.0)]
    limit = max(scores) * 0.95
    assert scores.index(max(scores)) == 3
    summary = predict_images(detector, [*paths, tmp_path / "part12_cam2.png"], tmp_path / "out", threshold=limit)
    lines = [json.loads(line) for line in (tmp_path / "out" / PARTS_FILE).read_text().splitlines()]
    assert lines == summary.parts
    first, second = lines
    assert (first["part"], first["verdict"], first["num_images"], first["num_unreadable"]) == ("12", "unreadable", 3, 1)
    assert (second["part"], second["verdict"], second["image"]) == ("13", "anomalous", str(paths[3]))
    assert second["score"] == max(scores)
    assert len((tmp_path / "out" / PREDICTIONS_FILE).read_text().splitlines()) == 5
    document = json.loads((tmp_path / "out" / SUMMARY_FILE).read_text())
    assert (document["num_parts"], document["num_anomalous_parts"], document["part_threshold"]) == (2, 1, limit)
    # with the rate that was asked for, parts are measured by their own threshold
    calibrated = predict_images(detector, paths, tmp_path / "rate", false_alarm_rate=0.3)
    assert {part["threshold"] for part in calibrated.parts} == {detector.part_threshold(0.3).value}
    # another naming than in training
    other = predict_images(detector, paths, tmp_path / "other", group_by=r"_cam(\d)")
    assert [part["part"] for part in other.parts] == ["0", "1"]


def test_batch_inspection_tells_parts_too(folder: Path, tmp_path: Path) -> None:
    detector = Detector.load(folder)
    limit = detector.part_threshold(0.3).value
    rows = [("s3://b/x/part1_cam0.png", limit * 2), ("s3://b/x/part1_cam1.png", 0.0), ("s3://b/x/part2_cam0.png", None)]
    (tmp_path / VERDICTS).mkdir()
    table = pa.Table.from_pylist([{"image": image, "score": score} for image, score in rows], schema=SCHEMA)
    pq.write_table(table, tmp_path / VERDICTS / "0.parquet")
    settings = ScoringSettings(detector=str(folder), images="s3://b/x", out=str(tmp_path), false_alarm_rate=0.3)
    assert write_parts(settings, Storage(str(tmp_path), "--out"), detector) == {
        "num_parts": 2,
        "num_anomalous_parts": 1,
    }
    lines = [json.loads(line) for line in (tmp_path / PARTS_FILE).read_text().splitlines()]
    assert [(line["part"], line["verdict"], line["image"]) for line in lines] == [
        ("1", "anomalous", rows[0][0]), ("2", "unreadable", rows[2][0])
    ]  # fmt: skip


def test_a_served_detector_tells_parts_of_images_that_are_named(folder: Path, parts_root: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "model")
    served = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    paths = sorted((parts_root / "nut/test").iterdir())
    texts = [base64.b64encode(path.read_bytes()).decode() for path in paths] + ["no image"] * 2
    names = [*map(str, paths), "part12_cam2.png", None]
    found = served.predict(pd.DataFrame({"image": texts, "name": names}), params={"false_alarm_rate": 0.3})
    detector = Detector.load(folder)
    scores = [seen.score for seen in detector.predict(paths, 1.0)]
    named = zip(map(str, names[:5]), [*scores, None], strict=True)
    parts = {part.part: part for part in detector.judge_parts(named, 0.3)}
    assert found["image"].tolist() == [*names[:5], "row 5"]
    assert found["part"].tolist() == ["12", "12", "13", "13", "12", None]
    for name, expected in (("part_verdict", "verdict"), ("part_score", "score"), ("part_threshold", "threshold")):
        assert found[name].tolist() == [getattr(parts.get(part), expected, None) for part in found["part"]]
    assert parts["12"].num_unreadable == 1 and parts["13"].score == max(scores)
    assert served.metadata.signature.outputs.input_names() == list(found.columns)
    without = served.predict(pd.DataFrame({"image": texts[:2]}))
    assert without["image"].tolist() == ["row 0", "row 1"] and not without["part_verdict"].notna().any()


def test_a_detector_without_parts_says_so(
    detector_folder: Path, mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(mvtec_root / "tile/test/good/000.png")
    command = ["predict", str(detector_folder), image, "--out", str(tmp_path / "out")]
    for pattern, message in (("(a)", "no thresholds of parts; train it with --group-by"), ("(", "regular expression")):
        with pytest.raises(SystemExit, match="2"):
            main([*command, "--group-by", pattern])
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    main(command)
    assert not (tmp_path / "out" / PARTS_FILE).exists()


def test_an_older_record_has_no_thresholds_of_parts(folder: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.mkdir()
    (older / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    document: dict[str, Any] = json.loads((folder / RECORD_FILE).read_text())
    del document["part_thresholds"], document["config"]["data"]["group_by"]
    (older / RECORD_FILE).write_text(json.dumps(document))
    assert Detector.load(older).record.part_thresholds == ()
    document["part_thresholds"] = [Threshold(0.1, float("inf"), 3)._asdict()]
    (older / RECORD_FILE).write_text(json.dumps(document))
    with pytest.raises(ValueError, match="is damaged"):
        Detector.load(older)
