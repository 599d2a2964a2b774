"""Large images by tiles: no seams, no lost defect, memory that a tile bounds."""

import base64
import itertools
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dskd.anomaly import anomaly_maps
from dskd.checkpoint import write_detector
from dskd.config import DataConfig, DataSpec, RunConfig, TeacherSource
from dskd.data.cache import ArrayCache
from dskd.data.datasets import read_test_split
from dskd.data.depth import PixelScale
from dskd.data.geometry import ALIGNMENT, NEUTRAL, Geometry, box_or_polygon
from dskd.data.samples import Sample
from dskd.data.tiles import (
    MAP_STRIDE,
    cut,
    defective_tiles,
    load_tiles,
    on_map,
    some_places,
    stitched_map,
    tile_masks,
    tile_places,
    tile_starts,
    tiled_score,
    tiles_inside,
)
from dskd.detector import Detector, Prediction
from dskd.evaluate import score_canvas
from dskd.export import OnnxDetector, build_model, compare, generated_inputs, network_inputs
from dskd.model.distances import discrepancies
from dskd.model.frozen import FrozenNetworks
from dskd.model.teacher import normalize
from dskd.predict import predict_images
from dskd.presets import PRESETS
from dskd.training.inputs import prepare
from dskd.training.reading import ImageReader
from dskd.training.run import TrainingRun
from tune.jobs.score import Inspector
from tune.settings.workers import Workers
from tune.tracking.registry import pack

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
LONG, SHORT = 3000, 160
TINY: dict[str, Any] = {
    "backbone": "test_resnet", "levels": (1, 2), "level_weights": (1.0, 1.0), "score_level_weights": (1.0, 1.0),
    "embedding_depth": 1, "image_size": 64, "validation_fraction": 0.5, "epochs": 4, "batch_size": 16,
    "blur_sigma": 4.0,
}  # fmt: skip
TILED = {"tile": 64, "overlap": 32}


def strip(rng: np.random.Generator, *, spot: tuple[int, int] | None = None, width: int = LONG) -> np.ndarray:
    """A long brushed strip (SHORT, width, 3), with a dark spot of 6 pixels whose corner is `spot` (x, y)."""
    rows, columns = np.mgrid[0:SHORT, 0:width]
    pixels = 150 + 20 * np.sin(columns / 5)[..., None] + 8 * np.sin(rows / 3)[..., None]
    pixels = pixels + rng.normal(0, 3, (SHORT, width, 3))
    if spot is not None:
        pixels[spot[1] : spot[1] + 6, spot[0] : spot[0] + 6] = (40, 20, 20)
    return np.asarray(pixels.clip(0, 255), np.uint8)


SPOTS = ((1500, 70), (2961, 12), (95, 93))
"""In the middle of the image, at its end, and across the seam between tiles."""


@pytest.fixture(scope="module")
def strips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("strips") / "strip"
    rng = np.random.default_rng(1)
    for part, name, spots in (
        ("train", "good", (None,) * 6),
        ("test", "good", (None,) * 3),
        ("test", "spot", SPOTS),
    ):
        for index, spot in enumerate(spots):
            path = root / part / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(strip(rng, spot=spot)).save(path, compress_level=1)
            if spot is not None:
                mask = np.zeros((SHORT, LONG), np.uint8)
                mask[spot[1] : spot[1] + 6, spot[0] : spot[0] + 6] = 255
                place = root / "ground_truth" / name / f"{index}_mask.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(place)
    return root.parent


def trained(config: RunConfig, data: Path, folder: Path, cache: ArrayCache | None = None, region: str = "") -> Detector:
    spec = DataSpec(data=data, category="strip", teacher=TeacherSource("random"), region=region)
    run = TrainingRun.begin(config, prepare(config, spec, device=CPU, cache=cache), CPU)
    for _ in run.intervals():
        pass
    write_detector(folder, *run.detector())
    return Detector.load(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiled") / "strip"


@pytest.fixture(scope="module")
def tiled(strips: Path, folder: Path) -> Detector:
    return trained(PRESETS["stfpm"].with_values(TINY | TILED | {"batch_size": 16}), strips, folder)


# ------------------------------------------------------------------------------------------- cutting


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([(32, 0), (64, 32), (256, 32), (256, 128), (96, 0)]))
def test_tiles_cover_every_pixel_and_start_where_the_network_is_in_step(length: int, kind: tuple[int, int]) -> None:
    tile, overlap = kind
    starts = tile_starts(length, tile, overlap)
    assert all(start % ALIGNMENT == 0 for start in starts) and starts[0] == 0 and starts == sorted(set(starts))
    assert starts[-1] + tile >= length and starts[-1] < max(length, 1)
    assert all(after - before <= tile - overlap for before, after in itertools.pairwise(starts))


