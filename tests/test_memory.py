"""Images as a notebook has them: paths, PIL images, arrays, tensors, and several of them in any form."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dskd import detector as module
from dskd.detector import Detector, Prediction


@pytest.fixture(scope="module")
def detector(detector_folder: Path) -> Detector:
    return Detector.load(str(detector_folder))


@pytest.fixture(scope="module")
def photos(mvtec_root: Path) -> list[Path]:
    return sorted((mvtec_root / "tile/test").rglob("*.png"))[:3]


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


FORMS: dict[str, Any] = {
    "text": str,
    "path": Path,
    "PIL": Image.open,
    "bytes in an array": pixels_of,
    "values from 0 to 1 in an array": lambda path: pixels_of(path) / 255,
    "bytes in a tensor": lambda path: torch.from_numpy(pixels_of(path).copy()).permute(2, 0, 1),
    "values from 0 to 1 in a tensor": lambda path: torch.from_numpy(pixels_of(path) / 255).permute(2, 0, 1).float(),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_image_in_any_form_gets_the_verdict_of_its_file(form: str, detector: Detector, photos: list[Path]) -> None:
    for photo in photos:
        seen, expected = detector.predict(FORMS[form](photo), 0.1), detector.predict(photo, 0.1)
        assert isinstance(seen, Prediction) and isinstance(expected, Prediction)
        assert seen.score == expected.score and seen.regions == expected.regions
        np.testing.assert_array_equal(seen.image, expected.image)


SEVERAL: dict[str, Any] = {
    "a list of mixed forms": lambda paths: [str(paths[0]), pixels_of(paths[1]), Image.open(paths[2])],
    "a generator": lambda paths: (path for path in paths),
    "an array": lambda paths: np.stack([pixels_of(path) for path in paths]),
    "a tensor": lambda paths: torch.from_numpy(np.stack([pixels_of(path) for path in paths])).permute(0, 3, 1, 2),
    "batches": lambda paths: [np.stack([pixels_of(path) for path in paths[:2]]), pixels_of(paths[2])[None]],
}


@pytest.mark.parametrize("form", SEVERAL)
def test_several_images_in_any_form_come_in_order(form: str, detector: Detector, photos: list[Path]) -> None:
    expected = [seen.score for seen in detector.predict(photos, 0.1)]
    found = detector.predict(SEVERAL[form](photos), 0.1)
    assert [seen.score for seen in found] == pytest.approx(expected, rel=1e-4)


def test_a_generator_is_read_in_batches_as_verdicts_are_taken(
    detector: Detector, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PREDICT_CHUNK", 2)
    taken = []

    def endless() -> Iterator[Path]:
        while True:
            taken.append(1)
            yield photos[0]

    verdicts = detector.predict(endless(), 0.1)
    next(verdicts), next(verdicts), next(verdicts)
    assert len(taken) == 6, "a batch is read ahead"


def test_grey_transparent_and_turned_images_are_seen_as_from_a_file(
    detector: Detector, photos: list[Path], tmp_path: Path
) -> None:
    photo = Image.open(photos[0])
    exif = Image.Exif()
    exif[274] = 6
    photo.save(tmp_path / "turned.png", exif=exif)
    photo.convert("L").save(tmp_path / "grey.png")
    clear = photo.convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 100))
    clear.save(tmp_path / "clear.png")
    for name in ("turned", "grey", "clear"):
        path = tmp_path / f"{name}.png"
        assert detector.predict(Image.open(path), 0.1).score == detector.predict(path, 0.1).score, name
    assert (
        detector.predict(pixels_of(tmp_path / "grey.png"), 0.1).score
        == detector.predict(tmp_path / "grey.png", 0.1).score
    )


GREY = np.zeros((8, 8, 3), np.uint8)
WRONG: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "a file that is not there": ("x.png", {}, ValueError, r"^image x\.png does not exist"),
    "a folder": (".", {}, ValueError, r"^\. is a folder; give its images, such as sorted\(Path\('\.'\)\.glob"),
    "a number": (3, {}, TypeError, r"^images must be a path, a PIL image, .* got int 3\."),
    "nothing": (None, {}, TypeError, "got NoneType None"),
    "the file's content": (b"\x89PNG", {}, TypeError, "got bytes b"),
    "a list with a number": ([GREY, 3], {}, TypeError, "number 1 is int 3"),
    "colours first in an array": (GREY.transpose(2, 0, 1), {}, ValueError, r"got \(3, 8, 8\); array\.transpose"),
    "colours last in a tensor": (torch.from_numpy(GREY), {}, ValueError, r"got \(8, 8, 3\); tensor\.permute"),
    "normalised values": (
        GREY - 2.5,
        {},
        ValueError,
        r"^image 0 cannot .* it has values from -2\.5 to -2\.5, and floating",
    ),
    "deep values": (
        GREY.astype(np.uint16),
        {},
        ValueError,
        r"^image 0 cannot .* it has uint16 values, and the training",
    ),
    "a rate in percent": (GREY, {"false_alarm_rate": 5}, ValueError, r"lie in \(0, 1\), got 5; 0\.05 is one in twenty"),
    "a rate as text": (GREY, {"false_alarm_rate": "5%"}, ValueError, "got '5%'"),
    "a threshold that is no number": (GREY, {"threshold": float("nan")}, ValueError, "must be a finite number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_gets_a_sentence(case: str, detector: Detector) -> None:
    images, named, kind, message = WRONG[case]
    with pytest.raises(kind, match=message) as error:
        found: Any = detector.predict(images, **named)
        list(found)
    assert "\n" not in str(error.value)


def test_the_threshold_is_the_stored_one_unless_given(detector: Detector, photos: list[Path]) -> None:
    assert detector.predict(photos[0]).threshold == detector.threshold(0.01).value
    assert detector.predict(photos[0], false_alarm_rate=0.5).threshold == detector.threshold(0.5).value
    assert detector.predict(photos[0], 7.0).threshold == 7.0


def test_jupyter_shows_a_picture_and_a_table(detector: Detector, photos: list[Path]) -> None:
    seen = detector.predict(photos[0], 0.0)
    picture = seen.plot()
    assert isinstance(picture, Image.Image) and picture.width > picture.height
    assert seen._repr_html_().startswith('<img alt="&lt;') and "data:image/webp;base64," in seen._repr_html_()
    assert repr(seen) == (f"<{photos[0]}: anomalous, score {seen.score:.4g}, threshold 0, {len(seen.regions)} regions>")
    shown = detector._repr_html_()
    assert shown.startswith("<table>") and detector.record.detector_version in shown
    assert repr(detector) == f"<Detector of tile, version {detector.record.detector_version}, teacher random>"


def test_a_prediction_says_all_that_a_line_of_predict_says(detector: Detector, photos: list[Path]) -> None:
    told = detector.predict(photos[0], 0.0).to_dict()
    assert (told["category"], told["detector_version"]) == ("tile", detector.record.detector_version)
    assert told["verdict"] == "anomalous" and told["regions"][0]["contour"]
    assert detector.predict(photos[0], 1e9).to_dict()["regions"] == []
