import math
import typing

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from dskd.anomaly import anomaly_maps, image_scores
from dskd.config import ScoreConfig
from dskd.model.distances import Discrepancies, discrepancies

SHARP = {"blur_sigma": 0.0}


def random_levels(seed: int = 0, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.rand(batch, side, side, generator=generator) for side in (16, 8, 4))


def flat_levels(*values: float) -> tuple[Tensor, ...]:
    """Levels of one value each, so that what fusion makes of them can be worked out by hand."""
    return tuple(torch.full((1, side, side), value) for side, value in zip((8, 4, 2), values, strict=True))


def fused_value(found: Discrepancies, config: ScoreConfig) -> float:
    maps = anomaly_maps(found, config, 32)
    assert maps.shape == (1, 32, 32)
    assert maps.min().item() == pytest.approx(maps.max().item(), rel=1e-5)
    return maps[0, 0, 0].item()


def test_discrepancies_by_hand() -> None:
    teacher = (torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1), torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1))
    student = (torch.tensor([0.0, 2.0]).reshape(1, 2, 1, 1), torch.tensor([4.0, 3.0]).reshape(1, 2, 1, 1))
    found = discrepancies(teacher, student, teacher)
    assert found.encoder is not None and found.decoder is not None
    assert [level.item() for level in found.encoder] == pytest.approx([1.0, 0.04])
    assert [level.item() for level in found.decoder] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert discrepancies(teacher, None, student).encoder is None
    assert discrepancies(teacher, student, None).decoder is None


def test_identical_pyramids_give_zero_maps_without_negative_rounding() -> None:
    pyramid = tuple(torch.randn(2, 64, side, side, generator=torch.Generator().manual_seed(0)) for side in (16, 8))
    found = discrepancies(pyramid, pyramid, None)
    assert found.encoder is not None
    assert all((level >= 0).all() and (level < 1e-6).all() for level in found.encoder)
    config = ScoreConfig(score_level_weights=(0.5, 0.5), level_fusion="product")
    assert anomaly_maps(found, config, 32).isfinite().all()


def test_dead_features_are_as_far_as_orthogonal_ones() -> None:
    alive, dead = (torch.ones(1, 3, 2, 2),), (torch.zeros(1, 3, 2, 2),)
    for teacher, student in ((alive, dead), (dead, alive), (dead, dead)):
        found = discrepancies(teacher, student, None)
        assert found.encoder is not None and (found.encoder[0] == 1).all()


def test_half_precision_features_are_compared_in_float32() -> None:
    features = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    other = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    low = discrepancies((features,), (other,), None).encoder
    full = discrepancies((features.float(),), (other.float(),), None).encoder
    assert low is not None and full is not None and torch.equal(low[0], full[0])


@pytest.mark.parametrize(
    ("fusion", "expected"),
    [
        ("sum", 2 * 0.1 + 0 * 0.9 + 0.5 * 0.4),
        ("max", max(2 * 0.1, 0 * 0.9, 0.5 * 0.4)),
        ("product", 0.1**2 * math.sqrt(0.4)),
    ],
)
def test_level_fusion_by_hand(fusion: str, expected: float) -> None:
    config = ScoreConfig(score_level_weights=(2.0, 0.0, 0.5), level_fusion=fusion, **SHARP)  # type: ignore[arg-type]
    assert fused_value(Discrepancies(flat_levels(0.1, 0.9, 0.4), None), config) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fusion", "expected"),
    [("sum", 3 * 0.5 + 0.5 * 0.8), ("max", max(3 * 0.5, 0.5 * 0.8)), ("product", 0.5**3 * 0.8**0.5)],
)
def test_student_fusion_by_hand(fusion: str, expected: float) -> None:
    config = ScoreConfig(
        encoder_score_weight=3.0,
        decoder_score_weight=0.5,
        student_fusion=fusion,  # type: ignore[arg-type]
        **SHARP,  # type: ignore[arg-type]
    )
    found = Discrepancies(flat_levels(0.1, 0.1, 0.3), flat_levels(0.2, 0.4, 0.2))
    assert fused_value(found, config) == pytest.approx(expected)


