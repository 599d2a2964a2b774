import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dskd import detector as detector_module
from dskd import predict as predict_module
from dskd.calibration import p_value
from dskd.detector import Detector, Unreadable
from dskd.evaluate import AnomalyScores
from dskd.predict import OVERLAYS_FOLDER, PREDICTIONS_FILE, SUMMARY_FILE, find_images, predict_images


@pytest.fixture(scope="module")
def detector(detector_folder: Path) -> Detector:
    return Detector.load(detector_folder)


@pytest.fixture(scope="module")
def photos(mvtec_root: Path) -> list[Path]:
    return sorted((mvtec_root / "tile/test").rglob("*.png"))


def rows(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / PREDICTIONS_FILE).read_text().splitlines()]


def mixed(root: Path, photo: Path, count: int) -> Counter[str]:
    """`count` files of every kind below `root`; how many of them are images, unreadable ones and others."""
    whole = photo.read_bytes()
    pixels = np.asarray(Image.open(photo).convert("RGB").resize((24, 24)))
    kinds: Counter[str] = Counter()
    for index in range(count):
        folder = root / f"lot{index % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        place, kind = folder / f"{index:04d}", index % 20
        if kind == 0:
            (folder / f"._{index:04d}.png").write_bytes(b"AppleDouble")
        elif kind == 1:
            (folder / "@eaDir" / f"{index:04d}.png").mkdir(parents=True)
            (folder / "@eaDir" / f"{index:04d}.png" / "SYNOPHOTO_THUMB_M.jpg").write_bytes(whole)
        elif kind == 2:
            place.with_suffix(".txt").write_text("notes")
        elif kind == 3:
            (folder / "__MACOSX").mkdir(exist_ok=True)
            (folder / "__MACOSX" / f"{index}.png").write_bytes(whole)
        elif kind == 4:
            place.with_suffix(".png").write_bytes(whole[: len(whole) // 2])
        elif kind == 5:
            place.with_suffix(".png").touch()
        elif kind == 6:
            place.with_suffix(".png").symlink_to(root / "gone")
        elif kind == 7:
            os.mkfifo(place.with_suffix(".png"))
        elif kind == 8:
            place.with_suffix(".tif").write_bytes(b"II*\0damaged")
        elif kind == 9:
            tifffile.imwrite(place.with_suffix(".tif"), np.zeros((2, 8, 8), np.uint8), photometric="minisblack")
        elif kind == 10:
            tifffile.imwrite(place.with_suffix(".tif"), pixels[..., 0].astype(np.uint16) * 16)
        elif kind == 11:
            place.with_suffix(".png").symlink_to("/dev/zero")
        elif kind == 12:
            (folder / ("x" * 236 + f"{index:04d}.png")).write_bytes(whole)
        elif kind == 13:
            Path(os.fsdecode(os.fsencode(folder) + b"/\xff" + str(index).encode() + b".png")).write_bytes(whole)
        elif kind == 14:
            exif = Image.Exif()
            exif[274] = 6
            Image.fromarray(pixels).save(place.with_suffix(".jfif"), "JPEG", exif=exif)
        elif kind == 15:
            Image.fromarray(pixels).convert("RGBA").save(place.with_suffix(".webp"))
        elif kind == 16:
            Image.fromarray(pixels[..., 0]).save(place.with_suffix(".pgm"))
        elif kind == 17:
            Image.fromarray(pixels).convert("P").save(place.with_suffix(".png"))
        else:
            place.with_suffix(".PNG").write_bytes(whole)
        kinds[
            "left out" if kind in (0, 1, 3) else "other" if kind == 2
            # deep values have no scale where the detector was trained on 8 bits
            else "unreadable" if kind in (4, 5, 6, 7, 8, 9, 10, 11) else "seen"
        ] += 1  # fmt: skip
    (root / "again").symlink_to(root)
    return kinds


def inspect_mixed(detector: Detector, photo: Path, tmp_path: Path, count: int) -> None:
    kinds = mixed(tmp_path / "in", photo, count)
    found = find_images([tmp_path / "in"])
    assert len(found.images) == kinds["seen"] + kinds["unreadable"]
    assert found.others == {".txt": kinds["other"]} and sum(found.left_out.values()) == kinds["left out"]
    summary = predict_images(detector, found.images, tmp_path / "out")
    assert summary.num_unreadable == kinds["unreadable"]
    written = rows(tmp_path / "out")
    assert written == summary.predictions and [row["image"] for row in written] == [str(path) for path in found.images]
    for row in written:
        assert (row["verdict"] == "unreadable") == (row["score"] is None) == (row["error"] is not None)
        if row["overlay"] is not None:
            assert (tmp_path / "out" / str(row["overlay"])).is_file()
    assert json.loads((tmp_path / "out" / SUMMARY_FILE).read_text())["num_images"] == len(written)


def test_a_folder_of_mixed_files_is_inspected_to_its_end(detector: Detector, mvtec_root: Path, tmp_path: Path) -> None:
    inspect_mixed(detector, mvtec_root / "tile/test/good/000.png", tmp_path, 80)


@pytest.mark.slow
def test_a_folder_of_a_thousand_mixed_files_is_inspected_to_its_end(
    detector: Detector, mvtec_root: Path, tmp_path: Path
) -> None:
    inspect_mixed(detector, mvtec_root / "tile/test/good/000.png", tmp_path, 1000)


def command(detector_folder: Path, images: Path, out: Path) -> list[str]:
    # chunks of two, each a while: there is a middle to be cut in
    body = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell in the background ignores
        "from dskd import detector\n"
        "detector.PREDICT_CHUNK = 2\n"
        "whole = detector.Detector.score_images\n"
        "def slowly(self, images, inside=None):\n"
        "    time.sleep(0.2)\n"
        "    return whole(self, images, inside)\n"
        "detector.Detector.score_images = slowly\n"
        "from dskd.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    return [sys.executable, "-c", body, "predict", str(detector_folder), str(images), "--out", str(out)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["KILL", "TERM", "INT"]
)
def test_what_was_seen_is_kept_when_the_inspection_is_cut_short(
    number: signal.Signals, code: int, detector_folder: Path, mvtec_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    photo = (mvtec_root / "tile/test/good/000.png").read_bytes()
    for index in range(200):
        (tmp_path / f"in/{index:03d}.png").write_bytes(photo)
    out = tmp_path / "out"
    with subprocess.Popen(
        command(detector_folder, tmp_path / "in", out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        printed = [running.stdout.readline() for _ in range(3)]
        running.send_signal(number)
        printed += running.stdout.readlines()
        said = running.stderr.read()
    assert running.returncode == code
    written = rows(out)
    assert 3 <= len(printed) <= len(written) < 200 and not (out / SUMMARY_FILE).exists()
    assert [Path(str(row["image"])).name for row in written] == [f"{index:03d}.png" for index in range(len(written))]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "out"], "nothing hidden is left behind"
    assert "Traceback" not in said and (number == signal.SIGKILL or "what was written so far stays" in said)


def test_of_two_inspections_into_one_folder_the_second_is_refused(
    detector: Detector, mvtec_root: Path, tmp_path: Path
) -> None:
    photos = sorted((mvtec_root / "tile/test/good").iterdir())
    refused: list[str] = []

    def second() -> None:
        try:
            predict_images(detector, photos, tmp_path / "out")
        except ValueError as error:
            refused.append(str(error))

    def meanwhile(_: object) -> None:
        other = threading.Thread(target=second)
        other.start()
        other.join()

    predict_images(detector, photos[:2], tmp_path / "out", on_prediction=meanwhile)
    assert len(refused) == 2 and all("out exists; choose another --out" in line for line in refused)
    assert len(rows(tmp_path / "out")) == 2


def test_an_output_inside_of_the_images_is_not_inspected_the_next_time(
    detector: Detector, mvtec_root: Path, tmp_path: Path
) -> None:
    photo = tmp_path / "in/a.png"
    photo.parent.mkdir()
    photo.write_bytes((mvtec_root / "tile/test/good/000.png").read_bytes())
    for name in ("one", "two"):
        found = find_images([tmp_path / "in"])
        assert found.images == (photo,)
        predict_images(detector, found.images, tmp_path / "in" / name)
    assert list((tmp_path / "in/two" / OVERLAYS_FOLDER).iterdir())


def test_named_files_are_taken_whatever_their_name_and_missing_ones_refused(tmp_path: Path) -> None:
    hidden, broken = tmp_path / ".hidden.dat", tmp_path / "broken.png"
    hidden.touch()
    broken.symlink_to(tmp_path / "gone")
    assert find_images([hidden, broken]).images == (hidden, broken)
    for wrong, message in ((tmp_path / "none.png", "does not exist"), (tmp_path, "holds no image")):
        if wrong == tmp_path:
            broken.unlink()
        with pytest.raises(ValueError, match=message):
            find_images([wrong])


def test_a_file_that_vanishes_midway_is_a_row_of_its_own(
    detector: Detector, mvtec_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detector_module, "PREDICT_CHUNK", 1)
    monkeypatch.setattr(predict_module, "_MAX_DRAWING", 0)
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path in paths:
        path.write_bytes((mvtec_root / "tile/test/good/000.png").read_bytes())
    summary = predict_images(
        detector, paths, tmp_path / "out", on_prediction=lambda seen: paths[2].unlink(missing_ok=True)
    )
    assert [row["verdict"] == "unreadable" for row in summary.predictions] == [False, False, True]
    assert "does not exist" in summary.predictions[2]["error"]


@pytest.mark.parametrize("overlays", ["none", "anomalous", "all"])
def test_overlays_are_drawn_of_the_images_asked_for(
    overlays: str, detector: Detector, mvtec_root: Path, tmp_path: Path
) -> None:
    photos = sorted((mvtec_root / "tile/test").rglob("*.png"))
    scores = sorted(seen.score for seen in detector.predict(photos))
    limit = (scores[3] + scores[4]) / 2
    summary = predict_images(detector, photos, tmp_path / "out", threshold=limit, overlays=overlays)  # type: ignore[arg-type]
    drawn = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out" / OVERLAYS_FOLDER).iterdir()}
    assert [Path(line["image"]) for line in summary.predictions] == photos
    named = {line["overlay"]: line["verdict"] for line in summary.predictions if line["overlay"] is not None}
    assert drawn == set(named) and len(drawn) == {"none": 0, "anomalous": 4, "all": 8}[overlays]
    assert overlays == "all" or set(named.values()) <= {"anomalous"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_no_number_is_no_verdict(
    value: float, detector: Detector, mvtec_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = sorted((mvtec_root / "tile/test/good").iterdir())[:2]
    whole = Detector.score_images

    def broken(self: Detector, images: np.ndarray, inside: np.ndarray | None = None) -> AnomalyScores:
        seen = whole(self, images, inside)
        seen.scores[0] = seen.maps[0, 3, 3] = value
        return seen

    monkeypatch.setattr(Detector, "score_images", broken)
    first, second = detector.inspect(photos, 0.1)
    assert isinstance(first, Unreadable) and "no finite score" in first.error and not isinstance(second, Unreadable)
    with pytest.raises(ValueError, match="no finite score"):
        list(detector.predict(photos, 0.1))
    assert predict_images(detector, photos, tmp_path / "out").num_unreadable == 1
    for threshold in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="--threshold must be a finite number"):
            list(detector.predict(photos, threshold))


def test_names_of_any_length_get_an_overlay(detector: Detector, mvtec_root: Path, tmp_path: Path) -> None:
    photo = (mvtec_root / "tile/test/good/000.png").read_bytes()
    paths = [tmp_path / f"{'ä' * 120}{index}.png" for index in range(2)]
    for path in paths:
        path.write_bytes(photo)
    summary = predict_images(detector, paths, tmp_path / "out")
    assert len({row["overlay"] for row in summary.predictions}) == 2
    assert all((tmp_path / "out" / row["overlay"]).is_file() for row in summary.predictions)


def test_each_verdict_has_its_p_value_and_the_summary_the_rates(
    detector: Detector, photos: list[Path], tmp_path: Path
) -> None:
    record = detector.record
    found = predict_images(detector, photos, tmp_path / "out", false_alarm_rate=0.01)
    for line in found.predictions:
        assert line["p_value"] == p_value(record.normal_scores, line["score"])
        assert line["relative_score"] == line["score"] / line["threshold"]
    told = json.loads((tmp_path / "out" / SUMMARY_FILE).read_text())
    lowest = 1 / (len(record.normal_scores) + 1)
    assert (told["requested_rate"], told["expected_rate"], told["guaranteed_rate"]) == (0.01, lowest, lowest)
    given = predict_images(detector, photos, tmp_path / "given", threshold=1.0)
    assert given.rates["expected_rate"] is given.rates["guaranteed_rate"] is None


def test_a_false_discovery_rate_takes_its_threshold_from_all_images_together(
    detector: Detector, photos: list[Path], tmp_path: Path
) -> None:
    scores = [seen.score for seen in detector.predict(photos)]
    lenient = replace(detector.record, normal_scores=tuple([min(scores) / 2] * 99))
    detector = Detector(lenient, detector.teacher, detector.students, torch.device("cpu"))
    found = predict_images(detector, photos, tmp_path / "out", false_discovery_rate=0.05)
    assert found.num_anomalous == len(photos) and "at most 5.0% good images among the anomalous" in found.note
    assert found.rates["false_discovery_rate"] == 0.05 and found.rates["expected_rate"] is None
    assert found.predictions[0]["threshold"] == pytest.approx(min(scores) / 2)
    few = replace(lenient, normal_scores=(0.1, 0.2))
    strict = Detector(few, detector.teacher, detector.students, torch.device("cpu"))
    none = predict_images(strict, photos, tmp_path / "none", false_discovery_rate=0.05)
    assert none.num_anomalous == 0 and "none is rare enough" in none.note


def test_an_impossible_discovery_rate_is_refused_before_anything_is_written(
    detector: Detector, photos: list[Path], tmp_path: Path
) -> None:
    bare = replace(detector.record, normal_scores=())
    older = Detector(bare, detector.teacher, detector.students, torch.device("cpu"))
    for each, given, reason in (
        (detector, {"false_discovery_rate": 1.0}, r"--fdr must lie in \(0, 1\)"),
        (detector, {"false_discovery_rate": 0.1, "threshold": 2.0}, "leave --threshold 2 out"),
        (older, {"false_discovery_rate": 0.1}, "lacks; train it again"),
    ):
        with pytest.raises(ValueError, match=reason):
            predict_images(each, photos, tmp_path / "out", **given)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
