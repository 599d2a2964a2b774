import base64
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray
import tifffile
from PIL import Image

from dskd.cli.main import predict
from dskd.data.depth import PixelScale
from dskd.data.geometry import Geometry
from dskd.detector import Detector
from dskd.predict import PREDICTIONS_FILE, predict_images
from tune import score
from tune.jobs import score as scoring
from tune.jobs.score import SCHEMA, Inspector, decode, fetch_detector, image_names
from tune.settings.score import ScoringSettings
from tune.settings.workers import Workers
from tune.storage.files import Storage
from tune.tracking.registry import pack
from tune.tracking.tracker import Tracker


def settings(detector: object, **values: Any) -> ScoringSettings:
    return ScoringSettings(**{"detector": str(detector), "images": "images", "out": "out"} | values)


@pytest.fixture
def images(mvtec_root: Path, tmp_path: Path) -> Path:
    """Eight good ones, one that is none, and what is no image at all."""
    folder = tmp_path / "images"
    shutil.copytree(mvtec_root / "tile" / "test", folder)
    (folder / "good" / "001b.JPG").write_text("not really")
    (folder / "notes.txt").write_text("none")
    return folder


def test_every_image_below_a_folder_or_an_address_is_found(images: Path, tmp_path: Path) -> None:
    names = image_names(str(images))
    assert len(names) == 9 and names[2] == "good/001b.JPG" and names == sorted(names)
    assert image_names(f"file://{images}") == names
    (tmp_path / "empty").mkdir()
    for wrong, message in ((tmp_path / "empty", "holds no image"), (tmp_path / "none", "is no folder")):
        with pytest.raises(ValueError, match=message):
            image_names(str(wrong))


