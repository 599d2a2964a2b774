"""Good images that a person leaves out, and those that a detector suspects."""

import dataclasses
from pathlib import Path

import pytest
import torch

from dskd.checkpoint import read_record
from dskd.config import DataSpec, RunConfig, TeacherSource
from dskd.data.datasets import read_category
from dskd.data.exclusions import check_exclusions, read_exclusions, without_excluded
from dskd.training.inputs import prepare


@pytest.fixture
def names(mvtec_root: Path) -> list[str]:
    return [sample.path.name for sample in read_category(mvtec_root, "tile").train]


def test_images_are_named_by_file_name_or_by_the_end_of_their_path(mvtec_root: Path, names: list[str]) -> None:
    tile = read_category(mvtec_root, "tile")
    for name in (names[1], f"good/{names[1]}", f"./tile/train/good/{names[1]}", str(tile.train[1].path)):
        left = without_excluded(tile, [name]).train
        assert [sample.path.name for sample in left] == [names[0], *names[2:]]
    assert without_excluded(tile, [names[1][1:]]).train == tile.train, "the end of a name is no name"
    assert without_excluded(tile, []) is tile
    with pytest.raises(ValueError, match="leaves 1 training images of tile"):
        without_excluded(tile, names[1:])


def test_a_name_that_belongs_to_no_good_image_is_refused(mvtec_root: Path, names: list[str]) -> None:
    categories = [read_category(mvtec_root, name) for name in ("tile", "wood")]
    check_exclusions([names[0], f"wood/train/good/{names[0]}"], categories)
    with pytest.raises(ValueError, match=r"names 'nowhere\.png', which is no good training or validation image"):
        check_exclusions([names[0], "nowhere.png"], categories)


def test_the_file_has_a_name_per_line(tmp_path: Path) -> None:
    file = tmp_path / "left-out.txt"
    file.write_text("# judged on Monday\n007.png\n\n  good/008.png \n007.png\n")
    assert read_exclusions(file) == ("007.png", "good/008.png")
    with pytest.raises(ValueError, match=r"--exclude .*none\.txt cannot be read as text"):
        read_exclusions(tmp_path / "none.txt")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read as text"):
        read_exclusions(file)


def test_a_training_does_without_them_and_says_so(mvtec_root: Path, tiny: RunConfig, names: list[str]) -> None:
    def inputs(exclude: tuple[str, ...]) -> tuple[int, str, tuple[str, ...]]:
        spec = DataSpec(data=mvtec_root, category="tile", teacher=TeacherSource("random"), exclude=exclude)
        found = prepare(tiny, spec, device=torch.device("cpu"), cache=None)
        used = len(found.train_images) + len({*found.validation_files, *found.calibration_files})
        return used, found.data_sha256, found.notes

    whole, sha256, _ = inputs(())
    fewer, other, notes = inputs((names[0], names[3]))
    assert fewer == whole - 2 and other != sha256
    assert "2 good images are left out by --exclude." in notes


def test_the_image_that_looks_least_like_the_others_is_suspected_first(detector_folder: Path) -> None:
    record = dataclasses.replace(
        read_record(detector_folder), calibration_files=("a.png", "b.png", "c.png"), normal_scores=(0.2, 0.6, 0.1)
    )
    assert [(name, round(times, 6)) for name, times in record.suspects()] == [
        ("b.png", 3.0), ("a.png", 1.0), ("c.png", 0.5),
    ]  # fmt: skip
    assert [name for name, _ in record.suspects(1)] == ["b.png"]
    assert dataclasses.replace(record, normal_scores=()).suspects() == []