def test_a_tile_beyond_the_end_is_mirrored() -> None:
    canvas = np.arange(50 * 70).reshape(50, 70)
    np.testing.assert_array_equal(cut(canvas, 0, 32, 32), canvas[:32, 32:64])
    beyond = cut(canvas, 32, 64, 32)
    np.testing.assert_array_equal(beyond[:18, :6], canvas[32:, 64:])
    np.testing.assert_array_equal(beyond[18, :6], canvas[49, 64:])
    np.testing.assert_array_equal(beyond[:18, 6:9], canvas[32:, [69, 68, 67]])
    assert cut(canvas[:3, :3], 0, 0, 32).shape == (32, 32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tile": 100}, "must be multiples of 32"),
        ({"tile": 128, "overlap": 48}, "overlap must be a multiple of 32, at which tiles start"),
        ({"tile": 64, "overlap": 64}, "at most half of the tile"),
        ({"overlap": -32}, "overlap must be"),
        ({"tile": 64, "resize": "letterbox"}, "leave out resize 'letterbox', or tile"),
    ],
)
def test_impossible_tiles_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig().with_values(values)


def blocks(tiles: np.ndarray) -> np.ndarray:
    """A map without any border: the mean of every 4 × 4 pixels."""
    count, side = tiles.shape[0], tiles.shape[1] // MAP_STRIDE
    whole: np.ndarray = tiles[..., 0].reshape(count, side, MAP_STRIDE, side, MAP_STRIDE).mean(axis=(2, 4))
    return whole.astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(64, 260), st.integers(64, 260), st.sampled_from([0, 32]), st.integers(1, 5))
