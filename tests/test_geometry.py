"""Images of any shape: the way onto the network's canvas and back, and the region of interest."""

import base64
import contextlib
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from dskd.checkpoint import RECORD_FILE, SCHEMA_VERSION, read_record, write_detector
from dskd.cli.main import main
from dskd.config import DataConfig, DataSpec, RunConfig, TeacherSource
from dskd.data.cache import ArrayCache
from dskd.data.check import check_data
from dskd.data.datasets import read_test_split
from dskd.data.defects import add_defects
from dskd.data.geometry import (
    NEUTRAL,
    Frame,
    Geometry,
    RegionOfInterest,
    box_or_polygon,
    region_of_mask,
    whole_frame,
)
from dskd.data.images import load_framed, load_inside, load_masks
from dskd.data.regions import find_region
from dskd.detector import Detector, Prediction, find_regions, in_image, outline
from dskd.evaluate import labelled_test_split
from dskd.export import OnnxDetector, build_model, compare, generated_inputs, network_inputs
from dskd.metrics import score_maps
from dskd.model.teacher import Teacher
from dskd.presets import PRESETS
from dskd.training.inputs import TrainingData, prepare
from dskd.training.reading import check_input
from dskd.training.run import TrainingRun
from tune.jobs.score import SCHEMA, Inspector, decode
from tune.settings.workers import Workers
from tune.tracking.registry import pack

CPU = torch.device("cpu")
WIDTH, HEIGHT = 160, 96
REGION = "40,8 152,8 152,88 70,88"
"""A polygon that leaves out the busy left side of a panel."""
SPOT = (104, 40, 120, 56)
"""Of a panel's defect: left, top, right, bottom."""
TINY: dict[str, Any] = {
    "backbone": "test_resnet", "levels": (1, 2), "level_weights": (1.0, 1.0), "score_level_weights": (1.0, 1.0),
    "embedding_depth": 1, "image_size": 32, "validation_fraction": 0.34, "epochs": 2, "batch_size": 4,
    "amplification_epochs": 1, "blur_sigma": 4.0,
}  # fmt: skip


def panel(rng: np.random.Generator, *, spot: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """A striped panel (HEIGHT, WIDTH, 3) beside a background that is another in every image."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    pixels = 120 + 40 * np.sin(columns / 3 + rows / 9)[..., None] * (1.0, 0.8, 0.5)
    pixels = pixels + rng.normal(0, 4, pixels.shape)
    pixels[:, :32] = rng.integers(0, 256, (12, 4, 3)).repeat(8, 0).repeat(8, 1)
    if spot is not None:
        left, top, right, bottom = spot
        pixels[top:bottom, left:right] = (250, 20, 20)
    return np.asarray(pixels.clip(0, 255), np.uint8)


@pytest.fixture(scope="module")
def panels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A category of panels: 12 to train on, 4 good, 3 with a spot, and 3 whose only spot is in the background."""
    root = tmp_path_factory.mktemp("panels") / "panel"
    rng = np.random.default_rng(3)
    aside = (4, 20, 20, 36)
    for part, name, count, spot in (
        ("train", "good", 12, None),
        ("test", "good", 4, None),
        ("test", "spot", 3, SPOT),
        ("test", "aside", 3, aside),
    ):
        for index in range(count):
            path = root / part / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(panel(rng, spot=spot)).save(path)
            if spot is not None:
                mask = np.zeros((HEIGHT, WIDTH), np.uint8)
                mask[spot[1] : spot[3], spot[0] : spot[2]] = 255
                place = root / "ground_truth" / name / f"{index}_mask.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(place)
    return root.parent


def trained(config: RunConfig, panels: Path, folder: Path, region: str = "") -> Detector:
    run = TrainingRun.begin(config, prepared(config, panels, region), CPU)
    for _ in run.intervals():
        pass
    write_detector(folder, *run.detector())
    return Detector.load(folder)


def prepared(config: RunConfig, panels: Path, region: str = "", cache: ArrayCache | None = None) -> TrainingData:
    spec = DataSpec(data=panels, category="panel", teacher=TeacherSource("random"), region=region)
    return prepare(config, spec, device=CPU, cache=cache)


# ------------------------------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resize": "crop"}, "resize must be square, letterbox or WIDTHxHEIGHT, got 'crop'"),
        ({"resize": "64x33"}, "must be multiples of 32"),
        ({"resize": "64x0"}, "must be positive and at most 8192, got 0"),
        ({"resize": "64x-32"}, "resize must be square, letterbox or WIDTHxHEIGHT"),
        ({"resize": "99968x32"}, "at most 8192"),
    ],
)
def test_impossible_sizes_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig().with_values(values)