@pytest.mark.parametrize("fusion", ["sum", "max", "product"])
@pytest.mark.parametrize("student", ["encoder", "decoder"])
def test_the_weight_of_an_only_student_is_irrelevant(student: str, fusion: str) -> None:
    found = Discrepancies(**{"encoder": None, "decoder": None, student: random_levels()})
    maps = [
        anomaly_maps(found, ScoreConfig(encoder_score_weight=a, decoder_score_weight=b, student_fusion=fusion), 32)  # type: ignore[arg-type]
        for a, b in ((1.0, 1.0), (0.0, 3.0), (3.0, 0.0))
    ]
    assert maps[0].any() and torch.equal(maps[0], maps[1]) and torch.equal(maps[0], maps[2])


@pytest.mark.parametrize("fusion", typing.get_args(typing.get_type_hints(ScoreConfig)["student_fusion"]))
@pytest.mark.parametrize("level_fusion", typing.get_args(typing.get_type_hints(ScoreConfig)["level_fusion"]))
def test_a_student_of_weight_zero_says_nothing(level_fusion: str, fusion: str) -> None:
    """So that one student of a jointly trained pair can be asked alone, under every fusion."""
    encoder, decoder = (tuple(level / 2 for level in random_levels(seed)) for seed in (0, 1))
    encoder[0][0, :4] = 0  # where a map is zero, a product must not lose the other's say either
    # A noisy-or takes maps as shares of what they are at a distance of 1 in every level.
    scale = 3 if (level_fusion, fusion) == ("sum", "noisy-or") else 1
    alone = ScoreConfig(level_fusion=level_fusion)  # type: ignore[arg-type]
    for weights, only in (
        ({"decoder_score_weight": 0.0}, Discrepancies(encoder, None)),
        ({"encoder_score_weight": 0.0}, Discrepancies(None, decoder)),
    ):
        config = ScoreConfig(level_fusion=level_fusion, student_fusion=fusion, **weights)  # type: ignore[arg-type]
        both = anomaly_maps(Discrepancies(encoder, decoder), config, 32)
        torch.testing.assert_close(scale * both, anomaly_maps(only, alone, 32))


@pytest.mark.parametrize(
    ("fusion", "encoder", "decoder"),
    # By hand for level weights (2, 0, 0.5): the fused map over what it is at a distance of 1 in every level.
    [
        ("sum", (2 * 0.1 + 0.5 * 0.3) / 2.5, (2 * 0.2 + 0.5 * 0.2) / 2.5),
        ("max", (2 * 0.1) / 2, (2 * 0.2) / 2),
        ("product", 0.1**2 * 0.3**0.5, 0.2**2 * 0.2**0.5),
    ],
)
def test_noisy_or_by_hand(fusion: str, encoder: float, decoder: float) -> None:
    config = ScoreConfig(
        score_level_weights=(2.0, 0.0, 0.5),
        encoder_score_weight=0.5,
        level_fusion=fusion,  # type: ignore[arg-type]
        student_fusion="noisy-or",
        **SHARP,  # type: ignore[arg-type]
    )
    found = Discrepancies(flat_levels(0.1, 0.9, 0.3), flat_levels(0.2, 0.4, 0.2))
    assert fused_value(found, config) == pytest.approx(1 - (1 - 0.5 * encoder) * (1 - decoder))