def test_hidden_and_service_files_are_no_images_anywhere(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = image_names(str(images))
    for place in ("@eaDir/x.png/thumb.jpg", "__MACOSX/a.png", "good/._001.png", ".cache/a.png"):
        (images / place).parent.mkdir(parents=True, exist_ok=True)
        (images / place).write_bytes(b"x")
    for address in (str(images), f"file://{images}"):
        capsys.readouterr()
        assert image_names(address) == before
        said = capsys.readouterr().err
        assert "1 .txt" in said and "4 hidden or service files" in said


def test_deep_images_take_the_scale_of_the_detector_and_clipped_values_are_counted(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.full((32, 32), 100 * 16, np.uint16))
    tifffile.imwrite(tmp_path / "b.tif", np.full((32, 32), 5000, np.uint16))
    names = {"name": np.array(["a.tif", "b.tif"], object)}
    seen = decode(names, str(tmp_path), Geometry.square(32), PixelScale(kind="integer", step=16.0))
    assert seen["error"].tolist() == ["", ""] and seen["num_clipped"].tolist() == [0, 32 * 32]
    assert (seen["pixels"][0] == 100).all() and (seen["pixels"][1] == 255).all()
    refused = decode(names, str(tmp_path), Geometry.square(32), PixelScale(kind="none"))
    assert all("8 bits per channel" in error for error in refused["error"])


def rows_of(
    names: list[str], images: str, detector_folder: Path, out: Path, overlays: str, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """What the two stages make of the images, without a cluster between them."""
    files = {file.name: file.read_bytes() for file in detector_folder.iterdir() if file.suffix != ".png"}
    monkeypatch.setattr(ray, "get", lambda given: given)
    limit = Detector.load(detector_folder).threshold(0.01).value
    inspector = Inspector(files, limit, images, str(out), overlays, Workers(1, 1.0, 0.0))  # type: ignore[arg-type]
    decoded = decode({"name": np.array(names, object)}, images, Geometry.square(32))
    assert decoded["pixels"].shape == (len(names), 32, 32, 3)
    table = inspector(decoded)
    assert isinstance(table, pa.Table) and table.schema == SCHEMA
    return list(table.to_pylist())


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_verdicts_are_those_of_predict_and_an_unreadable_image_is_a_row(
    scheme: str, images: Path, detector_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = image_names(str(images))
    rows = rows_of(names, f"{scheme}{images}", detector_folder, tmp_path / "out", "anomalous", monkeypatch)
    assert [row["image"] for row in rows] == [f"{scheme}{images}/{name}" for name in names]
    (broken,) = [row for row in rows if row["error"]]
    assert broken["image"].endswith("good/001b.JPG") and f"{images}/good/001b.JPG is not a readable" in broken["error"]
    assert broken["verdict"] == "unreadable" and list(broken) == SCHEMA.names
    assert broken["score"] is broken["is_anomalous"] is broken["regions"] is broken["overlay"] is None

    (images / "good" / "001b.JPG").unlink()
    predict(detector_folder, (images,), out=tmp_path / "predicted")
    lines = (tmp_path / "predicted" / "predictions.jsonl").read_text().splitlines()
    expected = {each["image"]: each for each in map(json.loads, lines)}
    sound = [row for row in rows if not row["error"]]
    assert len(sound) == len(expected) == 8 and {row["is_anomalous"] for row in sound} == {True, False}
    for row in sound:
        there = expected[row["image"].removeprefix("file://")]
        assert row["score"] == pytest.approx(there["score"], rel=1e-6)
        assert row["is_anomalous"] == (there["verdict"] == "anomalous") and row["threshold"] == there["threshold"]
        boxes = [[region[side] for side in ("left", "top", "right", "bottom")] for region in row["regions"]]
        assert boxes == [[region[side] for side in ("left", "top", "right", "bottom")] for region in there["regions"]]
        assert (row["overlay"] is not None) == row["is_anomalous"]
        if row["overlay"]:
            with Image.open(tmp_path / "out" / row["overlay"]) as picture:
                assert picture.width > 0
    assert len(list((tmp_path / "out").rglob("*.webp"))) == sum(row["is_anomalous"] for row in sound)


def test_predict_score_and_the_served_model_say_the_same_in_the_same_words(
    images: Path, detector_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "good" / "001b.JPG").unlink()
    names = image_names(str(images))
    detector, paths = Detector.load(detector_folder), [images / name for name in names]
    told = predict_images(detector, paths, tmp_path / "told").predictions
    lines = (tmp_path / "told" / PREDICTIONS_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == told
    scored = rows_of(names, str(images), detector_folder, tmp_path / "scored", "all", monkeypatch)
    pack(detector_folder, tmp_path / "model")
    served_model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    texts = [base64.b64encode(path.read_bytes()).decode() for path in paths]
    served = served_model.predict(pd.DataFrame({"image": texts})).to_dict("records")

    assert {line["verdict"] for line in told} == {"good", "anomalous"}
    assert {line["detector_version"] for line in told} == {detector.record.detector_version} != {""}
    assert all(bool(line["regions"]) == line["is_anomalous"] == (line["verdict"] == "anomalous") for line in told)
    assert [row["image"] for row in served] == [f"row {number}" for number in range(8)]
    for one, other, third in zip(told, scored, served, strict=True):
        assert list(one) == list(other) == list(third)
        assert one["image"] == other["image"] and other["overlay"] and one["overlay"] and third["overlay"] is None
        own = {"image", "overlay"}
        assert {k: v for k, v in one.items() if k not in own} == {k: v for k, v in other.items() if k not in own}
        assert {k: v for k, v in one.items() if k not in own} == {k: v for k, v in third.items() if k not in own}


def test_overlays_are_drawn_of_all_or_of_none(
    images: Path, detector_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["good/000.png", "good/001b.JPG", "scratch/000.png"]
    for wanted, expected in (
        ("all", ["overlays/good/000.png.webp", None, "overlays/scratch/000.png.webp"]),
        ("none", [None] * 3),
    ):
        rows = rows_of(names, str(images), detector_folder, tmp_path / wanted, wanted, monkeypatch)
        assert [row["overlay"] for row in rows] == expected


def test_a_detector_comes_from_a_folder_an_address_or_mlflow(detector_folder: Path, tmp_path: Path) -> None:
    assert fetch_detector(settings(detector_folder), tmp_path) == detector_folder
    Storage(str(tmp_path / "bucket")).upload(detector_folder, "champions/tile")
    address = f"file://{tmp_path}/bucket/champions/tile"
    found = fetch_detector(settings(address), tmp_path / "a")
    assert (found / "detector.json").read_bytes() == (detector_folder / "detector.json").read_bytes()

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker(uri, "s", artifact_location=f"file://{tmp_path}/artifacts", tags={}, unsent=tmp_path / "unsent")
    done = tracker.register_champion("tile", "one", detector_folder, {"val/objective": 0.5}, "data", patience=60)
    assert tracker.close(60) == 0
    for number, name in enumerate(("models:/dskd-tile@champion", "models:/dskd-tile/1", f"runs:/{done.run_id}/model")):
        found = fetch_detector(settings(name, tracking_uri=uri), tmp_path / f"m{number}")
        assert (found / "model.safetensors").read_bytes() == (detector_folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="models:/dskd-none@champion cannot be downloaded from MLflow at sqlite:"):
        fetch_detector(settings("models:/dskd-none@champion", tracking_uri=uri), tmp_path / "n")
    with pytest.raises(ValueError, match="holds no detectors"):
        Storage(str(tmp_path / "bucket")).write("champions/wood/readme.txt", b"")
        fetch_detector(settings(f"file://{tmp_path}/bucket/champions/wood"), tmp_path / "w")


@pytest.mark.parametrize(
    ("asked", "have", "expected"),
    [
        ({}, {"CPU": 2}, Workers(1, 1.0, 0.0)),
        ({}, {"CPU": 64}, Workers(16, 1.0, 0.0)),
        ({}, {"CPU": 64, "GPU": 4}, Workers(4, 1.0, 1.0)),
        ({"gpus_per_worker": 0.5}, {"CPU": 64, "GPU": 4}, Workers(8, 1.0, 0.5)),
        ({"concurrency": 3, "cpus_per_worker": 2.0}, {"CPU": 7}, Workers(3, 2.0, 0.0)),
        ({"concurrency": 3, "address": "auto"}, {"CPU": 2}, Workers(3, 1.0, 0.0)),
        ({}, {"CPU": 1}, "1 workers of 1 CPUs and 0 GPUs, .* lower --concurrency"),
        ({"gpus_per_worker": 1.0}, {"CPU": 8}, "1 workers of 1 CPUs and 1 GPUs, .* and 0 GPUs; lower"),
        ({"precision": "float16"}, {"CPU": 8}, "--precision float16 needs GPUs, and the workers have none"),
        ({"precision": "float16"}, {"CPU": 64, "GPU": 4}, Workers(4, 1.0, 1.0)),
    ],
)
def test_workers_fill_the_cluster_and_leave_room_to_read_and_write(
    asked: dict[str, Any], have: dict[str, float], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: have)
    if isinstance(expected, Workers):
        assert scoring.choose_workers(settings("d", **asked), 1000) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            scoring.choose_workers(settings("d", **asked), 1000)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--images i --out o", "tune/score.py: error: missing DETECTOR"),
        (
            "d --images i --out o --false-alarm-rate 1",
            "score.py: error: --false-alarm-rate must lie in (0, 1), got 1.0",
        ),
        ("d --images i --out o --overlay all", "unknown flag --overlay, did you mean --overlays?"),
        ("models:/m@champion --images i --out o", "models:/m@champion lies in MLflow: give --tracking-uri"),
        ("d --images {tmp}/none --out {tmp}/out", "none is no folder; give a folder or s3://bucket/path"),
        ("{tmp} --images {images} --out {tmp}/out", "is not a detector folder"),
        ("{tmp} --images {images} --out {images}", "holds an unfinished output or other files; choose another"),
    ],
)
def test_bad_usage_is_one_line(
    line: str, expected: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["tune/score.py", *line.format(tmp=tmp_path, images=images).split()])
    with pytest.raises(SystemExit) as end:
        score.main()
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and expected in said.err
