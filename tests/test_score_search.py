"""The search of score parameters: it finds what is there, and keeps its hands off what is not."""

import numpy as np
import pytest
import torch

from dskd import metrics
from dskd.anomaly import anomaly_maps, image_scores
from dskd.config import ScoreConfig
from dskd.model.distances import Discrepancies
from dskd.training.score_search import search_scores

NUM_NORMALS = 12
LABELS = np.arange(2 * NUM_NORMALS) >= NUM_NORMALS
KNOWN = np.ones(2 * NUM_NORMALS, np.bool_)
SOURCES = np.arange(2 * NUM_NORMALS) % NUM_NORMALS
MASKS = np.zeros((2 * NUM_NORMALS, 64, 64), np.bool_)
for row in range(NUM_NORMALS, 2 * NUM_NORMALS):
    MASKS[row, 2 * row : 2 * row + 10, 20:36] = True


def levels(signal: float, seed: int) -> tuple[torch.Tensor, ...]:
    """Noise, with `signal` added on the defects."""
    rng = torch.Generator().manual_seed(seed)
    sizes = (16, 8, 4)
    defects = torch.from_numpy(MASKS)[:, None].float()
    return tuple(
        torch.rand(len(MASKS), side, side, generator=rng)
        + signal * torch.nn.functional.adaptive_avg_pool2d(defects, side)[:, 0]
        for side in sizes
    )


def objective(found: Discrepancies, config: ScoreConfig) -> float:
    maps = anomaly_maps(found, config, MASKS.shape[1])
    scores = image_scores(maps, config.score_top_fraction)
    return (metrics.auroc(scores, LABELS) + metrics.aupro(maps, MASKS)) / 2


def test_a_student_that_sees_nothing_is_found_out() -> None:
    found, new = (Discrepancies(levels(0.0, seed), levels(0.4, seed + 1)) for seed in (1, 100))
    result = search_scores(found, MASKS, LABELS, KNOWN, SOURCES, ScoreConfig(), num_candidates=60)
    assert result.is_adopted and result.gain > result.standard_error > 0
    assert objective(new, result.best) > objective(new, ScoreConfig()) + result.gain / 2
    again = search_scores(found, MASKS, LABELS, KNOWN, SOURCES, ScoreConfig(), num_candidates=60)
    assert again[:5] == result[:5], "the same seed finds the same"


def test_given_weights_that_are_no_better_than_equal_ones_are_dropped() -> None:
    one = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(MASKS)[:, None].float(), 32)[:, 0]
    found, given = Discrepancies(None, (one, one, one)), ScoreConfig(score_level_weights=(0.5, 0.5, 2.0))
    result = search_scores(found, MASKS, LABELS, KNOWN, SOURCES, given, num_candidates=20)
    assert not result.is_adopted and result.best == ScoreConfig()


def test_chance_is_hardly_ever_taken_for_a_gain() -> None:
    adopted = [
        search_scores(
            Discrepancies(levels(0.0, seed), None),
            MASKS,
            LABELS,
            KNOWN,
            SOURCES,
            ScoreConfig(),
            num_candidates=30,
            seed=seed,
        ).is_adopted
        for seed in range(12)
    ]
    assert sum(adopted) <= 4


@pytest.mark.parametrize("num_sources", [1, 3])
def test_too_few_images_change_nothing(num_sources: int) -> None:
    given = ScoreConfig(blur_sigma=3.0)
    found = Discrepancies(None, levels(1.0, 1))
    result = search_scores(found, MASKS, LABELS, KNOWN, SOURCES % num_sources, given, num_candidates=5)
    assert result.best == given and not result.is_adopted and result.num_candidates == 0
