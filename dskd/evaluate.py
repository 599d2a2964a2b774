"""Maps, scores and metrics of labelled images; the only module that reads test labels."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dskd import metrics
from dskd.anomaly import Discrepancies, anomaly_maps, discrepancies, image_scores
from dskd.config import LayoutName, RunConfig
from dskd.data.datasets import read_test_split
from dskd.data.defects import add_defects
from dskd.data.depth import PixelScale
from dskd.data.images import load_images, load_masks
from dskd.data.samples import Sample
from dskd.device import to_device
from dskd.metrics import MetricState, Scores
from dskd.model.features import FeatureTable
from dskd.model.teacher import Teacher, normalize

_BATCH = 16


class LabelledImages(NamedTuple):
    """Images with what is known of their defects."""

    images: npt.NDArray[np.uint8]
    """(N, S, S, 3)"""
    masks: npt.NDArray[np.bool_]
    """(N, S, S), true on defects; all false for a normal image, or where a defect has no mask."""
    labels: npt.NDArray[np.bool_]
    """(N,), true for a defective image, taken from its folder and never from its mask."""
    has_mask: npt.NDArray[np.bool_]
    """(N,), false for a defective image without a mask file: its pixels are of neither kind, and stay out of the
    pixel figures. Normal images need none."""
    sources: npt.NDArray[np.int64]
    """(N,), the same number for a normal image and for its copies with synthetic defects, another for every other."""


class AnomalyScores(NamedTuple):
    """Anomaly maps and scores of some images."""

    maps: npt.NDArray[np.float32]
    """(N, S, S); higher is more anomalous, no fixed range."""
    scores: npt.NDArray[np.float32]
    """(N,)"""


def _unheard(note: str) -> None:
    pass


def label(
    samples: Sequence[Sample], images: npt.NDArray[np.uint8], on_note: Callable[[str], object] = _unheard
) -> LabelledImages:
    """Labels and masks of `images` (N, S, S, 3), read from the folders and mask files of `samples`.

    `on_note` as in `load_masks`.
    """
    return LabelledImages(
        images,
        load_masks(samples, images.shape[1], on_note),
        np.array([sample.is_defective for sample in samples], np.bool_),
        np.array([sample.mask is not None or not sample.is_defective for sample in samples], np.bool_),
        np.arange(len(samples)),
    )


def join(first: LabelledImages, second: LabelledImages) -> LabelledImages:
    """The images of both, in order; no source is in both."""
    apart = second._replace(sources=second.sources + first.sources.max(initial=-1) + 1)
    pairs: Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = zip(first, apart, strict=True)
    return LabelledImages(*(np.concatenate(pair) for pair in pairs))


def synthetic_validation(
    normals: npt.NDArray[np.uint8], *, seed: int, num_defective: int, textures: npt.NDArray[np.uint8] | None = None
) -> LabelledImages:
    """Held-out normals (N, S, S, 3) followed by copies of them with synthetic defects.

    The copies take the normals in turn, at least one of each, `num_defective` in all where that is
    more, `textures` feeding some as in `add_defects`. No real defect and no test image is involved.
    """
    repeats = -(-max(num_defective, len(normals)) // len(normals))
    count = max(num_defective, len(normals))
    defective, masks = add_defects(np.concatenate([normals] * repeats)[:count], seed=seed, textures=textures)
    return LabelledImages(
        np.concatenate([normals, defective]),
        np.concatenate([np.zeros(normals.shape[:3], np.bool_), masks]),
        np.arange(len(normals) + count) >= len(normals),
        np.ones(len(normals) + count, np.bool_),
        np.concatenate([np.arange(len(normals)), np.arange(count) % len(normals)]),
    )


def labelled_test_split(
    data: Path,
    category: str,
    image_size: int,
    scale: PixelScale | None = None,
    on_note: Callable[[str], object] = _unheard,
    layout: LayoutName = "auto",
) -> LabelledImages:
    """The labelled test split of a category; nothing that selects or tunes may call this.

    `scale` is the detector's, of images of more than 8 bits. `on_note` hears how many files are used and left out,
    and of masks and images that are worth a look. Raises ValueError where the category has no test images of both
    kinds, or a mask that cannot be told or has another shape than its image.
    """
    found = read_test_split(data, category, layout)
    samples = found.test
    on_note(found.describe())
    num_defective = sum(sample.is_defective for sample in samples)
    if num_defective in (0, len(samples)):
        raise ValueError(
            f"category {category} in {data} needs good and defective test images to be evaluated, "
            f"got {len(samples) - num_defective} good and {num_defective} defective."
        )

    def clipped(path: Path, count: int) -> None:
        on_note(f"{path} has {count} values beyond the scale of the training images; they are clipped.")

    paths = [sample.path for sample in samples]
    return label(samples, load_images(paths, image_size, scale=scale, on_clipped=clipped), on_note)


@torch.inference_mode()
def score_images(
    teacher: Teacher | FeatureTable,
    students: nn.Module,
    images: npt.NDArray[np.uint8],
    config: RunConfig,
    device: torch.device,
    indices: Sequence[int] | None = None,
) -> AnomalyScores:
    """Anomaly maps and scores of images (N, S, S, 3), or of those at `indices`, in that order.

    `teacher` is the network, or the table of its pyramids of the same images.
    """
    order = np.arange(len(images)) if indices is None else np.asarray(indices, np.int64)
    size = images.shape[1]
    maps = np.empty((len(order), size, size), np.float32)
    scores = np.empty(len(order), np.float32)
    start = 0
    for found in _compared(teacher, students, images, device, order):
        batch = anomaly_maps(found, config.score, size)
        maps[start : start + len(batch)] = batch.float().cpu().numpy()
        pooled = image_scores(batch, config.score.score_top_fraction)
        scores[start : start + len(batch)] = pooled.float().cpu().numpy()
        start += len(batch)
    return AnomalyScores(maps, scores)


@torch.inference_mode()
def disagreements(
    teacher: Teacher | FeatureTable, students: nn.Module, images: npt.NDArray[np.uint8], device: torch.device
) -> Discrepancies:
    """The discrepancies of images (N, S, S, 3), on the CPU; every score configuration starts from them."""
    batches = list(_compared(teacher, students, images, device, np.arange(len(images))))

    def joined(parts: Sequence[tuple[Tensor, ...] | None]) -> tuple[Tensor, ...] | None:
        known = [part for part in parts if part is not None]
        return tuple(torch.cat(level).cpu() for level in zip(*known, strict=True)) if known else None

    return Discrepancies(joined([batch.encoder for batch in batches]), joined([batch.decoder for batch in batches]))


def _compared(
    teacher: Teacher | FeatureTable,
    students: nn.Module,
    images: npt.NDArray[np.uint8],
    device: torch.device,
    order: npt.NDArray[np.int64],
) -> Iterator[Discrepancies]:
    students.eval()
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        pixels = normalize(to_device(device, images, chosen))
        targets = teacher.pyramid(chosen, device) if isinstance(teacher, FeatureTable) else teacher(pixels)
        outputs = students(pixels, targets)
        yield discrepancies(targets, outputs.encoder, outputs.decoder)


def compute_metrics(inspection: AnomalyScores, truth: LabelledImages) -> Scores:
    """All metrics of one inspection of `truth.images`."""
    return metrics.score_maps(inspection.maps, truth.masks, inspection.scores, truth.labels, truth.has_mask)


def compute_metrics_shared(
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
    seen = score_images(table, students, truth.images, config, device, mine.tolist())
    known = truth.has_mask[mine]
    state = metrics.update(MetricState(), seen.maps, truth.masks[mine], seen.scores, truth.labels[mine], known)
    if dist.is_available() and dist.is_initialized():
        states: list[MetricState | None] = [None] * world_size
        dist.all_gather_object(states, state)
        state = metrics.merge(part for part in states if part is not None)
    return metrics.compute(state)
