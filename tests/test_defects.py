from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from dskd.data import defects
from dskd.data.defects import NOTICEABLE, add_defects, choose_textures, find_foreground, load_textures, perlin_noise

Bytes = NDArray[np.uint8]


def disc(height: int, width: int, radius: float) -> NDArray[np.bool_]:
    rows, columns = np.mgrid[:height, :width]
    return np.asarray(np.hypot(rows - height / 2, columns - width / 2) <= radius)


def product(count: int, height: int = 96, width: int = 96, *, grey: bool = False) -> Bytes:
    """A striped disc on a plain, slightly noisy background."""
    rng = np.random.default_rng(7)
    image = np.full((height, width, 3), 40.0)
    stripes = 150 + 30 * np.sin(np.arange(width) / 3)
    colour = [1.0, 1.0, 1.0] if grey else [1.0, 0.7, 0.4]
    image[disc(height, width, 0.35 * height)] = 0
    image += disc(height, width, 0.35 * height)[..., None] * stripes[None, :, None] * colour
    noise = rng.normal(0, 1.5, size=(count, height, width, 1 if grey else 3))
    return np.broadcast_to((image + noise).clip(0, 255), (count, height, width, 3)).astype(np.uint8)


def change(images: Bytes, changed: Bytes) -> NDArray[np.int16]:
    return np.asarray(np.abs(changed.astype(np.int16) - images).max(axis=-1))


SCENES = {
    "product": product(24),
    "grey": product(12, grey=True),
    "wide": product(8, 48, 80),
    "black": np.zeros((16, 32, 32, 3), np.uint8),
    "white": np.full((16, 32, 32, 3), 255, np.uint8),
    "mid-grey": np.full((8, 128, 128, 3), 128, np.uint8),
    "tiny": np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8),
    "noise": np.random.default_rng(1).integers(0, 256, (12, 64, 64, 3), np.uint8),
}


@pytest.mark.parametrize("scene", SCENES)
def test_masks_are_exactly_the_noticeable_changes(scene: str) -> None:
    images = SCENES[scene]
    before = images.copy()
    for seed in (0, 1):
        changed, masks = add_defects(images, seed=seed)
        assert (images == before).all()
        assert changed.dtype == np.uint8 and masks.dtype == np.bool_
        assert (changed.shape, masks.shape) == (images.shape, images.shape[:3])
        noticed = change(images, changed) > NOTICEABLE
        assert masks.any(axis=(1, 2)).all()
        assert not (noticed & ~masks).any()
        for mask, visible in zip(masks, noticed, strict=True):
            assert not (mask & ~ndimage.binary_dilation(visible, iterations=2)).any()


@pytest.mark.parametrize("scene", ["product", "grey", "mid-grey"])
def test_defects_are_visible(scene: str) -> None:
    images = SCENES[scene]
    changed, masks = add_defects(images, seed=3)
    strength = [values[mask].max() for values, mask in zip(change(images, changed), masks, strict=True)]
    assert min(strength) > 1.5 * NOTICEABLE


def test_a_defect_depends_on_its_image_index_and_seed_only() -> None:
    images = product(12)
    changed, masks = add_defects(images, seed=5)
    again, again_masks = add_defects(images, seed=5)
    assert (changed == again).all() and (masks == again_masks).all()
    first, first_masks = add_defects(images[:4], seed=5)
    assert (changed[:4] == first).all() and (masks[:4] == first_masks).all()
    other, _ = add_defects(images, seed=6)
    assert all((mine != theirs).any() for mine, theirs in zip(changed, other, strict=True))
    twins, _ = add_defects(np.repeat(images[:1], 12, axis=0), seed=5)
    assert len({twin.tobytes() for twin in twins}) == 12


def test_areas_are_mostly_small_and_spread_over_decades() -> None:
    _, masks = add_defects(product(150), seed=0)
    share = np.sort(masks.mean(axis=(1, 2)))
    assert share[0] >= 0.0005 and share[-1] <= 0.15
    assert 0.003 < np.median(share) < 0.03
    assert share[15] < 0.004 and share[-15] > 0.02


def test_defects_lie_on_the_object() -> None:
    images = product(100)
    _, masks = add_defects(images, seed=1)
    on_object = disc(96, 96, 0.35 * 96)
    assert np.mean([mask[on_object].any() for mask in masks]) > 0.85
    assert np.mean([mask[on_object].sum() / mask.sum() for mask in masks]) > 0.7


def test_a_monochrome_image_stays_monochrome() -> None:
    images = product(20, grey=True)
    textures = np.zeros((1, 32, 32, 3), np.uint8)
    textures[..., 0] = 255
    for extra in (None, textures):
        changed, _ = add_defects(images, seed=0, textures=extra)
        assert (changed == changed[..., :1]).all()


def test_textures_feed_one_family_of_three() -> None:
    images, rng = product(90), np.random.default_rng(0)
    textures = rng.integers(0, 256, (3, 20, 150, 3), np.uint8)  # narrower and wider than the images
    plain, _ = add_defects(images, seed=2)
    textured, _ = add_defects(images, seed=2, textures=textures)
    differing = np.mean((plain != textured).any(axis=(1, 2, 3)))
    assert 0.2 < differing < 0.5


