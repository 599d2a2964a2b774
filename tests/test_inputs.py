"""Whether a search still reads what it was begun with."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dskd.config import RunConfig, TeacherSource
from dskd.data.datasets import fingerprint
from tune.storage import inputs as module
from tune.storage.files import Storage, StoredFile
from tune.storage.inputs import CategoryInputs, Inputs, InputsChangedError, TrainedOn
from tune.trial.spec import DATA_SHA256, TEACHER_SHA256, TEXTURES_SHA256, fingerprints


@pytest.fixture
def folder(mvtec_root: Path, tmp_path: Path) -> Path:
    """Images of two categories, a teacher's file and textures."""
    shutil.copytree(mvtec_root, tmp_path / "data")
    shutil.copytree(mvtec_root / "wood/train/good", tmp_path / "textures")
    (tmp_path / "teacher.safetensors").write_bytes(b"weights")
    return tmp_path


def inputs_of(folder: Path, exclude: tuple[str, ...] = ()) -> CategoryInputs:
    teacher = TeacherSource(f"test_resnet={folder}/teacher.safetensors,test_convnext=random")
    read = Inputs(f"{folder}/data", "auto", exclude, teacher, f"{folder}/textures")
    return CategoryInputs(Storage(f"{folder}/results/try"), "try", "tile", read)


def begin(folder: Path) -> None:
    inputs_of(folder).record(inputs_of(folder).check())


def change(path: Path) -> None:
    """Other contents of the same size, as of another time."""
    path.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path, ns=(1, 1))


def test_a_copy_with_other_times_is_the_same_and_is_not_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(folder)
    for path in folder.rglob("*.*"):
        os.utime(path, ns=(1, 1))
    begin(folder)
    monkeypatch.setattr(module, "fingerprint", lambda paths: pytest.fail(f"{paths} are read"))
    begin(folder)


def test_a_teacher_of_all_categories_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have hundreds of megabytes, and a search hundreds of categories."""
    read: list[str] = []

    def read_one(paths: list[Path]) -> str:
        read.extend(path.name for path in paths)
        return fingerprint(paths)

    monkeypatch.setattr(module, "fingerprint", read_one)
    inputs = Inputs(f"{folder}/data", "auto", (), TeacherSource(f"{folder}/teacher.safetensors"), "")
    marks = {
        name: CategoryInputs(Storage(f"{folder}/results"), "try", name, inputs).check() for name in ("tile", "wood")
    }
    assert marks["tile"]["teacher"] == marks["wood"]["teacher"] and len(read) > 10
    assert read.count("teacher.safetensors") == 1


@pytest.mark.parametrize(
    ("kind", "act", "said"),
    [
        ("images", lambda at: change(at / "data/tile/train/good/003.png"), r"1 changed \(tile/train/good/003.png\)"),
        ("images", lambda at: (at / "data/tile/test/good/001.png").unlink(), r"1 removed \(tile/test/good/001.png\)"),
        (
            "images",
            lambda at: shutil.copy(at / "data/tile/train/good/003.png", at / "data/tile/train/good/new.png"),
            r"1 added \(tile/train/good/new.png\)",
        ),
        ("images", lambda at: change(at / "data/tile/ground_truth/scratch/001_mask.png"), "1 changed"),
        ("teacher", lambda at: change(at / "teacher.safetensors"), r"1 changed \(teacher.safetensors\)"),
        ("textures", lambda at: (at / "textures/001.png").unlink(), "1 removed"),
    ],
)
def test_other_inputs_are_refused_in_a_line_that_says_what_has_changed(
    kind: str, act: Callable[[Path], object], said: str, folder: Path
) -> None:
    begin(folder)
    act(folder)
    with pytest.raises(
        InputsChangedError, match=f"'try' of tile was begun with other {kind}: {said}.* --name try-2"
    ) as e:
        inputs_of(folder).check()
    assert "\n" not in str(e.value)
    with pytest.raises(InputsChangedError):
        inputs_of(folder).verify()


def test_there_is_a_line_for_each_kind_and_what_is_not_read_does_not_count(folder: Path) -> None:
    begin(folder)
    change(folder / "data/wood/train/good/003.png")
    (folder / "data/tile/notes.txt").write_text("not read")
    inputs_of(folder).verify()
    change(folder / "data/tile/train/good/003.png")
    change(folder / "teacher.safetensors")
    with pytest.raises(InputsChangedError) as refused:
        inputs_of(folder).check()
    assert [line.split(": ")[0].rpartition(" ")[2] for line in str(refused.value).splitlines()] == ["images", "teacher"]


def test_nothing_is_compared_where_nothing_was_recorded(folder: Path) -> None:
    shutil.rmtree(folder / "data")
    inputs_of(folder).verify()


def test_trials_that_say_that_they_were_trained_on_something_else_are_found(tmp_path: Path) -> None:
    """Also by the next process of the search, in its other folds, and with its other teachers."""
    storage, config = Storage(str(tmp_path)), RunConfig()

    def told(data: str, fold: int = 0, teacher: str = "t", textures: str = "") -> dict[str, str]:
        report = {DATA_SHA256: data, TEACHER_SHA256: teacher, TEXTURES_SHA256: textures, "epoch": 3}
        return fingerprints(report, config.with_values({"folds": 3, "fold": fold}))

    TrainedOn(storage, "tile").check(told("a"))
    again = TrainedOn(storage, "tile")
    again.check(told("a"))
    again.check(told("b", fold=1))
    again.check({})  # a report of a trial that had ended already
    for wrong, kind in (
        (told("b"), "images"),
        (told("a", fold=1), "images without fold 1"),
        (told("a", teacher="u"), f"teacher {config.model.backbone}"),
        (told("a", textures="x"), "textures"),
    ):
        with pytest.raises(InputsChangedError, match=f"since the search began: {kind};"):
            TrainedOn(storage, "tile").check(wrong)
    TrainedOn(storage, "wood").check(told("b"))


def test_files_in_an_object_storage_are_compared_by_what_it_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their contents are not fetched: a change of time alone is left to what the trials report."""
    listed = [StoredFile("tile/train/good/0.png", 10, 1), StoredFile("tile/train/good/1.png", 10, 1)]
    monkeypatch.setattr(module, "files_of", lambda data, category, layout: listed)
    read = Inputs("s3://bucket/data", "auto", (), TeacherSource("random"), "")
    mine = CategoryInputs(Storage(str(tmp_path)), "try", "tile", read)
    mine.record(mine.check())
    listed[0] = listed[0]._replace(modified_ns=2)
    mine.record(mine.check())
    listed[0] = listed[0]._replace(num_bytes=11)
    with pytest.raises(InputsChangedError, match=r"1 changed \(tile/train/good/0.png\)"):
        mine.check()