def test_a_transformer_of_one_size_is_refused_in_one_line() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            assert images.shape[-2:] == (32, 32), f"Input height ({images.shape[-2]}) doesn't match model (32)."
            return (images,)

    square = Geometry.of(DataConfig(image_size=32, resize="letterbox"))
    check_input(Teacher(Fixed()), "vit", square, CPU)
    with pytest.raises(ValueError, match=r"backbone vit takes no images of 64 x 32 pixels \(Input height.*letterbox"):
        check_input(Teacher(Fixed()), "vit", Geometry.of(DataConfig(resize="64x32")), CPU)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3", "must be LEFT,TOP,RIGHT,BOTTOM"),
        ("nowhere.png", "must be LEFT,TOP,RIGHT,BOTTOM.*got 'nowhere.png'"),
        ("1,2 3,4", "must be LEFT,TOP"),
        ("1,2 3,4 5", "must be LEFT,TOP"),
        ("0,0,200,50", "must be a box within its image of 100 x 80"),
        ("30,0,30,50", "must be a box within"),
        ("-5,0 5,0 5,5", "must be a box within"),
    ],
)
def test_a_region_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        box_or_polygon(text, (100, 80))


def test_a_region_is_found_in_its_file_or_in_the_folder(panels: Path, tmp_path: Path) -> None:
    image = next((panels / "panel/train/good").iterdir())
    assert find_region("", tmp_path, image) is None
    (tmp_path / "region.txt").write_text("8,16,40,48\n")
    assert find_region("", tmp_path, image) == find_region("8,16,40,48", tmp_path, image)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[16:48, 8:40] = 255
    Image.fromarray(mask).save(tmp_path / "region.png")
    with pytest.raises(ValueError, match=r"holds region\.png and region\.txt"):
        find_region("", tmp_path, image)
    (tmp_path / "region.txt").unlink()
    found = find_region("", tmp_path, image)
    assert found is not None and found.box == (8, 16, 40, 48) and found.mask
    assert found == find_region(str(tmp_path / "region.png"), tmp_path / "elsewhere", image)
    Image.fromarray(mask * 0).save(tmp_path / "empty.png")
    with pytest.raises(ValueError, match=r"--region .*empty\.png: the region of interest is empty"):
        find_region(str(tmp_path / "empty.png"), tmp_path, image)


def test_check_data_finds_what_training_would_refuse(panels: Path, tmp_path: Path) -> None:
    folder = tmp_path / "panel"
    shutil.copytree(panels / "panel", folder)
    (folder / "region.txt").write_text("8,16,400,48")
    (problem,) = check_data(tmp_path).problems
    assert problem.severity == "error" and "within its image of 160 x 96" in problem.message
    with pytest.raises(ValueError, match="within its image of 160 x 96"):
        prepared(PRESETS["stfpm"].with_values(TINY), tmp_path)
    (folder / "region.txt").write_text("8,16,40,48")
    assert check_data(tmp_path).is_trainable
    Image.new("RGB", (80, 80)).save(folder / "train/good/odd.png")
    report = check_data(tmp_path)
    assert not report.is_trainable
    assert [each.path.name for each in report.problems if each.kind == "another shape than the region"] == ["odd.png"]


