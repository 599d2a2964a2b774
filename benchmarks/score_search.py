"""Gain from searching score parameters after training, on validation and then on the test images.

    python benchmarks/score_search.py --data DIR --teacher-weights FILE --image-size 128 --batch-size 8 --steps 450

Trains each category once and searches the score parameters with several seeds of the search. One row per
category: the validation objective before and after, the gain on images that were not used for the selection with
its standard error, and the mean of image AUROC and AUPRO on the test images before and after. The rate is
that of the search only, with torch's number of threads.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
import tyro

from dskd.config import DataSpec, ScoreConfig, TeacherSource
from dskd.data.cache import ArrayCache, default_folder
from dskd.data.datasets import find_categories
from dskd.data.geometry import Geometry
from dskd.evaluate import compute_metrics, disagreements, labelled_test_split, score_images
from dskd.presets import PRESETS
from dskd.training.inputs import prepare
from dskd.training.run import TrainingRun, objective
from dskd.training.score_search import search_scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    data: Path
    """Folder of categories."""
    categories: tuple[str, ...] = ()
    """Categories to train on; all by default."""
    preset: str = "dskd"
    image_size: int = 256
    steps: int = 3200
    batch_size: int = 16
    num_candidates: int = 1000
    """Number of score configurations tried."""
    seeds: int = 5
    """Number of searches per category."""
    teacher_weights: str = "hub"
    """hub, a .safetensors or .pth file, or random."""
    device: str = "cpu"


def row(options: Options, category: str) -> str:
    """Train and search one category; returns its line of the table."""
    device = torch.device(options.device)
    config = PRESETS[options.preset].with_values(
        {"image_size": options.image_size, "steps": options.steps, "batch_size": options.batch_size}
    )
    inputs = prepare(
        config,
        DataSpec(data=options.data, category=category, teacher=TeacherSource(options.teacher_weights)),
        device=device,
        cache=ArrayCache(default_folder(), int(20e9)),
    )
    run = TrainingRun.begin(config, inputs, device)
    for progress in run.intervals():
        print(f"{category}  step {run.step}  validation {progress.objective:.4f}", file=sys.stderr, flush=True)
    run.students.load_state_dict(run.best_weights)
    validation = inputs.validation
    found = disagreements(inputs.validation_features, run.students, validation.images, device)
    searches = [
        search_scores(found, *validation[1:5], config.score, num_candidates=options.num_candidates, seed=seed)
        for seed in range(options.seeds)
    ]
    test = labelled_test_split(options.data, category, Geometry.square(options.image_size))

    def figures(score: ScoreConfig) -> tuple[float, float]:
        scored = dataclasses.replace(config, score=score)
        on_validation = score_images(inputs.validation_features, run.students, validation.images, scored, device)
        on_test = score_images(inputs.teacher, run.students, test.images, scored, device)
        return objective(compute_metrics(on_validation, validation)), objective(compute_metrics(on_test, test))

    before, after = figures(config.score), [figures(search.best) for search in searches]
    adopted = sum(search.is_adopted for search in searches)
    rate = median(60 * search.num_candidates / search.seconds for search in searches)
    return (
        f"| {category} | {len(validation.labels)} | {before[0]:.4f} | {mean(each[0] for each in after):.4f} | "
        f"{mean(search.gain for search in searches):+.4f} ± {mean(search.standard_error for search in searches):.4f} | "
        f"{adopted} of {len(searches)} | {before[1]:.4f} | {mean(each[1] for each in after):.4f} | {rate:.0f} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(Options, description=__doc__, args=arguments)
    print("| category | images | validation before | after | gain on other images | adopted | test before | after |"
          " configurations a minute |")  # fmt: skip
    print("|" + "---|" * 9)
    for category in options.categories or tuple(find_categories(options.data)):
        print(row(options, category), flush=True)


if __name__ == "__main__":
    main()
