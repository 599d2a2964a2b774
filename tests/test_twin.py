"""The acceptance of bit depth, orientation, spellings and masks: a category's odd twin gives the very same figures."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dskd.checkpoint import DetectorRecord, read_record, write_detector
from dskd.config import DataSpec, RunConfig, TeacherSource
from dskd.data.check import check_data
from dskd.detector import Detector
from dskd.metrics import Scores
from dskd.training.inputs import prepare
from dskd.training.run import TrainingRun

TURNED = {3: lambda a: np.rot90(a, 2), 6: lambda a: np.rot90(a, 1), 8: lambda a: np.rot90(a, 3)}
"""How an upright picture lies in a file of that EXIF orientation."""


def odd_twin(plain: Path, twin: Path, steps: float) -> Path:
    """The category at `plain` with its levels times `steps` in 16 bits, lying, in folders of other names."""
    for number, path in enumerate(sorted(plain.rglob("*.png"))):
        pixels = np.asarray(Image.open(path))
        orientation = sorted(TURNED)[number % 3]
        place = path.relative_to(plain)
        normal = "Good " if place.parts[0] == "train" else "OK"
        target = twin / Path(*(normal if part == "good" else part for part in place.parts))
        turned = np.ascontiguousarray(TURNED[orientation](pixels))
        if place.parts[0] == "ground_truth":
            target = target.with_name(f"{place.stem.removesuffix('_mask')}_gt.png")
            target.parent.mkdir(parents=True, exist_ok=True)
            exif = Image.Exif()
            exif[274] = orientation
            Image.fromarray((turned > 0).astype(np.uint8)).save(target, exif=exif)
            continue
        if place.parts[0] == "train" and number % 2:
            target = target.parent / "lot2" / target.name
        target.parent.mkdir(parents=True, exist_ok=True)
        values = np.rint(turned * float(steps)).astype(np.uint16)
        tag = [(274, "H", 1, orientation, True)]
        tifffile.imwrite(target.with_suffix(".tif"), values, photometric="rgb", extratags=tag)
    return twin


def trained(data: Path, config: RunConfig, folder: Path) -> tuple[DetectorRecord, Scores]:
    spec = DataSpec(data=data, category="tile", teacher=TeacherSource("random"))
    inputs = prepare(config, spec, device=torch.device("cpu"), cache=None)
    run = TrainingRun.begin(config, inputs, torch.device("cpu"))
    for _ in run.intervals():
        pass
    write_detector(folder, *run.detector())
    return read_record(folder), Detector.load(folder).evaluate(data, "tile")


@pytest.mark.parametrize(
    ("steps", "is_exact"), [(16, True), (4, True), (257, True), (4095 / 255, False)], ids=["12", "10", "16", "12 full"]
)
def test_a_deep_turned_and_oddly_named_twin_gives_the_figures_of_the_plain_category(
    steps: float, is_exact: bool, mvtec_root: Path, tiny: RunConfig, tmp_path: Path
) -> None:
    odd_twin(mvtec_root / "tile", tmp_path / "data/tile", steps)
    report = check_data(tmp_path / "data")
    assert not [problem for problem in report.problems if problem.severity == "error"]
    assert report.categories[0].depths == {"integer": 20}
    # the plain twin: 8 bits, upright, of the layout's own names; of the same file names, which the split rests on
    plain, twin = tmp_path / "plain/tile", tmp_path / "data/tile"
    for path in sorted((mvtec_root / "tile").rglob("*.png")):
        place = path.relative_to(mvtec_root / "tile")
        if (twin / "train/Good /lot2" / f"{path.stem}.tif").exists() and place.parts[0] == "train":
            place = place.parent / "lot2" / place.name
        if place.parts[0] != "ground_truth":
            place = place.with_suffix(".tif")
        (plain / place).parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(plain / place)
    before, expected = trained(plain.parent, tiny, tmp_path / "plain detector")
    after, figures = trained(twin.parent, tiny, tmp_path / "twin detector")
    assert after.scale is not None and after.scale.kind == "integer"
    if is_exact:
        assert figures == expected
        assert {name: after.metrics[name] for name in before.metrics} == dict(before.metrics)
        assert [each.value for each in after.thresholds] == [each.value for each in before.thresholds]
    for name, value in figures._asdict().items():
        assert value == pytest.approx(getattr(expected, name), abs=0.002), name