def test_a_region_drawn_on_other_images_is_refused_by_name(tmp_path: Path) -> None:
    geometry = Geometry(width=32, height=32, region=box_or_polygon("10,10,50,50", (100, 80)))
    Image.new("RGB", (50, 40)).save(tmp_path / "half.png")
    assert load_framed(tmp_path / "half.png", geometry).frame.box == (5, 5, 25, 25), "the same at half the scale"
    Image.new("RGB", (80, 80)).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match=r"other\.png .*drawn on images of 100 x 80 pixels, this one has 80 x 80"):
        load_framed(tmp_path / "other.png", geometry)


@pytest.mark.parametrize("mask", ["no text", base64.b64encode(b"no picture").decode()])
def test_a_damaged_mask_of_a_region_is_refused(mask: str) -> None:
    with pytest.raises(ValueError, match="mask of the region of interest"):
        RegionOfInterest(width=8, height=8, left=0, top=0, right=4, bottom=4, mask=mask)
    whole = region_of_mask(np.ones((4, 4), np.bool_))
    with pytest.raises(ValueError, match="the mask of the region of interest must be 3 x 4 pixels, at most"):
        dataclasses.replace(whole, right=3)


# ------------------------------------------------------------------------------------------- there and back


REGIONS = ("", "7,3,61,40", "10,5 60,8 50,44 12,30")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["square", "letterbox", "64x32", "32x96"]),
    st.sampled_from(REGIONS),
    st.tuples(st.integers(64, 150), st.integers(48, 150)),
    st.integers(0, 2**16),
)
def test_a_point_of_the_map_is_within_its_box_in_the_image(
    resize: str, region: str, size: tuple[int, int], seed: int
) -> None:
    """Whatever the geometry: the image's map holds the peak, and all its pixels above 0 lie in the box and region."""
    there = box_or_polygon(region, size) if region else None
    geometry = Geometry.of(DataConfig(image_size=32, resize=resize), there)
    frame = geometry.frame(*size)
    inside = geometry.inside(frame)
    spots = np.argwhere(inside)
    row, column = spots[seed % len(spots)]
    heat = np.zeros(inside.shape, np.float32)
    heat[row, column] = 2.5
    (seen,) = (in_image(each, frame, 1) for each in find_regions(heat, 1.0))
    full = frame.to_image(heat)
    assert full.shape == size[::-1] and full.max() == 2.5
    rows, columns = np.nonzero(full)
    assert rows.min() >= seen.top and rows.max() < seen.bottom
    assert columns.min() >= seen.left and columns.max() < seen.right
    assert frame.box[0] <= seen.left < seen.right <= frame.box[2]
    assert frame.box[1] <= seen.top < seen.bottom <= frame.box[3]
    x, y = zip(*seen.contour, strict=True)
    assert (min(x), min(y)) >= (seen.left, seen.top) and max(x) <= seen.right and max(y) <= seen.bottom
    small = frame.to_image(heat, size=(max(1, size[0] // 3), max(1, size[1] // 3)))
    assert small.max() == 2.5, "a smaller copy keeps the peak"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["square", "letterbox", "64x32"]),
    st.sampled_from(REGIONS),
    st.tuples(st.integers(64, 150), st.integers(48, 150)),
)
def test_pixels_and_masks_of_an_image_lie_in_the_same_place(resize: str, region: str, size: tuple[int, int]) -> None:
    """A bright block of the image is where its mask is, and what is not scored is neutral."""
    there = box_or_polygon(region, size) if region else None
    geometry = Geometry.of(DataConfig(image_size=64, resize=resize), there)
    image = np.zeros((size[1], size[0], 3), np.uint8)
    image[10:34, 16:48] = 255
    frame = geometry.frame(*size)
    canvas, mask = np.asarray(geometry.canvas(Image.fromarray(image), frame)), geometry.mask(image[..., 0] > 0, frame)
    inside = geometry.inside(frame)
    assert mask.any() and not mask[~inside].any()
    assert (canvas[~inside] == NEUTRAL).all()
    agree = (canvas[..., 0] > 127) == mask
    assert agree[inside].mean() > 0.9, "but for the block's soft edge"


def test_a_mask_at_another_scale_marks_the_same_place() -> None:
    geometry = Geometry.of(DataConfig(image_size=32, resize="letterbox"), box_or_polygon("20,10,80,70", (120, 80)))
    mask = np.zeros((80, 120), np.bool_)
    mask[20:40, 30:60] = True
    frame = geometry.frame(120, 80)
    np.testing.assert_array_equal(geometry.mask(mask, frame), geometry.mask(mask[::2, ::2], frame))
    assert not geometry.is_outside(mask) and not geometry.is_outside(np.zeros_like(mask))
    mask[:] = False
    mask[72:78, 5:15] = True
    assert geometry.is_outside(mask) and geometry.is_outside(mask[::2, ::2])


def test_a_plain_square_is_what_it_always_was(panels: Path) -> None:
    path = panels / "panel/test/good/0.png"
    framed = load_framed(path, Geometry.square(32))
    with Image.open(path) as image:
        np.testing.assert_array_equal(framed.rgb, np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)))
    assert load_inside([path], Geometry.square(32)) is None and Geometry.of(DataConfig(image_size=32)).is_plain
    assert not Geometry.of(DataConfig(image_size=32, resize="letterbox")).is_plain


