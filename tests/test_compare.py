"""Two detectors on the same images."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from dskd.checkpoint import RECORD_FILE
from dskd.cli.main import compare
from dskd.detector import Detector


def test_compare_tells_where_two_detectors_differ(
    detector_folder: Path, mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = mvtec_root / "tile/test"
    scores = sorted(seen.score for seen in Detector.load(detector_folder).predict(sorted(images.rglob("*.png"))))
    folders = []
    for name, limit in (("a", (scores[2] + scores[3]) / 2), ("b", (scores[4] + scores[5]) / 2)):
        folders.append(shutil.copytree(detector_folder, tmp_path / name))
        document = json.loads((folders[-1] / RECORD_FILE).read_text())
        for threshold in document["thresholds"]:
            threshold["value"] = limit
        (folders[-1] / RECORD_FILE).write_text(json.dumps(document))
    first, second = folders
    compare(first, second, (images,), out=tmp_path / "out", json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["num_images"], told["num_anomalous"], told["num_only_first"], told["num_only_second"]) == (
        8, [5, 3], 2, 0
    )  # fmt: skip
    assert all(seconds > 0 for seconds in told["seconds_per_image"])
    rows = [json.loads(line) for line in (tmp_path / "out/comparison.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [str(path) for path in sorted(images.rglob("*.png"))]
    for row in rows:
        assert row["a"]["score"] == row["b"]["score"] and row["a"]["detector_version"] != row["b"]["detector_version"]
        assert row["differs"] == (row["a"]["verdict"] != row["b"]["verdict"]) == (row["picture"] is not None)
        if row["picture"]:
            with Image.open(tmp_path / "out" / row["picture"]) as picture:
                assert picture.height > 2 * 384
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["a"]["threshold"] < summary["b"]["threshold"] and summary["a"]["category"] == "tile"

    compare(first, second, (images,), out=tmp_path / "spoken")
    said = capsys.readouterr()
    assert sum(line.startswith("≠ anomalous") for line in said.out.splitlines()) == 2
    assert "2 of 8 verdicts differ: 2 anomalous for A alone, 0 for B alone" in said.err
    with pytest.raises(ValueError, match="choose another --out"):
        compare(first, second, (images,), out=tmp_path / "out")


def test_an_image_that_cannot_be_read_has_no_verdict_of_either(
    detector_folder: Path, mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"garbage")
    images = (tmp_path / "broken.png", mvtec_root / "tile/test/good/000.png")
    with pytest.raises(SystemExit) as end:
        compare(detector_folder, detector_folder, images, out=tmp_path / "out")
    said = capsys.readouterr()
    assert end.value.code == 1 and "0 of 2 verdicts differ, 1 unreadable" in said.err
    assert said.out.splitlines()[0].split()[:2] == ["unreadable", "unreadable"]
