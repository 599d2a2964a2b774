import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dskd.data.datasets import find_categories, read_category
from dskd.data.geometry import Geometry
from dskd.data.images import load_masks
from dskd.demo import dataset as demo
from dskd.demo.dataset import CATEGORIES, draw_dataset
from dskd.demo.rendering import Defect, cast_shadow

SMALL: dict[str, Any] = {"num_train": 3, "num_test": 12, "image_size": 64}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "set"
    draw_dataset(root, **SMALL)
    return root


def contents(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_layout_is_what_training_reads(drawn: Path) -> None:
    assert tuple(find_categories(drawn)) == CATEGORIES
    for name in CATEGORIES:
        category = read_category(drawn, name)
        assert len(category.train) == 3 and len(category.test) == 12
        defective = [sample for sample in category.test if sample.is_defective]
        assert len(defective) == 6
        assert len({sample.defect for sample in defective}) >= 5
        assert all(sample.mask is not None for sample in defective)
        share = load_masks(defective, Geometry.square(64)).mean(axis=(1, 2))
        assert share.min() > 0.0005 and share.max() < 0.15


def test_pictures_are_eight_bit_and_masks_are_black_or_white(drawn: Path) -> None:
    for path in drawn.rglob("*.png"):
        with Image.open(path) as image:
            assert image.size == (64, 64)
            assert image.mode == ("L" if "ground_truth" in path.parts else "RGB")
            if image.mode == "L":
                assert set(np.unique(np.asarray(image))) == {0, 255}


def test_a_shadow_falls_on_no_other_side_of_the_picture() -> None:
    """One that came out at the top made a few good boards look worse than the bad ones."""
    low = np.zeros((64, 64), np.float32)
    low[40:62, 8:56] = 1  # its shadow leaves the picture
    shadow = cast_shadow(low, 6, 3, 2)
    assert shadow[:20].max() < 0.01 and shadow[60:, 20:50].min() > 0.5


def test_the_whole_board_is_in_every_picture(tmp_path: Path) -> None:
    """One that the picture cut looked worse than the bad ones."""
    draw_dataset(tmp_path, categories=("board",), num_train=40, num_test=2, image_size=64)
    for path in sorted(tmp_path.glob("board/train/good/*.png")):
        red, green, _ = np.moveaxis(np.asarray(Image.open(path).convert("RGB"), np.int16), 2, 0)
        is_board = green - red > 12
        assert is_board.mean() > 0.5
        assert not any(edge.any() for edge in (is_board[0], is_board[-1], is_board[:, 0], is_board[:, -1])), path.name


def test_good_pictures_vary_more_than_by_noise(drawn: Path) -> None:
    for name in CATEGORIES:
        paths = [sample.path for sample in read_category(drawn, name).train]
        pictures = [np.asarray(Image.open(path).convert("RGB").reduce(4), np.float32) for path in paths]
        for index, picture in enumerate(pictures):
            assert picture.std() > 4
            assert np.abs(picture - pictures[index - 1]).mean() > 1.5


@pytest.mark.parametrize("name", CATEGORIES)
def test_a_defect_changes_its_place_and_nothing_else(name: str) -> None:
    product = demo.PRODUCTS[name]
    before = np.random.default_rng(5)
    clean = product.draw(before, 192, None)
    assert clean.dtype == np.float32 and clean.shape == (192, 192, 3)
    assert np.isfinite(clean).all() and clean.min() >= 0
    for kind in product.defects:
        after = np.random.default_rng(5)
        changed = product.draw(after, 192, Defect(kind, np.random.default_rng(1)))
        # a scene that took other random numbers would be another part altogether
        assert after.bit_generator.state == before.bit_generator.state
        moved = np.abs(changed - clean).max(axis=2)
        assert moved.max() > 0.02, kind
        assert (moved > 0.01).mean() < 0.2, kind


def test_the_mask_holds_every_noticeable_change_and_little_else() -> None:
    rng = np.random.default_rng(0)
    clean = rng.integers(60, 180, (96, 96, 3)).astype(np.uint8)
    defective = clean.copy()
    defective[30:50, 40:70, 1] += 40
    defective[5, 5] += 60  # a speck of one pixel is no defect, and goes
    defective[60:90, 10:30] += 3  # too faint to be marked, and stays
    truth = np.zeros((96, 96), bool)
    truth[30:50, 40:70] = True
    found = demo.find_change(clean, defective)
    assert found is not None
    image, mask = found
    assert (mask == truth).all()
    assert (image[5, 5] == clean[5, 5]).all() and (image[70, 20] == defective[70, 20]).all()
    assert demo.find_change(clean, clean) is None
    assert demo.find_change(clean, clean + np.uint8(9)) is None


def test_the_same_parameters_give_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    draw_dataset(tmp_path / "again", **SMALL)
    assert contents(tmp_path / "again") == contents(drawn)


def test_a_picture_stays_when_more_are_drawn_and_changes_with_the_seed(drawn: Path, tmp_path: Path) -> None:
    first = contents(drawn)
    draw_dataset(tmp_path / "fewer", categories=("flange",), num_train=2, num_test=4, image_size=64)
    fewer = contents(tmp_path / "fewer")
    assert len(fewer) == 2 + 4 + 2 + 1
    assert all(first[name] == digest for name, digest in fewer.items() if name.endswith(".png"))
    draw_dataset(tmp_path / "other", categories=("flange",), num_train=2, num_test=2, image_size=64, seed=1)
    other = contents(tmp_path / "other")
    assert all(first[name] != digest for name, digest in other.items() if name.endswith("train/good/000.png"))


def test_a_finished_set_is_left_alone(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("drew again")

    monkeypatch.setattr(demo, "draw_item", refuse)
    draw_dataset(drawn, **SMALL)
    draw_dataset(drawn, categories=CATEGORIES[::-1], **SMALL)


def test_a_root_that_holds_something_else_is_refused(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other parameters"):
        draw_dataset(drawn, **SMALL, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not empty"):
        draw_dataset(tmp_path / "mine", **SMALL)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
    with pytest.raises(ValueError, match="is a file"):
        draw_dataset(tmp_path / "mine" / "notes.txt", **SMALL)
    shutil.copytree(drawn, tmp_path / "torn")
    (tmp_path / "torn" / "flange" / "train" / "good" / "001.png").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its files, such as flange/train/good/001\.png"):
        draw_dataset(tmp_path / "torn", **SMALL)


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = demo.draw_item

    def fail_late(root: Path, item: demo.Item, *rest: int) -> None:
        if item.number == 1:
            raise OSError("disk full")
        original(root, item, *rest)

    monkeypatch.setattr(demo, "draw_item", fail_late)
    with pytest.raises(OSError, match="disk full"):
        draw_dataset(tmp_path / "set", categories=("flange",), num_train=2, num_test=2, image_size=64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_same", [True, False])
def test_two_processes_may_draw_at_once(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_same: bool
) -> None:
    root = tmp_path / "deep" / "set"

    def overtake(*_: object) -> None:
        shutil.copytree(drawn, root, dirs_exist_ok=True)

    monkeypatch.setattr(demo, "draw_item", overtake)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    if is_same:
        draw_dataset(root, **SMALL)
    else:
        with pytest.raises(ValueError, match="other parameters"):
            draw_dataset(root, **SMALL, seed=1)
    assert contents(root) == contents(drawn)
    assert list(root.parent.iterdir()) == [root]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    draw_dataset(tmp_path, categories=("fabric",), num_train=2, num_test=2, image_size=64)
    assert len(list(tmp_path.rglob("*.png"))) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": ("flange", "screw")}, "categories must be different ones of"),
        ({"categories": ()}, "categories must be different ones of"),
        ({"categories": ("flange", "flange")}, "categories must be different ones of"),
        ({"num_train": 1}, "at least 2"),
        ({"num_test": 1}, "at least 2"),
        ({"image_size": 32}, "at least 64"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_bad_requests_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_dataset(tmp_path / "set", **{**SMALL, **change})
    assert not (tmp_path / "set").exists()