def test_a_letterbox_keeps_the_aspect_ratio() -> None:
    geometry = Geometry.of(DataConfig(image_size=64, resize="letterbox"))
    assert geometry.frame(1920, 1080).place == (0, 14, 64, 50)
    assert geometry.frame(500, 12000).place == (30, 0, 33, 64)
    assert geometry.frame(1, 1).place == (0, 0, 64, 64)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.9))
def test_an_outline_goes_around_all_pixels_and_nothing_else(seed: int, share: float) -> None:
    heat = (np.random.default_rng(seed).random((7, 9)) < share).astype(np.float32)
    for region in find_regions(heat, 0.5):
        x, y = (np.array(each) for each in zip(*region.contour, strict=True))
        assert (x.min(), y.min(), x.max(), y.max()) == (region.left, region.top, region.right, region.bottom)
        assert ((np.diff(x, append=x[0]) == 0) != (np.diff(y, append=y[0]) == 0)).all(), "corners only"
        # The shoelace formula: clockwise with y downwards is positive; what the border encloses has its holes filled.
        area = (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2
        pixels = (heat > 0.5)[region.top : region.bottom, region.left : region.right]
        assert area >= 1 and area <= pixels.size
    block = np.zeros((5, 6), np.bool_)
    block[1:4, 2:5] = True
    block[2, 3] = False
    assert outline(block[1:4, 2:5]) == [(0, 0), (3, 0), (3, 3), (0, 3)]


# ------------------------------------------------------------------------------------------- region of interest


def test_no_synthetic_defect_leaves_the_region() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 48, 64, 3), dtype=np.uint8)
    inside = np.zeros(images.shape[:3], np.bool_)
    inside[:, 10:40, 8:30] = True
    changed, masks = add_defects(images, seed=1, inside=inside)
    assert (changed == images)[~inside].all() and not masks[~inside].any()
    assert masks.any(axis=(1, 2)).all()
    control, control_masks = add_defects(images, seed=1)
    assert control_masks[~inside].any() and (control != images)[~inside].any()
    unchanged, none = add_defects(images[:2], seed=1, inside=np.zeros_like(inside[:2]))
    assert (unchanged == images[:2]).all() and not none.any()


def test_pixels_outside_are_of_neither_kind() -> None:
    rng = np.random.default_rng(0)
    maps = rng.random((4, 8, 8)).astype(np.float32)
    masks = rng.random((4, 8, 8)) < 0.3
    inside = np.zeros_like(masks)
    inside[:, 2:6, 1:7] = True
    scores, labels = rng.random(4), np.array([False, True, True, False])
    found = score_maps(maps, masks, scores, labels, inside=inside)
    cut = score_maps(maps[:, 2:6, 1:7], masks[:, 2:6, 1:7], scores, labels)
    assert found == cut != score_maps(maps, masks, scores, labels)
    with pytest.raises(ValueError, match="expected inside of the masks' shape"):
        score_maps(maps, masks, scores, labels, inside=inside[:, :4])


class Inspected(NamedTuple):
    detector: Detector
    folder: Path