def test_a_map_that_has_no_borders_is_stitched_to_the_map_of_the_whole(
    height: int, width: int, overlap: int, batch_size: int
) -> None:
    height, width = height // 4 * 4, width // 4 * 4
    canvas = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    geometry = Geometry.of(DataConfig(tile=64, overlap=overlap))
    inside = np.ones((height // 4, width // 4), np.bool_)
    inside[2:5, 3:9] = False
    sizes = []

    def score_tiles(tiles: np.ndarray) -> np.ndarray:
        sizes.append(len(tiles))
        return blocks(tiles)

    found = stitched_map(canvas, inside, geometry, 0.0, score_tiles, batch_size)
    whole = canvas[..., 0].reshape(height // 4, 4, width // 4, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(found[inside], whole[inside], rtol=1e-4)
    assert not found[~inside].any() and max(sizes) <= batch_size


def test_what_tiles_see_at_their_borders_counts_only_at_the_border_of_the_image() -> None:
    """Also where the last two tiles begin close to each other."""
    geometry = Geometry.of(DataConfig(tile=192, overlap=96))

    def score_tiles(tiles: np.ndarray) -> np.ndarray:
        maps = np.ones((len(tiles), 48, 48), np.float32)
        maps[:, 4:-4, 4:-4] = 0
        return maps

    found = stitched_map(np.zeros((224, 192, 3), np.uint8), np.ones((56, 48), np.bool_), geometry, 0.0, score_tiles, 4)
    assert found[:4].min() == found[:, :4].min() == found[-4:].min() == 1 and found[4:-4, 4:-4].max() < 1e-4


def test_tiles_share_enough_unless_asked_otherwise() -> None:
    """As much as leaves no seams, or half of a small tile; whole patches for a transformer."""
    shared = {tile: RunConfig().with_values({"tile": tile}).data.shared(32) for tile in (32, 64, 128, 192, 512)}
    assert shared == {32: 0, 64: 32, 128: 64, 192: 96, 512: 96}
    dinov2 = RunConfig().with_values({"backbone": "vit_small_patch14_dinov2", "image_size": 252, "tile": 252})
    assert dinov2.data.shared(dinov2.model.tile_alignment) == 84
    assert RunConfig.from_dict({"data": {"tile": 256, "overlap": 32}}).data.shared(32) == 32, "as older records say"


def test_a_tile_without_anything_to_score_costs_nothing() -> None:
    geometry = Geometry.of(DataConfig(tile=64, overlap=0))
    inside = np.zeros((64, 64), np.bool_)
    inside[:4, :4] = True
    seen: list[int] = []

    def score_tiles(tiles: np.ndarray) -> np.ndarray:
        seen.append(len(tiles))
        return np.ones((len(tiles), 16, 16), np.float32)

    found = stitched_map(np.zeros((256, 256, 3), np.uint8), inside, geometry, 1.0, score_tiles, 4)
    assert seen == [1] and found[:4, :4].all() and not found[4:].any()


def test_the_score_of_an_image_does_not_thin_out_with_its_size() -> None:
    geometry = Geometry.of(DataConfig(tile=64, overlap=0))
    heat = np.zeros((16, 16), np.float32)
    heat[3, :8] = np.arange(8)
    large = np.zeros((160, 160), np.float32)
    large[100, 100:108] = np.arange(8)
    for fraction in (0.0, 4 / 256):
        assert tiled_score(heat, geometry, fraction) == tiled_score(large, geometry, fraction) > 0
    assert tiled_score(heat, geometry, 0.0) == 7 and tiled_score(heat, geometry, 4 / 256) == 5.5


def test_masks_keep_every_defect_on_the_coarser_map() -> None:
    mask = np.zeros((10, 13), np.bool_)
    mask[9, 12] = mask[1, 5] = True
    found = on_map(mask)
    assert found.shape == (3, 4) and np.argwhere(found).tolist() == [[0, 1], [2, 3]]


def test_tiles_outside_of_the_region_are_not_trained_on(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:40, :60]).save(tmp_path / "small.png")
    paths = [tmp_path / "a.png", tmp_path / "small.png"]
    plain = Geometry.of(DataConfig(tile=64, overlap=0))
    frames = [plain.frame(192, 128), plain.frame(60, 40)]
    places = tile_places(frames, plain)
    assert [tuple(place) for place in places] == [
        (0, top, left) for top in (0, 64) for left in (0, 64, 128)
    ] + [(1, 0, 0)]  # fmt: skip
    tiles, inside = load_tiles(paths, places, plain), tiles_inside(frames, places, plain)
    assert inside is not None and inside[:6].all() and inside[6, :40, :60].all() and not inside[6, 40:].any()
    np.testing.assert_array_equal(tiles[5], pixels[64:, 128:])
    np.testing.assert_array_equal(tiles[6][:40, :60], pixels[:40, :60])
    assert tiles_inside(frames[:1], places[:6], plain) is None
    triangle = Geometry.of(DataConfig(tile=64, overlap=0), box_or_polygon("0,0 192,0 0,128", (192, 128)))
    assert len(tile_places([triangle.frame(192, 128)], triangle)) == 5, "the tile in the far corner is left out"
    assert some_places(places, 3, 0) == some_places(places, 3, 0) != some_places(places, 3, 1)
    assert len(some_places(places, 3, 0)) == 3 and some_places(places, 99, 0) == places

    mask = np.zeros((128, 192), np.bool_)
    mask[70:80, 10:20] = True
    samples = [Sample(paths[0], "dent", Path("mask")), Sample(paths[1], "good", None)]
    masks = tile_masks(samples, lambda sample: mask, frames, places, plain)
    expected = [False, False, False, True, False, False, False]
    assert masks.any(axis=(1, 2)).tolist() == expected
    assert defective_tiles(samples, lambda sample: mask, frames, places, plain) == expected


def test_few_defective_tiles_among_many_are_taken_first(strips: Path) -> None:
    geometry = Geometry.of(DataConfig(tile=64, overlap=32))
    samples = read_test_split(strips, "strip").test
    reader = ImageReader(geometry, PixelScale(kind="none"), None, False, 0, lambda note: None)
    truth, _ = reader.read_labelled(samples, "test images", 40)
    assert len(truth.images) == 40 and 6 <= int(truth.labels.sum()) <= 20
    assert (truth.masks.any(axis=(1, 2)) == truth.labels).all()
    few, _ = reader.read_labelled(samples, "test images", 6)
    assert int(few.labels.sum()) == 3


# ------------------------------------------------------------------------------------------- seams


def shifted_apart(
    score: Callable[[np.ndarray], np.ndarray], texture: np.ndarray, size: tuple[int, int], step: int, border: int
) -> float:
    """How far the map of a view and that of the same view `step` pixels further are apart in their common inside."""
    height, width = size
    first = score(texture[:height, :width])
    second = score(texture[step : step + height, step : step + width])
    near, moved = border // MAP_STRIDE, step // MAP_STRIDE
    common = first[moved + near : -near, moved + near : -near] - second[near : -near - moved, near : -near - moved]
    return float(np.abs(common).max())


@pytest.fixture(scope="module")
def surface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 256 pixels of one irregular surface."""
    root = tmp_path_factory.mktemp("surface") / "strip"
    (root / "train/good").mkdir(parents=True)
    for index in range(6):
        Image.fromarray(rough(index, 256)).save(root / f"train/good/{index}.png")
    return root.parent


def rough(seed: int, side: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(60, 200, (side // 8 + 1, side // 8 + 1, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), np.float32)
    return np.asarray((smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255), np.uint8)


@pytest.mark.parametrize(("preset", "overlap"), [("stfpm", 32), ("rd4ad", 64), ("dskd", 64)])
def test_an_image_that_is_shifted_has_the_shifted_map(preset: str, overlap: int, surface: Path, tmp_path: Path) -> None:
    """Within 5 % of the threshold wherever tiles meet, as for the map of the whole image without tiles.

    A decoder sees further than an encoder, so its tiles share more here, for a test with a margin.
    """
    values = TINY | {"tile": 128, "overlap": overlap, "epochs": 8, "batch_size": 8, "validation_fraction": 0.34}
    detector = trained(PRESETS[preset].with_values(values), surface, tmp_path / "strip")
    config, threshold = detector.record.config, detector.record.thresholds[0].value
    texture = rough(99, 448)
    step, border = 2 * detector.teacher.reductions[-1], 64
    assert ALIGNMENT % step == 0

    def by_tiles(canvas: np.ndarray, overlap: int = overlap) -> np.ndarray:
        geometry = Geometry.of(DataConfig(tile=128, overlap=overlap))
        frame = geometry.frame(canvas.shape[1], canvas.shape[0])
        networks = FrozenNetworks(detector.teacher, detector.students)
        return score_canvas(networks, canvas, frame, config, geometry, CPU)[0]

    def at_once(canvas: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            pixels = normalize(torch.from_numpy(canvas[None].copy()))
            targets = detector.teacher(pixels)
            outputs = detector.students(pixels, targets)
            found = discrepancies(targets, outputs.encoder, outputs.decoder)
            side = canvas.shape[0]
            (heat,) = anomaly_maps(found, config.score, side).numpy()
        return np.asarray(heat[::MAP_STRIDE, ::MAP_STRIDE])

    control = shifted_apart(at_once, texture, (384, 384), step, border)
    assert control < 0.05 * threshold
    assert shifted_apart(by_tiles, texture, (384, 384), step, border) < 0.05 * threshold
    seams = shifted_apart(lambda canvas: by_tiles(canvas, 0), texture, (384, 384), step, border)
    assert seams > 0.05 * threshold, "without an overlap there are seams, which this test sees"


# ------------------------------------------------------------------------------------------- small defects


@pytest.mark.slow
def test_a_defect_of_six_pixels_in_three_thousand_is_found_with_tiles_and_missed_without(
    tiled: Detector, strips: Path, tmp_path: Path
) -> None:
    """Boxes, scores and verdicts of whole images, with thresholds from whole images."""
    good, bad = (sorted((strips / "strip/test" / name).iterdir()) for name in ("good", "spot"))
    limit = 1.3 * tiled.record.thresholds[0].value
    assert tiled.record.thresholds[0].num_normals == 2, "images, not tiles"
    assert not any(seen.is_anomalous for seen in tiled.predict(good, limit))
    for seen, (x, y) in zip(tiled.predict(bad, limit), SPOTS, strict=True):
        first = seen.regions[0]
        assert seen.is_anomalous and (seen.width, seen.height) == (LONG, SHORT)
        assert first.left < x + 6 and first.right > x and first.top < y + 6 and first.bottom > y
        assert first.right - first.left < 48 and first.bottom - first.top < 48
        assert seen.map.shape == (SHORT, LONG) and seen.map.max() == pytest.approx(seen.score)
    assert tiled.evaluate(strips, "strip").image_auroc == 1

    whole = trained(PRESETS["stfpm"].with_values(TINY | {"batch_size": 2}), strips, tmp_path / "whole")
    limit = 1.3 * whole.record.thresholds[0].value
    assert not any(seen.is_anomalous for seen in whole.predict([*good, *bad], limit))


def test_every_answer_tells_the_spot_in_the_pixels_of_the_image(
    tiled: Detector, folder: Path, strips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted((strips / "strip/test/spot").iterdir())
    limit = 1.3 * tiled.record.thresholds[0].value
    expected = [seen.to_dict() for seen in tiled.predict(paths, limit)]
    boxes = [(row["regions"][0]["left"], row["regions"][0]["top"]) for row in expected]
    told = predict_images(tiled, paths, tmp_path / "told", threshold=limit).predictions
    assert [row["regions"] for row in told] == [row["regions"] for row in expected]
    with Image.open(tmp_path / "told" / told[0]["overlay"]) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    # Two panels of 1024 px; WebP keeps a thin red line only roughly.
    left = round(boxes[0][0] * 1024 / LONG)
    near = pixels[:, max(0, left - 6) : left + 6].astype(int)
    assert pixels.shape[1] == 2 * 1024 and (near[..., 0] - near[..., 1:].max(axis=2) > 60).any()

    graph = OnnxDetector(build_model(tiled).SerializeToString())
    for seen, there in zip(graph.predict(paths, limit), expected, strict=True):
        assert isinstance(seen, Prediction) and seen.score == pytest.approx(there["score"], rel=1e-4)
        assert abs(seen.regions[0].left - there["regions"][0]["left"]) <= MAP_STRIDE

    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".png"}
    monkeypatch.setattr(ray, "get", lambda given: given)
    inspector = Inspector(files, limit, str(paths[0].parent), str(tmp_path / "out"), "anomalous", Workers(1, 1.0, 0.0))  # type: ignore[arg-type]
    rows = inspector({"name": np.array([*(path.name for path in paths), "gone.png"], object)}).to_pylist()
    assert [(row["regions"][0]["left"], row["regions"][0]["top"]) for row in rows[:-1]] == boxes
    assert rows[-1]["verdict"] == "unreadable" and "does not exist" in rows[-1]["error"]
    assert all((tmp_path / "out" / row["overlay"]).is_file() for row in rows[:-1])

    pack(folder, tmp_path / "model")
    served = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    texts = [base64.b64encode(path.read_bytes()).decode() for path in paths]
    for row, (x, y) in zip(served.predict(pd.DataFrame({"image": texts})).to_dict("records"), SPOTS, strict=True):
        first = row["regions"][0]
        assert (row["width"], row["height"]) == (LONG, SHORT)
        assert first["left"] < x + 6 and first["right"] > x and first["top"] < y + 6 and first["bottom"] > y


def test_the_graph_of_tiles_agrees_with_the_detector(tiled: Detector, strips: Path) -> None:
    model = build_model(tiled)
    assert [output.name for output in model.graph.output] == ["maps"]
    known = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(known["dskd.config"])["data"]["tile"] == 64 and "tiles of 64 x 64" in known["dskd.input"]
    paths = sorted((strips / "strip/test").rglob("*.png"))[:2]
    for images in (network_inputs(tiled, paths), generated_inputs(tiled)):
        assert compare(tiled, model.SerializeToString(), images).map_error < 1e-4


@pytest.mark.parametrize("preset", ["aand", "dskd"])
def test_presets_train_on_tiles_of_a_region(preset: str, surface: Path, tmp_path: Path) -> None:
    """Also stage I, and from the cache; real validation defects count by tile; nothing outside is seen."""
    data = tmp_path / "strip"
    (data / "validation/hole").mkdir(parents=True)
    (data / "validation_ground_truth/hole").mkdir(parents=True)
    (data / "train").symlink_to(surface / "strip/train")
    for index in range(2):
        pixels, mask = rough(50 + index, 256), np.zeros((256, 256), np.uint8)
        pixels[100:120, 100:120], mask[100:120, 100:120] = 255, 255
        Image.fromarray(pixels).save(data / f"validation/hole/{index}.png")
        if index == 0:
            Image.fromarray(mask).save(data / f"validation_ground_truth/hole/{index}_mask.png")
    values = TINY | TILED | {"amplification_epochs": 1, "epochs": 2, "score_candidates": 4, "validation_fraction": 0.4}
    config = PRESETS[preset].with_values(values)
    cache = ArrayCache(tmp_path / "cache", 10**9)
    region = "0,0 256,0 256,256 128,256"
    spec = DataSpec(data=tmp_path, category="strip", teacher=TeacherSource("random"), region=region)
    inputs = prepare(config, spec, device=CPU, cache=cache)
    assert inputs.num_validation_defects == 1 and any("without a mask are left out" in note for note in inputs.notes)
    truth = inputs.validation
    assert truth.inside is not None and not truth.masks[~truth.inside].any()
    assert not inputs.calibration_images.size and len(inputs.calibration_paths) == 1
    detector = trained(config, tmp_path, tmp_path / "detectors/strip", cache, region)
    pixels = rough(7, 300)[:256, :256]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    changed = pixels.copy()
    changed[200:, :60] = 0
    Image.fromarray(changed).save(tmp_path / "b.png")
    first, second = detector.predict([tmp_path / "a.png", tmp_path / "b.png"], 0.1)
    assert first.score == second.score > 0 and not first.map[200:, :60].any()


# ------------------------------------------------------------------------------------------- memory


def test_only_the_tiles_of_a_large_image_become_arrays() -> None:
    picture = Image.effect_noise((2500, 1500), 50).convert("RGB")
    geometry = Geometry.of(DataConfig(tile=64))
    whole = np.asarray(picture)
    tracemalloc.start()
    canvas = geometry.canvas(picture, geometry.frame(*picture.size))
    for top, left in [(0, 0), (704, 1280), (1472, 2464)]:
        np.testing.assert_array_equal(cut(canvas, top, left, 64), cut(whole, top, left, 64))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.05 * whole.nbytes
    np.testing.assert_array_equal(canvas, whole)


@pytest.mark.parametrize("region", ["", "20,10,140,100", "20,10 140,10 90,100"])
def test_a_large_canvas_is_neutral_where_nothing_is_scored(region: str) -> None:
    """The region is smaller than a tile, so that some of the canvas lies beyond the image's part."""
    picture = Image.effect_noise((160, 120), 50).convert("RGB")
    there = box_or_polygon(region, picture.size) if region else None
    geometry = Geometry.of(DataConfig(tile=128), there)
    frame = geometry.frame(*picture.size)
    canvas, inside = np.asarray(geometry.canvas(picture, frame)), geometry.inside(frame)
    left, top, right, bottom = frame.box
    box = np.asarray(picture)[top:bottom, left:right]
    np.testing.assert_array_equal(canvas[: bottom - top, : right - left][inside[: bottom - top, : right - left]],
                                  box[inside[: bottom - top, : right - left]])  # fmt: skip
    assert (canvas[~inside] == NEUTRAL).all() and inside.any() and not inside.all()


@pytest.mark.slow
def test_memory_at_100_megapixels_is_that_of_the_image_and_one_batch_of_tiles(surface: Path, tmp_path: Path) -> None:
    """Pillow keeps an image in four bytes a pixel; to decode it, and for the map, 0.3 bytes more are granted."""
    side, tile = 9984, 256
    values = TINY | {"tile": tile, "overlap": 0, "epochs": 1, "batch_size": 4}
    trained(PRESETS["stfpm"].with_values(values), surface, tmp_path / "strip")
    square = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(np.tile(square, (side // 64, side // 64, 1))).save(tmp_path / "large.png", compress_level=1)
    body = (
        "import resource, sys, pathlib, numpy as np, torch\n"
        "from dskd import evaluate\n"
        "from dskd.detector import Detector\n"
        "torch.set_num_threads(1)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "folder, image, side, tile = *map(pathlib.Path, sys.argv[1:3]), *map(int, sys.argv[3:])\n"
        "detector = Detector.load(folder)\n"
        "detector.score_images(np.zeros((evaluate._BATCH, tile, tile, 3), np.uint8))\n"
        "before = peak()\n"
        "(seen,) = detector.predict([image], 0.1)\n"
        "assert (seen.width, seen.height) == (side, side)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", body, str(tmp_path / "strip"), str(tmp_path / "large.png"), str(side), str(tile)],
        cwd=ROOT, capture_output=True, text=True, timeout=500, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 4.3 * side * side
