"""Drift of a batch against the good images behind the thresholds: its level, its power, and what defects do to it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dskd.calibration import DRIFT_LEVEL, Drift, drift_of, nearest_threshold
from dskd.checkpoint import read_record, rewrite_record
from dskd.cli.main import main


def batch(rng: np.random.Generator, count: int, shift: float = 0.0) -> list[float]:
    """Scores of good parts: of the skewed shape that maxima of maps have."""
    found: list[float] = (shift + rng.gumbel(1.0, 0.2, count)).tolist()
    return found


def drift(normals: list[float], seen: list[float]) -> Drift:
    found = drift_of(normals, seen, nearest_threshold(normals, 0.05).value)
    assert found is not None
    return found


def test_a_shifted_batch_has_drifted_and_20_fair_ones_have_not() -> None:
    rng = np.random.default_rng(0)
    normals = batch(rng, 60)
    assert not any(drift(normals, batch(rng, 40)).is_found for _ in range(20))
    shifted = drift(normals, batch(rng, 40, shift=0.25))
    assert shifted.is_found and shifted.p_value <= DRIFT_LEVEL and not shifted.mostly_anomalous
    assert drift(normals, batch(rng, 40, shift=-0.25)).is_found, "darker images score lower, and have drifted too"


def test_fair_batches_drift_no_oftener_than_the_level_says() -> None:
    rng = np.random.default_rng(1)
    count = 1500
    found = sum(drift(batch(rng, 30), batch(rng, 30)).is_found for _ in range(count))
    # Three standard errors above the level; the threshold comes from the very scores that are compared.
    assert found <= count * DRIFT_LEVEL + 3 * (count * DRIFT_LEVEL) ** 0.5


def test_defects_are_no_drift_and_a_shift_beside_them_is() -> None:
    rng = np.random.default_rng(2)
    normals = batch(rng, 80)
    defects = batch(rng, 25, shift=5.0)
    fair = drift(normals, [*batch(rng, 60), *defects])
    assert not fair.is_found and fair.num_images <= 60
    assert drift(normals, [*batch(rng, 60, shift=0.25), *defects]).is_found


def test_a_batch_that_is_mostly_anomalous_is_told_by_that() -> None:
    rng = np.random.default_rng(3)
    found = drift(batch(rng, 40), batch(rng, 30, shift=3.0))
    assert found.is_found and found.mostly_anomalous and "more than half" in found.describe()


@pytest.mark.parametrize(("num_normals", "num_seen"), [(19, 100), (100, 19), (0, 0)])
def test_few_images_tell_no_drift(num_normals: int, num_seen: int) -> None:
    assert drift_of([1.0] * num_normals, [9.0] * num_seen, 2.0) is None


def test_predict_warns_of_drift_and_writes_it_down(
    detector_folder: Path, mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, images = tmp_path / "tile", [str(path) for path in sorted((mvtec_root / "tile/train").rglob("*.png"))] * 2
    shutil.copytree(detector_folder, folder)
    record = read_record(folder)
    high = max(record.normal_scores) * 100  # good images of another time: all scores of today lie far below
    normals = [high * (1 + number / 100) for number in range(30)]
    names = [f"{number}.png" for number in range(30)]
    rewrite_record(folder, record.with_normal_scores(names, normals, (), 0))
    main(["predict", str(folder), *images, "--out", str(tmp_path / "out"), "--json"])
    told = capsys.readouterr()
    assert "drift: the scores of the images called good differ from those of the 29 good images" in told.err
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["drift"] == json.loads(told.out)["drift"]
    assert summary["drift"]["is_found"] and summary["drift"]["num_images"] == 24