@pytest.mark.parametrize("fusion", ["sum", "max", "product"])
def test_noisy_or_is_a_probability_that_neither_student_lowers_and_keeps_what_is_tiny(fusion: str) -> None:
    config = ScoreConfig(level_fusion=fusion, student_fusion="noisy-or", **SHARP)  # type: ignore[arg-type]
    both = anomaly_maps(Discrepancies(random_levels(0), random_levels(1)), config, 32)
    assert both.min() >= 0 and both.max() <= 1
    for encoder, decoder in ((0.0, 1.0), (1.0, 0.0)):
        alone = ScoreConfig(
            level_fusion=fusion,  # type: ignore[arg-type]
            student_fusion="noisy-or",
            encoder_score_weight=encoder,
            decoder_score_weight=decoder,
            **SHARP,  # type: ignore[arg-type]
        )
        assert (both >= anomaly_maps(Discrepancies(random_levels(0), random_levels(1)), alone, 32) - 1e-6).all()
    assert fused_value(Discrepancies(flat_levels(1.5, 2.0, 1.0), flat_levels(0.0, 0.0, 0.0)), config) == pytest.approx(
        1
    )
    tiny = fused_value(Discrepancies(flat_levels(1e-9, 1e-9, 1e-9), flat_levels(0.0, 0.0, 0.0)), config)
    assert tiny == pytest.approx(1e-27 if fusion == "product" else 1e-9)


def test_no_student_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one student"):
        anomaly_maps(Discrepancies(None, None), ScoreConfig(), 32)


def test_upsampling_against_pillow() -> None:
    level = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    config = ScoreConfig(score_level_weights=(1.0,), **SHARP)  # type: ignore[arg-type]
    maps = anomaly_maps(Discrepancies((level,), None), config, 32)
    for found, source in zip(maps, level, strict=True):
        expected = Image.fromarray(source.numpy()).resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(found.numpy(), np.asarray(expected), atol=1e-6)


@pytest.mark.parametrize(("image_size", "blur_sigma"), [(256, 4.0), (128, 4.0), (96, 1.7), (32, 40.0), (64, 300.0)])
def test_blur_against_scipy(image_size: int, blur_sigma: float) -> None:
    found = Discrepancies(random_levels(batch=3), None)
    sharp = anomaly_maps(found, ScoreConfig(**SHARP), image_size)  # type: ignore[arg-type]
    blurred = anomaly_maps(found, ScoreConfig(blur_sigma=blur_sigma), image_size)
    for image, source in zip(blurred, sharp, strict=True):
        expected = gaussian_filter(
            source.double().numpy(), sigma=blur_sigma * image_size / 256, mode="reflect", truncate=4.0
        )
        np.testing.assert_allclose(image.numpy(), expected, rtol=1e-5)


def test_autocast_does_not_coarsen_the_maps() -> None:
    found = Discrepancies(random_levels(0), random_levels(1))
    plain = anomaly_maps(found, ScoreConfig(level_fusion="product"), 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = anomaly_maps(found, ScoreConfig(level_fusion="product"), 64)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(plain, under_autocast)


def test_images_of_a_batch_do_not_meet() -> None:
    levels = random_levels(batch=4)
    together = anomaly_maps(Discrepancies(levels, None), ScoreConfig(), 64)
    for i in range(4):
        alone = anomaly_maps(Discrepancies(tuple(level[i : i + 1] for level in levels), None), ScoreConfig(), 64)
        torch.testing.assert_close(together[i], alone[0])


def test_a_defect_lights_up_where_it_is() -> None:
    level = torch.zeros(1, 16, 16)
    level[0, 3, 12] = 1
    maps = anomaly_maps(Discrepancies((level,), None), ScoreConfig(score_level_weights=(1.0,)), 256)
    row, column = divmod(int(maps[0].argmax()), 256)
    assert abs(row - (3.5 * 16 - 0.5)) <= 1 and abs(column - (12.5 * 16 - 0.5)) <= 1


@pytest.mark.parametrize("top_fraction", [1e-9, 0.01, 0.1, 0.5, 1.0])
def test_score_is_the_mean_of_the_highest_values(top_fraction: float) -> None:
    maps = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    count = max(1, round(top_fraction * 600))
    expected = np.sort(maps.flatten(1).double().numpy(), axis=1)[:, -count:].mean(axis=1)
    np.testing.assert_allclose(image_scores(maps, top_fraction).numpy(), expected, rtol=1e-6)


def test_score_of_share_zero_is_the_maximum() -> None:
    maps = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    assert image_scores(maps, 0.0).tolist() == [image.max().item() for image in maps]
