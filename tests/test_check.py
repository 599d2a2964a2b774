import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dskd.config import DataSpec, RunConfig, TeacherSource
from dskd.data.check import Problem, check_data
from dskd.training import inputs as inputs
from dskd.training.inputs import prepare

SIZE = 32


def paint(path: Path, seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    return path


def mask(path: Path, size: tuple[int, int] = (SIZE, SIZE), side: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[1 : 1 + side, 1 : 1 + side] = 255
    Image.fromarray(pixels).save(path)
    return path


def deep(path: Path, kind: type, corner: float = 0) -> Path:
    pixels: np.ndarray = (
        np.random.default_rng(0).uniform(0, 1 if kind == np.float32 else 900, (SIZE, SIZE)).astype(kind)
    )
    pixels[0, 0] = corner
    tifffile.imwrite(path, pixels)
    return path


@pytest.fixture
def nut(tmp_path: Path) -> Path:
    """A category with nothing to say about."""
    folder = tmp_path / "set" / "nut"
    for index in range(4):
        paint(folder / f"train/good/{index}.png", index)
    for index in range(2):
        paint(folder / f"validation/good/{index}.png", 10 + index)
        paint(folder / f"test/good/{index}.png", 20 + index)
        paint(folder / f"test/bent/{index}.png", 30 + index)
        mask(folder / f"ground_truth/bent/{index}_mask.png")
    return folder


def save_again(path: Path, to: Path) -> None:
    with Image.open(path) as image:
        image.save(to)


def cut_short(path: Path) -> int:
    return path.write_bytes(path.read_bytes()[:-200])


def without(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink() if (folder / name).is_file() else shutil.rmtree(folder / name)


Act = Callable[[Path], object]
PROBLEMS: dict[str, tuple[Act, str, str, str]] = {
    "truncated training image": (
        lambda n: cut_short(n / "train/good/1.png"), "error", "unreadable image", "train/good/1.png",
    ),
    "unreadable validation image": (
        lambda n: (n / "validation/good/1.png").write_text("no image"),
        "error", "unreadable image", "validation/good/1.png",
    ),
    "broken link": (
        lambda n: (n / "train/good/9.png").symlink_to(n / "gone.png"),
        "error", "unreadable image", "train/good/9.png",
    ),
    "truncated test image": (
        lambda n: cut_short(n / "test/bent/1.png"), "error", "unreadable image", "test/bent/1.png",
    ),
    "unreadable mask": (
        lambda n: (n / "ground_truth/bent/1_mask.png").write_text("no image"),
        "error", "unreadable mask", "ground_truth/bent/1_mask.png",
    ),
    "unreadable mask of a validation defect": (
        lambda n: (
            paint(n / "validation/bent/0.png", 40),
            cut_short(mask(n / "validation_ground_truth/bent/0.png", side=30)),
            (n / "validation_ground_truth/bent/0.png").write_text("no image"),
        ),
        "error", "unreadable mask", "validation_ground_truth/bent/0.png",
    ),
    "mask without image": (
        lambda n: mask(n / "ground_truth/bent/7_mask.png"), "error", "layout", "ground_truth/bent/7_mask.png",
    ),
    "defect without mask": (
        lambda n: without(n, "ground_truth/bent/1_mask.png"), "note", "defect without mask", "test/bent/1.png",
    ),
    "mask of another shape": (
        lambda n: mask(n / "ground_truth/bent/1_mask.png", (SIZE, 20)),
        "error", "mask of another shape", "ground_truth/bent/1_mask.png",
    ),
    "mask at another scale": (
        lambda n: mask(n / "ground_truth/bent/1_mask.png", (64, 64)),
        "note", "mask at another scale", "ground_truth/bent/1_mask.png",
    ),
    "empty mask": (
        lambda n: mask(n / "ground_truth/bent/1_mask.png", side=0),
        "note", "empty mask", "ground_truth/bent/1_mask.png",
    ),
    "mask that vanishes": (
        lambda n: (
            paint(n / "test/bent/1.png", 31, (128, 128)), mask(n / "ground_truth/bent/1_mask.png", (128, 128), 1),
        ),
        "note", "mask vanishes", "ground_truth/bent/1_mask.png",
    ),
    "one image to train on": (
        lambda n: without(n, *(f"train/good/{index}.png" for index in range(3))),
        "error", "too few images", "train/good",
    ),
    "none to train on": (
        lambda n: without(n, *(f"train/good/{index}.png" for index in range(4))),
        "error", "too few images", "train/good",
    ),
    "training image in the test split, under another name and encoding": (
        lambda n: save_again(n / "train/good/2.png", n / "test/good/5.bmp"),
        "error", "repeated across splits", "test/good/5.bmp",
    ),
    "training image among the held-out ones": (
        lambda n: shutil.copy(n / "train/good/2.png", n / "validation/good/5.png"),
        "error", "repeated across splits", "validation/good/5.png",
    ),
    "good and defective": (
        lambda n: shutil.copy(n / "test/bent/0.png", n / "test/good/5.png"),
        "error", "two labels", "test/good/5.png",
    ),
    "training image twice": (
        lambda n: shutil.copy(n / "train/good/2.png", n / "train/good/5.png"),
        "note", "repeated image", "train/good/5.png",
    ),
    "name twice": (
        lambda n: shutil.copytree(n, n.parent / "old/nut"), "error", "name twice", "../old/nut",
    ),
    "two layouts": (
        lambda n: (n / "train/ok").mkdir(), "error", "ambiguous folder", ".",
    ),
    "no defects to test on": (
        lambda n: without(n, "test/bent", "ground_truth"), "note", "no test split", ".",
    ),
    "defects among the training images": (
        lambda n: paint(n / "train/bent/0.png", 50), "note", "unread file", "train/bent/0.png",
    ),
    "stray image in the category": (
        lambda n: paint(n / "overview.JPG", 50), "note", "unread file", "overview.JPG",
    ),
    "hidden file": (
        lambda n: (n / "train/good/._1.png").write_bytes(b"x"), "note", "files not read", ".",
    ),
    "files of other kinds": (
        lambda n: (n / "train/good/list.csv").write_text("1,2"), "note", "files not read", ".",
    ),
    "files of other kinds outside": (
        lambda n: (n.parent / "readme.txt").write_text("1,2"), "note", "files not read", "..",
    ),
    "mask of most of the image": (
        lambda n: Image.eval(Image.open(n / "ground_truth/bent/1_mask.png"), lambda v: 255 - v).save(
            n / "ground_truth/bent/1_mask.png"
        ),
        "note", "mask of most of the image", "ground_truth/bent/1_mask.png",
    ),
    "integers and fractions": (
        lambda n: (deep(n / "train/good/5.tif", np.uint16), deep(n / "train/good/6.tif", np.float32)),
        "error", "mixed depths", "train/good",
    ),
    "more bits than trained on": (
        lambda n: deep(n / "validation/good/5.tif", np.uint16),
        "error", "unreadable image", "validation/good/5.tif",
    ),
    "not a number": (
        lambda n: deep(n / "train/good/5.tif", np.float32, np.nan),
        "error", "unreadable image", "train/good/5.tif",
    ),
    "several pages": (
        lambda n: Image.new("L", (8, 8)).save(
            n / "train/good/5.tif", save_all=True, append_images=[Image.new("L", (8, 8))]
        ),
        "error", "unreadable image", "train/good/5.tif",
    ),
    "brighter than any training image": (
        lambda n: (
            [deep(n / f"train/good/{index}.tif", np.uint16, 900 + index) for index in range(5, 9)],
            deep(n / "test/bent/1.tif", np.uint16, 4000),
            without(n, "test/bent/1.png"),  # type: ignore[func-returns-value]
        ),
        "note", "clipped values", "test/bent/1.tif",
    ),
    "stray image above": (
        lambda n: paint(n.parent / "all.png", 50), "note", "unread file", "../all.png",
    ),
}  # fmt: skip


def said(problem: Problem, folder: Path) -> tuple[str, str, str]:
    return problem.severity, problem.kind, os.path.relpath(problem.path, folder)


def test_a_sound_folder_is_counted_and_nothing_is_said(nut: Path) -> None:
    paint(nut / "train/good/wide.png", 60, (48, 40))
    report = check_data(nut.parent)
    assert report.problems == () and report.is_trainable
    (found,) = report.categories
    assert (found.name, found.folder, found.layout) == ("nut", nut, "MVTec AD")
    assert found.counts == {"train": {"good": 5}, "validation": {"good": 2}, "test": {"good": 2, "bent": 2}}
    assert found.extent == ((32, 48), (32, 40))


@pytest.mark.parametrize("kind", PROBLEMS)
def test_every_problem_is_named_and_stops_training_where_it_says_so(
    kind: str, nut: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "NUM_VALIDATION_DEFECTS", 1)
    act, *wanted = PROBLEMS[kind]
    act(nut)
    report = check_data(nut.parent, SIZE)
    assert [said(problem, nut) for problem in report.problems if problem.kind == wanted[1]] == [tuple(wanted)]
    assert {problem.severity for problem in report.problems} == {wanted[0]}
    for problem in report.problems:
        assert "\n" not in problem.message
        assert problem.path.name in problem.message or problem.path == nut
    try:
        prepare(
            tiny,
            DataSpec(data=nut.parent, category="nut", teacher=TeacherSource("random")),
            device=torch.device("cpu"),
            cache=None,
        )
        trains = True
    except (ValueError, OSError):
        trains = False
    assert report.is_trainable == trains
