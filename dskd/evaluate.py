"""Maps, scores and metrics of labelled images; the only door to test labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from dskd import metrics
from dskd.anomaly import anomaly_maps, discrepancies, image_scores
from dskd.config import RunConfig
from dskd.data.datasets import load_images, load_masks, read_category
from dskd.data.defects import add_defects
from dskd.metrics import MetricState, Scores
from dskd.model.teacher import Teacher, normalize
from dskd.pyramids import FeatureTable

_BATCH = 16


class LabelledImages(NamedTuple):
    """Images with what is known of their defects."""

    images: npt.NDArray[np.uint8]
    """(N, S, S, 3)"""
    masks: npt.NDArray[np.bool_]
    """(N, S, S), true on defects; all false for a normal image, or where a defect has no mask."""
    labels: npt.NDArray[np.bool_]
    """(N,), true for a defective image, taken from its folder and never from its mask."""


class Inspection(NamedTuple):
    """What a detector sees in some images."""

    maps: npt.NDArray[np.float32]
    """(N, S, S); higher is more anomalous, no fixed range."""
    scores: npt.NDArray[np.float32]
    """(N,)"""


def synthetic_validation(normals: npt.NDArray[np.uint8], *, seed: int, num_defective: int) -> LabelledImages:
    """Held-out normals (N, S, S, 3) followed by copies of them with synthetic defects.

    The copies take the normals in turn, at least one of each, `num_defective` in all where that is
    more. No real defect and no test image is involved.
    """
    repeats = -(-max(num_defective, len(normals)) // len(normals))
    count = max(num_defective, len(normals))
    defective, masks = add_defects(np.concatenate([normals] * repeats)[:count], seed=seed)
    return LabelledImages(
        np.concatenate([normals, defective]),
        np.concatenate([np.zeros(normals.shape[:3], np.bool_), masks]),
        np.arange(len(normals) + count) >= len(normals),
    )


def labelled_test_split(data: Path, category: str, image_size: int) -> LabelledImages:
    """The labelled test split of a category; nothing that selects or tunes may call this.

    Raises ValueError where the category has no test images of both kinds.
    """
    samples = read_category(data, category).test
    labels = np.array([sample.is_defective for sample in samples], np.bool_)
    if len(set(labels.tolist())) < 2:
        raise ValueError(
            f"category {category} in {data} needs good and defective test images to be evaluated, "
            f"got {int((~labels).sum())} good and {int(labels.sum())} defective."
        )
    return LabelledImages(
        load_images([sample.path for sample in samples], image_size), load_masks(samples, image_size), labels
    )


@torch.inference_mode()
def inspect(
    teacher: Teacher | FeatureTable,
    students: nn.Module,
    images: npt.NDArray[np.uint8],
    config: RunConfig,
    device: torch.device,
    indices: Sequence[int] | None = None,
) -> Inspection:
    """Anomaly maps and scores of images (N, S, S, 3), or of those at `indices`, in that order.

    `teacher` is the network, or the table of its pyramids of the same images.
    """
    students.eval()
    order = np.arange(len(images)) if indices is None else np.asarray(indices, np.int64)
    size = images.shape[1]
    maps = np.empty((len(order), size, size), np.float32)
    scores = np.empty(len(order), np.float32)
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        pixels = normalize(torch.from_numpy(images[chosen]).to(device))
        targets = teacher.pyramid(chosen, device) if isinstance(teacher, FeatureTable) else teacher(pixels)
        outputs = students(pixels, targets)
        batch = anomaly_maps(discrepancies(targets, outputs.encoder, outputs.decoder), config.score, size)
        maps[start : start + _BATCH] = batch.float().cpu().numpy()
        scores[start : start + _BATCH] = image_scores(batch, config.score.score_top_fraction).float().cpu().numpy()
    return Inspection(maps, scores)


def measure(inspection: Inspection, truth: LabelledImages) -> Scores:
    """All metrics of one inspection of `truth.images`."""
    return metrics.score_maps(inspection.maps, truth.masks, inspection.scores, truth.labels)


def measure_shared(
    table: FeatureTable,
    students: nn.Module,
    truth: LabelledImages,
    config: RunConfig,
    device: torch.device,
    rank: int,
    world_size: int,
) -> Scores:
    """Metrics of `truth`, inspected by all workers together; every worker gets the same figures.

    Workers take whole batches in turn, those that one worker alone would form: an image's map depends in
    its last bits on the size of its batch, and this way the figures are exactly those of one worker.
    """
    mine = np.flatnonzero(np.arange(len(truth.images)) // _BATCH % world_size == rank)
    seen = inspect(table, students, truth.images, config, device, mine.tolist())
    state = metrics.update(MetricState(), seen.maps, truth.masks[mine], seen.scores, truth.labels[mine])
    if dist.is_available() and dist.is_initialized():
        states: list[MetricState | None] = [None] * world_size
        dist.all_gather_object(states, state)
        state = metrics.merge(part for part in states if part is not None)
    return metrics.compute(state)