def test_an_image_that_hides_every_defect_still_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defects, "_ATTEMPTS", 0)
    for images in SCENES.values():
        changed, masks = add_defects(images, seed=0)
        assert masks.any(axis=(1, 2)).all()
        assert (change(images, changed)[masks] > NOTICEABLE).mean() > 0.95


def test_no_images_give_no_defects() -> None:
    changed, masks = add_defects(np.zeros((0, 32, 32, 3), np.uint8), seed=0)
    assert changed.shape == (0, 32, 32, 3) and masks.shape == (0, 32, 32)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("images", "seed", "textures", "message"),
    [
        (np.zeros((1, 32, 32, 3), np.float32), 0, None, "images must be uint8"),
        (np.zeros((32, 32, 3), np.uint8), 0, None, "images must be uint8"),
        (np.zeros((1, 3, 32, 32), np.uint8), 0, None, "images must be uint8"),
        (np.zeros((1, 15, 32, 3), np.uint8), 0, None, "at least 16 pixels"),
        (np.zeros((1, 32, 32, 3), np.uint8), -1, None, "seed must not be negative"),
        (np.zeros((1, 32, 32, 3), np.uint8), 0, np.zeros((1, 8, 8), np.uint8), "textures must be uint8"),
        (np.zeros((1, 32, 32, 3), np.uint8), 0, np.zeros((0, 8, 8, 3), np.uint8), "textures holds no image"),
    ],
)
def test_bad_input_is_refused(images: Bytes, seed: int, textures: Bytes | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_defects(images, seed=seed, textures=textures)


def test_foreground_is_the_object_or_everything() -> None:
    found, truth = find_foreground(product(1)[0]), disc(96, 96, 0.35 * 96)
    assert (found & truth).sum() / (found | truth).sum() > 0.9
    small = np.full((96, 96, 3), 200, np.uint8)
    small[disc(96, 96, 5)] = 20
    assert find_foreground(small).all()
    assert find_foreground(SCENES["noise"][0]).all()
    assert find_foreground(SCENES["black"][0]).all()


def test_foreground_leaves_out_a_soft_shadow() -> None:
    image = np.full((128, 128, 3), 200.0)
    rows, columns = np.mgrid[:128, :128]
    image -= 22 * np.exp(-(((rows - 64) ** 2 + (columns - 64) ** 2) / 50.0**2))[..., None]
    image[disc(128, 128, 25)] = 60
    found, truth = find_foreground(image.astype(np.uint8)), disc(128, 128, 25)
    assert (found & truth).sum() / (found | truth).sum() > 0.85


@pytest.mark.parametrize("cells", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_perlin_noise_is_bounded_and_as_coarse_as_asked(cells: float, angle: float) -> None:
    fields = np.stack(
        [perlin_noise(np.random.default_rng(seed), (128, 128), cells=(cells, cells), angle=angle) for seed in range(40)]
    )
    assert np.abs(fields).max() <= 1.0 + 1e-6
    assert abs(fields.mean()) < 0.1
    # gradient noise knows nothing of its neighbours two cells away and little changes in a tenth of one
    near, far = max(1, round(12.8 / cells)), round(256 / cells)
    variance = (fields**2).mean()
    assert (fields[..., near:] * fields[..., :-near]).mean() > 0.6 * variance
    if far < 128:
        assert abs((fields[..., far:] * fields[..., :-far]).mean()) < 0.3 * variance


def write(path: Path, value: int, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def test_textures_are_read_from_nested_folders(tmp_path: Path) -> None:
    values = [10, 60, 110, 160, 210]
    for index, value in enumerate(values):
        write(tmp_path / f"kind{index % 2}" / f"{index}{['.png', '.JPG'][index % 2]}", value)
    (tmp_path / "readme.txt").write_text("no image")
    textures = load_textures(choose_textures(tmp_path), 16)
    assert textures.shape == (5, 16, 16, 3) and textures.dtype == np.uint8
    assert np.abs(np.sort(textures[:, 8, 8, 0].astype(int)) - values).max() <= 1
    some = choose_textures(tmp_path, limit=3)
    assert len(set(some)) == 3 and some == choose_textures(tmp_path, limit=3)
    assert len({tuple(choose_textures(tmp_path, limit=2, seed=seed)) for seed in range(8)}) > 1
    (tmp_path / "elsewhere").mkdir()
    for folder in ("kind0", "kind1"):
        (tmp_path / folder).rename(tmp_path / "elsewhere" / folder)
    moved = choose_textures(tmp_path / "elsewhere", limit=3)
    assert [path.name for path in moved] == [path.name for path in some]


def test_textures_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no texture in"):
        choose_textures(tmp_path / "missing")
    with pytest.raises(ValueError, match="no texture in"):
        choose_textures(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        load_textures(choose_textures(tmp_path), 16)
    with pytest.raises(ValueError, match="at least 1"):
        load_textures(choose_textures(tmp_path), 0)
    with pytest.raises(ValueError, match="at least 1"):
        choose_textures(tmp_path, limit=0)
