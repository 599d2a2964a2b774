"""Good images cut into folds: each is held out once, parts stay together, and names alone decide."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dskd.config import DataConfig, ScoreConfig
from dskd.data.datasets import Category
from dskd.data.folds import cut_folds, num_folds, split_images
from dskd.data.samples import Sample
from dskd.model.distances import Discrepancies
from dskd.training.evidence import NUM_REPLICATES, Evidence, paired_gain, resampled_objectives
from dskd.training.score_search import CoarseImages


def samples(count: int, views: int = 1, folder: str = "/data/nut/train/good") -> tuple[Sample, ...]:
    return tuple(
        Sample(Path(folder, f"part{number:03d}_cam{view}.png"), "good", None)
        for number in range(count)
        for view in range(views)
    )


def category(train: tuple[Sample, ...], validation: tuple[Sample, ...] = ()) -> Category:
    return Category("nut", train, (), validation, Path("/data/nut"))


@pytest.mark.parametrize(("count", "folds"), [(20, 5), (23, 5), (7, 3), (2, 2)])
def test_every_image_is_held_out_once_and_the_folds_are_of_a_size(count: int, folds: int) -> None:
    found = [split_images(category(samples(count)), DataConfig(folds=folds, fold=fold)) for fold in range(folds)]
    assert Counter(sample for split in found for sample in split.selecting) == Counter(samples(count))
    assert max(len(split.selecting) for split in found) - min(len(split.selecting) for split in found) <= 1
    for split in found:
        assert set(split.train).isdisjoint(split.selecting) and len(split.train) + len(split.selecting) == count
        assert split.calibrating == split.selecting == tuple(sorted(split.selecting))
        assert list(split.names.values()) == [sample.path.name for sample in split.selecting]


def test_the_images_of_a_part_are_in_one_fold() -> None:
    pattern = r"part(\d+)"
    found = cut_folds(samples(9, views=3), 4, 0, pattern)
    parts = [{sample.path.name[:7] for sample in fold} for fold in found]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 9
    assert not all(len({name for name in part}) * 3 == len(fold) for part, fold in zip(
        parts, cut_folds(samples(9, views=3), 4, 0), strict=True)), "without the pattern parts are torn"  # fmt: skip


def test_folds_depend_on_names_and_seed_and_not_on_order_or_place() -> None:
    here = cut_folds(samples(20), 5, 0)
    there = cut_folds(samples(20, folder="/elsewhere/good")[::-1], 5, 0)
    names = [{sample.path.name for sample in fold} for fold in here]
    assert names == [{sample.path.name for sample in fold} for fold in there]
    assert names != [{sample.path.name for sample in fold} for fold in cut_folds(samples(20), 5, 1)]


def test_there_are_no_more_folds_than_parts_and_none_beside_own_validation_images() -> None:
    data = DataConfig(folds=5, group_by=r"part(\d+)")
    assert num_folds(category(samples(3, views=4)), data) == 3
    assert num_folds(category(samples(1, views=4)), data) == 0, "one part cannot be held out whole"
    assert num_folds(category(samples(9)), DataConfig()) == 0
    own = category(samples(9), samples(2, folder="/data/nut/validation/good"))
    assert num_folds(own, data) == 0
    split = split_images(own, data)
    assert split.train == own.train and set(split.names) == set(own.validation)
    with pytest.raises(ValueError, match="nut has 3 folds, counted from 0; got fold 4"):
        split_images(category(samples(3)), DataConfig(folds=5, fold=4))


@pytest.mark.parametrize("wrong", [{"folds": 1}, {"folds": -2}, {"folds": 3, "fold": 3}, {"fold": 1}, {"folds": 101}])
def test_impossible_folds_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"folds? must"):
        DataConfig(**wrong)


LABELS = np.arange(12) >= 6
MASKS = np.zeros((12, 32, 32), np.bool_)
MASKS[6:, 8:16, 8:16] = True


def coarse(strength: float, seed: int) -> CoarseImages:
    """Maps of noise with defects of so much more; strength 0 sees nothing."""
    rng = np.random.default_rng(seed)
    maps = torch.from_numpy(rng.random((12, 32, 32)).astype(np.float32) + strength * MASKS)
    return CoarseImages.of(Discrepancies(None, (maps,)), MASKS, LABELS, np.ones(12, np.bool_))


SCORE = ScoreConfig(score_level_weights=(1.0,), blur_sigma=0.0)


def test_resamples_are_the_same_for_all_students_and_of_whole_parts() -> None:
    groups = np.arange(12) % 6  # a defect's source is drawn with it
    one, same = resampled_objectives(coarse(0.5, 1), SCORE, groups), resampled_objectives(coarse(0.5, 1), SCORE, groups)
    assert one == same and len(one) == NUM_REPLICATES and len(set(one)) > 10
    assert all(value > 0.9 for value in resampled_objectives(coarse(2.0, 1), SCORE, groups))
    torn = resampled_objectives(coarse(0.5, 1), SCORE, np.arange(12))
    assert torn != one


def test_one_part_alone_has_no_spread() -> None:
    assert len(set(resampled_objectives(coarse(0.5, 1), SCORE, np.zeros(12, np.int64)))) == 1


def evidence(strength: float, fold: int) -> Evidence:
    images, groups = coarse(strength, fold), np.arange(12) % 6
    (whole,) = images.objectives(SCORE, [np.arange(12)])
    return Evidence(whole, resampled_objectives(images, SCORE, groups), ("a.png",), (0.5,))


def test_a_paired_gain_is_that_of_the_means_and_nobody_gains_over_himself() -> None:
    weak, strong = ([evidence(strength, fold) for fold in (1, 2, 3)] for strength in (0.1, 0.6))
    assert paired_gain(weak, weak) == (0.0, 0.0)
    gain, error = paired_gain(strong, weak)
    assert gain == pytest.approx(np.mean([mine.objective - theirs.objective
                                          for mine, theirs in zip(strong, weak, strict=True)]))  # fmt: skip
    assert gain > 3 * error > 0
    assert paired_gain(weak, strong) == pytest.approx((-gain, error))


def test_evidence_survives_its_file() -> None:
    import json

    found = evidence(0.3, 1)
    assert Evidence.from_document(json.loads(found.to_json())) == found
