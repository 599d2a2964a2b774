"""Training from Python, as a notebook does it."""

from pathlib import Path
from typing import Any

import pytest

import dskd
from dskd.config import RunConfig


def test_train_gives_a_detector_that_predicts(mvtec_root: Path, tmp_path: Path, tiny: RunConfig) -> None:
    said: list[str] = []
    out = tmp_path / "detector"
    detector = dskd.train(
        str(mvtec_root), str(out), category="tile", config=tiny, teacher_weights="random", on_line=said.append, steps=2
    )
    assert detector.record.category == "tile" and detector.record.config.train.steps == 2
    assert detector.record.config.model == tiny.model
    assert dskd.Detector.load(out).record == detector.record
    assert said[0].startswith("tile: 12 training") and any(line.startswith("step    2/2  loss") for line in said)
    assert detector.predict(mvtec_root / "tile/test/good/000.png").origin.category == "tile"
    (out / "model.safetensors").write_bytes(b"")
    with pytest.raises(dskd.BrokenDetectorError, match="was changed or cut short"):
        dskd.Detector.load(str(out))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a folder that is no path": ({"data": 3}, TypeError, "^data must be a folder's path, got int 3"),
    "no such folder": ({"data": "nowhere"}, ValueError, "^data folder nowhere does not exist"),
    "several categories": ({}, ValueError, "holds several categories, choose one with .*category: tile, wood"),
    "an unknown preset": ({"preset": "patchcore"}, ValueError, "^preset must be one of dskd, .*, got 'patchcore'"),
    "an unknown field": ({"learning": 1}, ValueError, "^unknown configuration field 'learning'; known: "),
    "a value out of range": ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_gets_a_sentence(case: str, mvtec_root: Path, tmp_path: Path) -> None:
    named, kind, message = WRONG[case]
    given: dict[str, Any] = {"data": mvtec_root, "teacher_weights": "random"} | named
    with pytest.raises(kind, match=message) as error:
        dskd.train(out=tmp_path / "out", **given)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