@pytest.fixture(scope="module")
def within(panels: Path, tmp_path_factory: pytest.TempPathFactory) -> Inspected:
    """A detector of panels with a polygon as region of interest, in a letterbox."""
    folder = tmp_path_factory.mktemp("within") / "panel"
    config = PRESETS["stfpm"].with_values(TINY | {"resize": "letterbox", "image_size": 64, "epochs": 10})
    return Inspected(trained(config, panels, folder, REGION), folder)


def test_nothing_outside_of_the_region_changes_anything(within: Inspected, tmp_path: Path) -> None:
    """Bit for bit; and nothing in the bars, which are not part of the image."""
    rng = np.random.default_rng(9)
    before = panel(rng, spot=SPOT)
    region = within.detector.record.region
    assert region is not None
    left, top, right, bottom = region.box
    native = Geometry(width=1, height=1, tile=1, region=region)
    inside = np.zeros((HEIGHT, WIDTH), np.bool_)
    inside[top:bottom, left:right] = native.inside(native.frame(WIDTH, HEIGHT))
    # The canvas is smaller: its pixels on the border are made of pixels of both sides.
    reach = ndimage.binary_dilation(inside, iterations=6) & (np.arange(WIDTH) >= left) & (np.arange(WIDTH) < right)
    reach[:top] = reach[bottom:] = False
    after = before.copy()
    after[~reach] = rng.integers(0, 256, (int((~reach).sum()), 3))
    changed = before.copy()
    changed[50:60, 110:120] = 255
    for name, pixels in (("before", before), ("after", after), ("changed", changed)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    paths = [tmp_path / f"{name}.png" for name in ("before", "after", "changed")]
    first, second, control = within.detector.predict(paths, 0.1)
    assert control.score != first.score
    assert first.score == second.score > 0 and first.regions == second.regions
    np.testing.assert_array_equal(first.map, second.map)
    assert (before != after).any() and not first.map[~reach].any() and first.map[inside].any()


def test_a_defect_outside_of_the_region_does_not_count(panels: Path) -> None:
    region = box_or_polygon(REGION, (WIDTH, HEIGHT))
    for resize in ("square", "letterbox"):
        geometry = Geometry.of(DataConfig(image_size=32, resize=resize), region)
        told: list[str] = []
        truth = labelled_test_split(panels, "panel", geometry, on_note=told.append)
        assert int(truth.labels.sum()) == 3 and not truth.masks[~truth.labels].any()
        assert sum("counts as good: its defect lies outside" in note for note in told) == 3
        assert truth.inside is not None and not truth.masks[~truth.inside].any()
    control = labelled_test_split(panels, "panel", Geometry.square(32))
    assert int(control.labels.sum()) == 6 and control.inside is None


def test_validation_and_stage_one_draw_only_inside(panels: Path, tmp_path: Path) -> None:
    config = PRESETS["aand"].with_values(TINY)
    cache = ArrayCache(tmp_path / "cache", 10**9)
    found = prepared(config, panels, REGION, cache)
    truth = found.validation
    assert truth.inside is not None and not truth.masks[~truth.inside].any() and truth.masks.any()
    normals = truth.images[: len(truth.images) - 32]
    copies = truth.images[len(normals) :]
    changed = (copies != normals[truth.sources[len(normals) :]]).any(axis=3)
    assert not changed[~truth.inside[len(normals) :]].any()
    again = prepared(config, panels, REGION, cache)
    np.testing.assert_array_equal(again.train_images, found.train_images)
    other = prepared(config, panels, "", cache)
    assert (other.train_images != found.train_images).any(), "a region has pixels of its own in the cache"
    assert other.data_sha256 != found.data_sha256, "and no training with it goes on without it"


def test_a_detector_keeps_its_region_and_older_ones_have_none(within: Inspected, tmp_path: Path) -> None:
    document = json.loads((within.folder / RECORD_FILE).read_text())
    assert document["schema"] == SCHEMA_VERSION and document["region"]["outline"]
    assert read_record(within.folder).region == box_or_polygon(REGION, (WIDTH, HEIGHT))
    older = tmp_path / "older"
    older.mkdir()
    (older / "model.safetensors").write_bytes((within.folder / "model.safetensors").read_bytes())
    document["schema"] = 2
    del document["region"]
    for name in ("resize", "tile", "overlap"):
        del document["config"]["data"][name]
    (older / RECORD_FILE).write_text(json.dumps(document))
    loaded = Detector.load(older)
    assert loaded.record.region is None and loaded.geometry == Geometry.square(64)
    document["region"] = {"width": 4, "height": 4, "left": 2, "top": 0, "right": 1, "bottom": 4}
    (older / RECORD_FILE).write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"is damaged .*must be a box within"):
        Detector.load(older)


