from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dskd.data.check import check_data
from dskd.data.datasets import Category, find_categories, hold_out, read_category, read_test_split
from dskd.data.geometry import Geometry
from dskd.data.images import load_masks, read_mask

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SIZE = 8


def paint(path: Path, value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIZE, SIZE), (value, value, value)).save(path)
    return path


def mask(path: Path, value: int = 255, spot: slice = slice(2, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((SIZE, SIZE), np.uint8)
    pixels[spot, spot] = value
    Image.fromarray(pixels).save(path)
    return path


def mvtec(root: Path) -> Path:
    for index in range(3):
        paint(root / f"train/good/{index}.png")
    paint(root / "test/good/0.png")
    for name in ("0.png", "1.png"):
        paint(root / "test/bent" / name)
    mask(root / "ground_truth/bent/0_mask.png")
    return root


def visa_reorganised(root: Path) -> Path:
    for index in range(3):
        paint(root / f"train/good/{index:04d}.JPG")
    paint(root / "test/good/0900.JPG")
    for name in ("000", "001"):
        paint(root / f"test/bad/{name}.JPG")
    mask(root / "ground_truth/bad/000.png")
    return root


def btad(root: Path) -> Path:
    for name in ("0000.bmp", "0001.png", "0002.BMP"):
        paint(root / "train/ok" / name)
    paint(root / "test/ok/0000.png")
    paint(root / "test/ko/0000.bmp")
    paint(root / "test/ko/0001.png")
    mask(root / "ground_truth/ko/0000.png")
    return root


def mvtec_3d(root: Path) -> Path:
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        for index in range(count):
            paint(root / split / f"good/rgb/{index:03d}.png")
            paint(root / split / f"good/xyz/{index:03d}.tiff")
    mask(root / "test/good/gt/000.png", 0)
    for index in range(2):
        paint(root / f"test/hole/rgb/{index:03d}.png")
        paint(root / f"test/hole/xyz/{index:03d}.tiff")
    mask(root / "test/hole/gt/000.png")
    return root


def visa(root: Path) -> Path:
    rows = []
    for index in range(4):
        image = f"{root.name}/Data/Images/Normal/{index:04d}.JPG"
        paint(root.parent / image)
        rows.append(f"{root.name},{'test' if index == 1 else 'train'},normal,{image},")
    for index in range(2):
        image = f"{root.name}/Data/Images/Anomaly/{index:03d}.JPG"
        paint(root.parent / image)
        path = f"{root.name}/Data/Masks/Anomaly/{index:03d}.png" if index == 0 else ""
        if path:
            mask(root.parent / path, 3)
        rows.append(f"{root.name},test,anomaly,{image},{path}")
    write_table(root.parent, [*rows, "other,train,normal,other/Data/Images/Normal/0000.JPG,"])
    return root


def write_table(root: Path, rows: list[str], header: str = "object,split,label,image,mask") -> None:
    (root / "split_csv").mkdir(parents=True, exist_ok=True)
    (root / "split_csv/1cls.csv").write_text("\n".join([header, *rows, ""]))


def mt(root: Path) -> Path:
    for index in range(4):
        paint(root / f"MT_Free/Imgs/exp1_num_{index}.jpg")
        mask(root / f"MT_Free/Imgs/exp1_num_{index}.png", 0)
    for index in range(2):
        paint(root / f"MT_Uneven/Imgs/exp2_num_{index}.jpg")
    mask(root / "MT_Uneven/Imgs/exp2_num_0.png")
    return root


def plain(root: Path) -> Path:
    for index in range(3):
        paint(root / f"good/{index}.tif")
    paint(root / "test/good/0.webp")
    paint(root / "test/bent/0.webp")
    paint(root / "test/bent/1.jpeg")
    mask(root / "ground_truth/bent/0_mask.bmp")
    return root


LAYOUTS = {
    "mvtec": (mvtec, "bent"),
    "visa re-organised": (visa_reorganised, "bad"),
    "btad": (btad, "ko"),
    "mvtec 3d": (mvtec_3d, "hole"),
    "visa": (visa, "anomaly"),
    "mt": (mt, "uneven"),
    "plain": (plain, "bent"),
}


def read(root: Path, name: str = "part") -> Category:
    return read_category(root, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_its_splits_labels_and_masks(layout: str, tmp_path: Path) -> None:
    """Each of the trees has three images to train on, one good test image, and two defects, one with a mask."""
    build, defect = LAYOUTS[layout]
    build(tmp_path / "set/part")
    assert find_categories(tmp_path) == {"part": tmp_path / "set/part"}
    found = read(tmp_path)
    assert len(found.train) == 3 and not any(sample.is_defective or sample.mask for sample in found.train)
    assert Counter(sample.defect for sample in found.test) == {"good": 1, defect: 2}
    assert [sample.defect for sample in found.validation] == ["good"] * (2 if layout == "mvtec 3d" else 0)
    masked = [sample for sample in found.test if sample.mask is not None]
    assert [sample.path.stem[-1] for sample in masked] == ["0"] and masked[0].is_defective
    wanted = np.zeros((SIZE, SIZE), bool)
    wanted[2:5, 2:5] = True
    np.testing.assert_array_equal(load_masks(masked, Geometry.square(SIZE))[0], wanted)
    everything = [sample.path for split in (found.train, found.validation, found.test) for sample in split]
    assert len(set(everything)) == len(everything) and all(path.is_file() for path in everything)
    assert find_categories(tmp_path / "set/part").keys() == {"part"}, "the folder itself may be the category"
    kinds = {problem.kind for problem in check_data(tmp_path).problems}
    assert "unread file" not in kinds, "what a layout leaves unread by design is nothing to tell"
    assert not kinds & {"layout", "unreadable image", "mask of another shape", "empty mask"}


def test_masks_with_soft_edges_are_cut_at_mid_grey(tmp_path: Path) -> None:
    folder = mt(tmp_path / "tiles")
    soft = np.array([[0, 1, 60, 127], [128, 200, 254, 255]], np.uint8)
    Image.fromarray(soft.repeat(4, 0).repeat(2, 1)).save(folder / "MT_Uneven/Imgs/exp2_num_0.png")
    (found,) = [sample for sample in read(tmp_path, "tiles").test if sample.mask]
    np.testing.assert_array_equal(load_masks([found], Geometry.square(SIZE))[0], (soft > 127).repeat(4, 0).repeat(2, 1))


def test_a_magnetic_tile_without_a_marked_pixel_stays_defective(tmp_path: Path) -> None:
    folder = mt(tmp_path / "tiles")
    mask(folder / "MT_Uneven/Imgs/exp2_num_1.png", 0)
    assert [sample.is_defective for sample in read(tmp_path, "tiles").test] == [False, True, True]


def test_four_fifths_of_the_free_tiles_train_whatever_else_there_is(tmp_path: Path) -> None:
    for index in range(40):
        paint(tmp_path / f"tiles/MT_Free/Imgs/{index}.jpg")
    alone = read(tmp_path, "tiles")
    assert (len(alone.train), len(alone.test)) == (32, 8)
    assert sorted(alone.train) == list(alone.train) and not set(alone.train) & set(alone.test)
    mt(tmp_path / "tiles")
    (tmp_path / "tiles").rename(tmp_path / "elsewhere")
    names = {sample.path.name for sample in read(tmp_path, "elsewhere").train}
    # four more free tiles move a few over the border, not the whole split
    assert len(names & {sample.path.name for sample in alone.train}) >= 29
    assert {sample.path.name for sample in hold_out(alone.train + alone.test, 0.2, 0)[0]} == {
        sample.path.name for sample in alone.train
    }


@pytest.mark.parametrize("base", ["mvtec", "plain"])
def test_validation_images_of_the_user_join_with_their_masks(base: str, tmp_path: Path) -> None:
    folder = LAYOUTS[base][0](tmp_path / "part")
    paint(folder / "validation/good/0.png")
    for index in range(2):
        paint(folder / f"validation/bent/{index}.png")
    mask(folder / "validation_ground_truth/bent/1.png")
    found = read(tmp_path).validation
    assert [(sample.defect, sample.path.name, sample.mask is not None) for sample in found] == [
        ("bent", "0.png", False), ("bent", "1.png", True), ("good", "0.png", False),
    ]  # fmt: skip
    mask(folder / "validation_ground_truth/bent/2.png")
    with pytest.raises(ValueError, match=r"validation_ground_truth/bent/2\.png has no image 2\.\*"):
        read(tmp_path)


def orphan_folder(folder: Path) -> None:
    mask(mvtec(folder) / "ground_truth/cut/0_mask.png")


def two_masks(folder: Path) -> None:
    mask(mvtec(folder) / "ground_truth/bent/0.png")


def two_images(folder: Path) -> None:
    paint(mvtec(folder) / "test/bent/0.jpg")


def no_table(folder: Path) -> None:
    visa(folder)
    (folder.parent / "split_csv/1cls.csv").unlink()


def another_table(*rows: str, header: str = "object,split,label,image,mask"):  # type: ignore[no-untyped-def]
    def build(folder: Path) -> None:
        visa(folder)
        write_table(folder.parent, list(rows), header)

    return build


GOOD = "part/Data/Images/Normal/0000.JPG"
FAULTS = {
    "masks of a folder without images": (orphan_folder, r"cut/0_mask\.png has no image 0\.\* among the cut images"),
    "two masks of an image": (two_masks, r"0_mask\.png and 0\.png belong to one image|0\.png and 0_mask\.png belong"),
    "two images of a mask": (two_images, r"0\.png and 0\.jpg share one mask .*0_mask\.png"),
    "no split table": (no_table, r"split_csv/1cls\.csv; that file does not exist"),
    "a table without a column": (another_table(header="object,split,label,image"), "no column 'mask'"),
    "a table of other objects": (another_table(f"pcb1,train,normal,{GOOD},"), "no row of object 'part'"),
    "a row of no file": (
        another_table("part,train,normal,part/gone.JPG,"),
        r"line 2: .*part/gone\.JPG does not exist",
    ),
    "a row of an unknown split": (another_table(f"part,val,normal,{GOOD},"), "line 2: expected an image, split train"),
    "a row cut short": (another_table("part,train"), "line 2: expected an image"),
    "an anomaly to train on": (another_table(f"part,train,anomaly,{GOOD},"), "an anomaly is no image to train on"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_cannot_be_told_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    build, message = FAULTS[kind]
    build(tmp_path / "part")
    concerns_test_masks_alone = build in (orphan_folder, two_masks, two_images)
    if concerns_test_masks_alone:
        assert len(read(tmp_path).train) == 3
    with pytest.raises(ValueError, match=message) as raised:
        (read_test_split if concerns_test_masks_alone else read_category)(tmp_path, "part")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("spelling", ["good", "Good", "GOOD", "good ", "OK", "ok", "normal", "Normal", "defect_free"])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_normal_images_are_known_in_every_spelling_of_their_folder(split: str, spelling: str, tmp_path: Path) -> None:
    folder = mvtec(tmp_path / "part")
    paint(folder / split / spelling / "7.png")
    found = [sample for sample in getattr(read(tmp_path), split) if sample.path.name == "7.png"]
    assert [sample.defect for sample in found] == ["good"]


@pytest.mark.parametrize("spelling", ["Good", "good ", "OK", "Ok", "Normal"])
@pytest.mark.parametrize("build", [mvtec, plain])
def test_a_category_is_known_by_its_normal_folder_in_other_spellings(
    build: Callable[[Path], Path], spelling: str, tmp_path: Path
) -> None:
    folder = build(tmp_path / "part")
    there = folder / ("train/good" if build is mvtec else "good")
    there.rename(there.with_name(spelling))
    found = read(tmp_path)
    assert len(found.train) == 3 and Counter(sample.defect for sample in found.test) == {"good": 1, "bent": 2}


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", "Thumbs", "#recycle"])
def test_service_folders_are_no_class_and_their_files_no_images(name: str, tmp_path: Path) -> None:
    folder = mvtec(tmp_path / "part")
    before = read(tmp_path)
    for place in ("train/good", "test", "test/bent", "test/good", "validation", "ground_truth", "ground_truth/bent"):
        paint(folder / place / name / "0.png")
    after = read(tmp_path)
    assert (after.train, after.validation, after.test) == (before.train, before.validation, before.test)
    assert read_test_split(tmp_path, "part").test == before.test
    assert f"7 {name}" in after.describe()


@pytest.mark.parametrize(
    "name",
    ["0", "0_mask", "0-mask", "0 mask", "0_Mask", "0_gt", "0_label", "0_ground_truth", "0_segmentation"],
)
def test_a_mask_is_known_by_what_people_write_after_the_name_of_its_image(name: str, tmp_path: Path) -> None:
    folder = mvtec(tmp_path / "part")
    (folder / "ground_truth/bent/0_mask.png").rename(folder / f"ground_truth/bent/{name}.png")
    masks = [sample.mask for sample in read_test_split(tmp_path, "part").test]
    assert masks == [folder / f"ground_truth/bent/{name}.png", None, None]


def test_images_and_masks_in_folders_of_folders_are_paired_by_their_place(tmp_path: Path) -> None:
    folder = mvtec(tmp_path / "part")
    for lot in ("lot1", "lot2"):
        paint(folder / f"train/good/{lot}/0.png")
        paint(folder / f"test/bent/{lot}/5.png")
        mask(folder / f"ground_truth/bent/{lot}/5_gt.png")
    paint(folder / "test/bent/lot2/6.png")
    mask(folder / "ground_truth/bent/6.png")
    found = read_test_split(tmp_path, "part")
    assert len(found.train) == 5
    pairs = {str(s.path.relative_to(folder / "test/bent")): s.mask for s in found.test if s.is_defective}
    bent = folder / "ground_truth/bent"
    assert pairs == {
        "0.png": bent / "0_mask.png", "1.png": None, "lot1/5.png": bent / "lot1/5_gt.png",
        "lot2/5.png": bent / "lot2/5_gt.png", "lot2/6.png": bent / "6.png",
    }  # fmt: skip


def test_a_mask_folder_in_another_case_belongs_to_its_defect(tmp_path: Path) -> None:
    folder = mvtec(tmp_path / "part")
    (folder / "ground_truth/bent").rename(folder / "ground_truth/Bent ")
    assert read_test_split(tmp_path, "part").test[0].mask == folder / "ground_truth/Bent /0_mask.png"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real images are not beside this checkout")
def test_real_sets_have_the_images_that_their_authors_count() -> None:
    tile = read(SHARED, "magnetic_tile")
    counts = Counter(sample.defect for sample in tile.test)
    assert (len(tile.train), counts.pop("good")) == (762, 190)
    assert counts == {"blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 103}
    screw = read(SHARED, "screw")
    assert (len(screw.train), sum(not s.is_defective for s in screw.test)) == (320, 41)
    defective = [sample for sample in screw.test if sample.is_defective]
    assert len(defective) == 119 and all(sample.mask for sample in defective)
    for name in ("hazelnut", "transistor"):
        assert (len(read(SHARED, name).train), len(read(SHARED, name).test)) == (50, 10)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real images are not beside this checkout")
def test_the_published_order_of_the_magnetic_tiles_reads_like_the_mvtec_one(tmp_path: Path) -> None:
    """The real set with its files linked to where its authors publish them."""
    real = read(SHARED, "magnetic_tile")
    for sample in (*real.train, *real.test):
        folder = tmp_path / "mt" / ("MT_Free" if sample.defect == "good" else f"MT_{sample.defect.title()}") / "Imgs"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / sample.path.name).symlink_to(sample.path)
        if sample.mask:
            (folder / f"{sample.path.stem}.png").symlink_to(sample.mask)
    found = read(tmp_path, "mt")
    counts = Counter(sample.defect for sample in found.test)
    assert len(found.train) == 762
    assert counts == {"good": 190, "blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 103}
    assert sum(not read_mask(s.mask).any() for s in found.test if s.mask) == 4