# ------------------------------------------------------------------------------------------- every output


def overlap_of(box: tuple[int, int, int, int]) -> bool:
    """Whether a box lies on the spot and is not much larger."""
    left, top, right, bottom = box
    touches = left < SPOT[2] and right > SPOT[0] and top < SPOT[3] and bottom > SPOT[1]
    return touches and left > SPOT[0] - 24 and right < SPOT[2] + 24 and top > SPOT[1] - 24 and bottom < SPOT[3] + 24


def highest(regions: Any) -> tuple[int, int, int, int]:
    first = regions[0]
    values = first if isinstance(first, dict) else first._asdict()
    return values["left"], values["top"], values["right"], values["bottom"]


@pytest.fixture(scope="module")
def spotted(panels: Path) -> list[Path]:
    return sorted((panels / "panel/test/spot").iterdir())


def high(detector: Detector, paths: list[Path]) -> float:
    """A threshold at which only the core of the spots is anomalous."""
    return 0.7 * min(seen.score for seen in detector.predict(paths, 0.0))


def test_boxes_and_outlines_lie_on_the_defect_in_every_answer(
    within: Inspected, spotted: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, limit = within.detector, high(within.detector, spotted)
    seen = list(detector.predict(spotted, limit))
    # Python
    for each in seen:
        assert (each.width, each.height) == (WIDTH, HEIGHT) and each.map.shape == (HEIGHT, WIDTH)
        assert each.is_anomalous and overlap_of(highest(each.regions))
        row, column = np.unravel_index(int(each.map.argmax()), each.map.shape)
        assert SPOT[1] - 8 <= row < SPOT[3] + 8 and SPOT[0] - 8 <= column < SPOT[2] + 8
        assert float(each.map.max()) == pytest.approx(each.score)
    expected = [each.to_dict() for each in seen]
    # JSON of the command
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        main(["predict", str(within.folder), *map(str, spotted), "--out", str(tmp_path / "told"), "--threshold",
              repr(limit), "--json"])  # fmt: skip
    told = json.loads(out.getvalue())["predictions"]
    for line, there in zip(told, expected, strict=True):
        assert line["regions"] == there["regions"] and (line["width"], line["height"]) == (WIDTH, HEIGHT)
        assert line["regions"][0]["contour"][0] == list(there["regions"][0]["contour"][0])
    # overlay: the box's red line around the spot, in a picture of the image's own aspect ratio
    with Image.open(tmp_path / "told" / told[0]["overlay"]) as picture:
        assert picture.size == (2 * 384, round(384 * HEIGHT / WIDTH) + 40 + 36)
        left, top, right, _ = (round(384 / WIDTH * edge) for edge in highest(expected[0]["regions"]))
        line = np.asarray(picture.convert("RGB"), np.int64)[40 + top - 2, left + 2 : right - 2]
        assert (line[:, 0] - line[:, 2] > 80).all()  # orange, as far as the lossy format leaves it so
    # ONNX
    graph = OnnxDetector(build_model(detector).SerializeToString())
    for exported, own in zip(graph.predict(spotted, limit), seen, strict=True):
        assert isinstance(exported, Prediction) and overlap_of(highest(exported.regions))
        assert exported.score == pytest.approx(own.score, rel=1e-4)
    # batch inspection
    files = {file.name: file.read_bytes() for file in within.folder.iterdir() if file.suffix != ".png"}
    monkeypatch.setattr(ray, "get", lambda given: given)
    images = str(spotted[0].parent)
    inspector = Inspector(files, limit, images, str(tmp_path / "out"), "all", Workers(1, 1.0, 0.0))  # type: ignore[arg-type]
    batch = decode({"name": np.array([path.name for path in spotted], object)}, images, detector.geometry)
    table = inspector(batch)
    assert table.schema == SCHEMA
    for row, there in zip(table.to_pylist(), expected, strict=True):
        assert highest(row["regions"]) == highest(there["regions"])
        assert (row["width"], row["height"]) == (WIDTH, HEIGHT)
    # served
    pack(within.folder, tmp_path / "model")
    served = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    texts = [base64.b64encode(path.read_bytes()).decode() for path in spotted]
    for row in served.predict(pd.DataFrame({"image": texts})).to_dict("records"):
        assert (row["width"], row["height"]) == (WIDTH, HEIGHT) and row["is_anomalous"]
        left, top, right, bottom = highest(row["regions"])
        assert left < SPOT[2] and right > SPOT[0] and top < SPOT[3] and bottom > SPOT[1]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_trains_and_exports_on_images_that_are_not_square(
    preset: str, panels: Path, tmp_path: Path
) -> None:
    config = PRESETS[preset].with_values(TINY | {"resize": "64x32"})
    detector = trained(config, panels, tmp_path / "panel", "32,0,160,96")
    paths = sorted((panels / "panel/test").rglob("*.png"))
    seen = list(detector.predict(paths, 0.1))
    assert all(each.heat.shape == (32, 64) and each.map.shape == (HEIGHT, WIDTH) for each in seen)
    assert not any(each.map[:, :32].any() for each in seen), "left of the region"
    model = build_model(detector).SerializeToString()
    assert compare(detector, model, network_inputs(detector, paths[:3])).map_error < 1e-4
    assert 0 <= detector.evaluate(panels, "panel").image_auroc <= 1


def test_a_graph_with_a_region_agrees_on_given_and_on_generated_images(within: Inspected, spotted: list[Path]) -> None:
    model = build_model(within.detector)
    names = [entry.name for entry in model.graph.input]
    assert names == ["images", "inside"]
    known = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(known["dskd.region"])["outline"] and "bars" in known["dskd.input"]
    for images in (network_inputs(within.detector, spotted), generated_inputs(within.detector)):
        assert compare(within.detector, model.SerializeToString(), images).num_images == len(images)


def test_an_overlay_of_a_long_image_shows_all_of_it() -> None:
    image = np.full((20, 900, 3), 90, np.uint8)
    heat = np.zeros((16, 16), np.float32)
    heat[8, 15] = 1.0
    frame = Frame(1800, 40, (0, 0, 1800, 40), (16, 16), (0, 0, 16, 16))
    regions = tuple(in_image(each, frame, 1) for each in find_regions(heat, 0.5))
    seen = Prediction(Path("a/b.png"), 1.0, 0.5, True, regions, image, heat, 0, frame)
    picture = np.asarray(seen.plot())
    assert picture.shape == (20 + 40 + 36, 1800, 3)
    assert (regions[0].left, regions[0].right) == (1687, 1800)
    red = np.argwhere((picture[40:60, :900] == (240, 100, 20)).all(axis=2))
    assert red[:, 1].min() == round(1687 / 2) - 2
    assert seen.map_of(9, 2).shape == (2, 9)
    assert whole_frame(9, 2).to_image(np.ones((2, 9), np.float32)).all()


def test_masks_of_samples_follow_the_region(panels: Path) -> None:
    samples = [sample for sample in read_test_split(panels, "panel").test if sample.is_defective]
    outside: list[int] = []
    geometry = Geometry.of(DataConfig(image_size=32), box_or_polygon("32,0,160,96", (WIDTH, HEIGHT)))
    masks = load_masks(samples, geometry, on_outside=outside.append)
    assert [samples[index].defect for index in outside] == ["aside"] * 3
    assert [bool(mask.any()) for mask in masks] == [sample.defect == "spot" for sample in samples]
