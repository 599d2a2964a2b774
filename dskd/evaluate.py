"""Maps, scores and metrics of labelled images; the only module that reads test labels."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dskd import metrics
from dskd.anomaly import BLUR_REFERENCE, anomaly_maps, image_scores
from dskd.config import LayoutName, RunConfig
from dskd.data.datasets import read_test_split
from dskd.data.defects import add_defects, find_foreground
from dskd.data.depth import PixelScale
from dskd.data.geometry import Frame, Geometry, LargeCanvas
from dskd.data.images import checked_mask, load_framed, load_images, load_inside, load_masks
from dskd.data.samples import Sample
from dskd.data.tiles import MAP_STRIDE, TilePlace, on_map, stitched_map, tile_masks, tiled_score, tiles_inside
from dskd.device import to_device, to_host
from dskd.metrics import MetricState, Scores
from dskd.model.distances import Discrepancies, discrepancies
from dskd.model.features import FeatureTable
from dskd.model.frozen import FrozenNetworks
from dskd.model.teacher import Teacher, normalize

_BATCH = 16


class LabelledImages(NamedTuple):
    """Images with what is known of their defects."""

    images: npt.NDArray[np.uint8]
    """(N, H, W, 3)"""
    masks: npt.NDArray[np.bool_]
    """(N, H, W), true on defects; all false for a normal image, or where a defect has no mask."""
    labels: npt.NDArray[np.bool_]
    """(N,), true for a defective image, taken from its folder and never from its mask."""
    has_mask: npt.NDArray[np.bool_]
    """(N,), false for a defective image without a mask file: its pixels are of neither kind, and stay out of the
    pixel figures. Normal images need none."""
    sources: npt.NDArray[np.int64]
    """(N,), the same number for a normal image and for its copies with synthetic defects, another for every other."""
    inside: npt.NDArray[np.bool_] | None = None
    """(N, H, W), false for pixels that are not inspected: outside of the region of interest, or bars; None: all are."""


class AnomalyScores(NamedTuple):
    """Anomaly maps and scores of some images."""

    maps: npt.NDArray[np.float32]
    """(N, H, W); higher is more anomalous, no fixed range."""
    scores: npt.NDArray[np.float32]
    """(N,)"""


class SeenImage(NamedTuple):
    """A labelled test image and its score."""

    path: Path
    defect: str
    """Name of the defect's folder; "good" for a normal image."""
    is_defective: bool
    """As it counts: false also for a defect that lies outside of the region of interest."""
    score: float


class Confusion(NamedTuple):
    """How verdicts at a threshold agree with the labels of test images, in images."""

    num_good: int
    num_false_alarms: int
    """Of the good ones, those called anomalous."""
    num_defective: int
    num_missed: int
    """Of the defective ones, those called good."""


class Recall(NamedTuple):
    """Defective images of one kind."""

    num_found: int
    num_images: int


class Evaluation(NamedTuple):
    """A detector on the labelled test images of a category."""

    scores: Scores
    images: tuple[SeenImage, ...]
    state: MetricState = MetricState()
    """Pixels and scores that the metrics come from."""

    def confusion(self, threshold: float) -> Confusion:
        """Counts of right and wrong verdicts; a score above `threshold` is anomalous."""
        good = [image.score > threshold for image in self.images if not image.is_defective]
        defective = [image.score > threshold for image in self.images if image.is_defective]
        return Confusion(len(good), sum(good), len(defective), len(defective) - sum(defective))

    def recall(self, threshold: float) -> dict[str, Recall]:
        """How many defective images of each kind are called anomalous, by the name of the defect's folder."""
        found: dict[str, Recall] = {}
        for image in sorted(self.images, key=lambda image: image.defect):
            if image.is_defective:
                so_far = found.get(image.defect, Recall(0, 0))
                found[image.defect] = Recall(so_far.num_found + (image.score > threshold), so_far.num_images + 1)
        return found


def _unheard(note: str) -> None:
    pass


def label(
    samples: Sequence[Sample],
    images: npt.NDArray[np.uint8],
    geometry: Geometry,
    on_note: Callable[[str], object] = _unheard,
) -> LabelledImages:
    """Labels and masks of `images` (N, H, W, 3), read from the folders and mask files of `samples`.

    An image whose defect lies outside of the region of interest counts as good. `on_note` as in `load_masks`.
    """
    labels = np.array([sample.is_defective for sample in samples], np.bool_)

    def outside(index: int) -> None:
        labels[index] = False
        on_note(f"{samples[index].path} counts as good: its defect lies outside of the region of interest.")

    masks = load_masks(samples, geometry, on_note, outside)
    return LabelledImages(
        images,
        masks,
        labels,
        np.array([sample.mask is not None or not sample.is_defective for sample in samples], np.bool_),
        np.arange(len(samples)),
        load_inside([sample.path for sample in samples], geometry),
    )


def label_tiles(
    samples: Sequence[Sample],
    frames: Sequence[Frame],
    places: Sequence[TilePlace],
    tiles: npt.NDArray[np.uint8],
    geometry: Geometry,
) -> LabelledImages:
    """Labels and masks of tiles (N, T, T, 3): a tile is defective if its image's mask marks a pixel of it.

    Every tile of a defective sample without a mask is defective, and its pixels stay out of the pixel figures.
    """
    masks = tile_masks(samples, checked_mask, frames, places, geometry)
    is_unmasked = np.array([sample.is_defective and sample.mask is None for sample in samples], np.bool_)
    unmasked = is_unmasked[[place.image for place in places]]
    return LabelledImages(
        tiles,
        masks,
        np.asarray(masks.any(axis=(1, 2)) | unmasked),
        ~unmasked,
        np.array([place.image for place in places], np.int64),
        tiles_inside(frames, places, geometry),
    )


def join(first: LabelledImages, second: LabelledImages) -> LabelledImages:
    """The images of both, in order; no source is in both."""
    parts = [part.inside if part.inside is not None else np.ones_like(part.masks) for part in (first, second)]
    is_masked = first.inside is not None or second.inside is not None
    return LabelledImages(
        np.concatenate([first.images, second.images]),
        np.concatenate([first.masks, second.masks]),
        np.concatenate([first.labels, second.labels]),
        np.concatenate([first.has_mask, second.has_mask]),
        np.concatenate([first.sources, second.sources + first.sources.max(initial=-1) + 1]),
        np.concatenate(parts) if is_masked else None,
    )


def synthetic_validation(
    normals: npt.NDArray[np.uint8],
    *,
    seed: int,
    num_defective: int,
    textures: npt.NDArray[np.uint8] | None = None,
    inside: npt.NDArray[np.bool_] | None = None,
) -> LabelledImages:
    """Held-out normals (N, H, W, 3) followed by copies of them with synthetic defects.

    The copies take the normals in turn, at least one of each, `num_defective` in all where that is
    more, `textures` feeding some and only pixels `inside` (N, H, W) changing as in `add_defects`. No real
    defect and no test image is involved.
    """
    repeats = -(-max(num_defective, len(normals)) // len(normals))
    count = max(num_defective, len(normals))
    scored = None if inside is None else np.concatenate([inside] * repeats)[:count]
    objects = ([find_foreground(image) for image in normals] * repeats)[:count]
    defective, masks = add_defects(
        np.concatenate([normals] * repeats)[:count], seed=seed, textures=textures, inside=scored, objects=objects
    )
    return LabelledImages(
        np.concatenate([normals, defective]),
        np.concatenate([np.zeros(normals.shape[:3], np.bool_), masks]),
        np.arange(len(normals) + count) >= len(normals),
        np.ones(len(normals) + count, np.bool_),
        np.concatenate([np.arange(len(normals)), np.arange(count) % len(normals)]),
        None if inside is None or scored is None else np.concatenate([inside, scored]),
    )


def labelled_test_split(
    data: Path,
    category: str,
    geometry: Geometry,
    scale: PixelScale | None = None,
    on_note: Callable[[str], object] = _unheard,
    layout: LayoutName = "auto",
) -> LabelledImages:
    """The labelled test split of a category; nothing that selects or tunes may call this.

    `scale` is the detector's, of images of more than 8 bits. `on_note` hears how many files are used and left out,
    and of masks and images that are worth a look. Raises ValueError where the category has no test images of both
    kinds, or a mask that cannot be told or has another shape than its image.
    """
    return labelled(test_samples(data, category, on_note, layout), geometry, scale, on_note)


def labelled(
    samples: Sequence[Sample],
    geometry: Geometry,
    scale: PixelScale | None = None,
    on_note: Callable[[str], object] = _unheard,
) -> LabelledImages:
    """The images of `test_samples`; notes and errors as `labelled_test_split`."""

    def clipped(path: Path, count: int) -> None:
        on_note(f"{path} has {count} values beyond the scale of the training images; they are clipped.")

    paths = [sample.path for sample in samples]
    return label(samples, load_images(paths, geometry, scale=scale, on_clipped=clipped), geometry, on_note)


def test_samples(
    data: Path, category: str, on_note: Callable[[str], object] = _unheard, layout: LayoutName = "auto"
) -> tuple[Sample, ...]:
    """The samples of `labelled_test_split`; notes and errors as there."""
    found = read_test_split(data, category, layout)
    on_note(found.describe())
    num_defective = sum(sample.is_defective for sample in found.test)
    if num_defective in (0, len(found.test)):
        raise ValueError(
            f"category {category} in {data} needs good and defective test images to be evaluated, "
            f"got {len(found.test) - num_defective} good and {num_defective} defective."
        )
    return found.test


def inspect_images(
    networks: FrozenNetworks,
    images: npt.NDArray[np.uint8],
    config: RunConfig,
    device: torch.device,
    inside: npt.NDArray[np.bool_] | None = None,
) -> AnomalyScores:
    """As `score_images`, in the batches of an inspection."""
    size = networks.batch_size(images.shape[1], images.shape[2])
    starts = range(0, len(images), size)
    compared = (networks.compare(to_device(device, images, slice(start, start + size))) for start in starts)
    return _scores_of(compared, len(images), images.shape[1:3], config, device, inside)


def score_images(
    teacher: Teacher | FeatureTable,
    students: nn.Module,
    images: npt.NDArray[np.uint8],
    config: RunConfig,
    device: torch.device,
    indices: Sequence[int] | None = None,
    inside: npt.NDArray[np.bool_] | None = None,
    batch_size: int = _BATCH,
) -> AnomalyScores:
    """Anomaly maps and scores of images (N, H, W, 3), or of those at `indices`, in that order.

    `teacher` is the network, or the table of its pyramids of the same images. Where `inside` (N, H, W) is false the
    maps are 0.
    """
    order = np.arange(len(images)) if indices is None else np.asarray(indices, np.int64)
    chosen = inside if inside is None else inside[order]
    compared = _compared(teacher, students, images, device, order, batch_size)
    return _scores_of(compared, len(order), images.shape[1:3], config, device, chosen)


@torch.inference_mode()
def _scores_of(
    compared: Iterator[Discrepancies],
    count: int,
    size: tuple[int, ...],
    config: RunConfig,
    device: torch.device,
    inside: npt.NDArray[np.bool_] | None,
) -> AnomalyScores:
    """Maps and scores of `count` images of that (height, width), whose batches follow each other."""
    height, width = size
    maps = np.empty((count, height, width), np.float32)
    scores = np.empty(count, np.float32)
    num_read = num_seen = 0
    unread: deque[tuple[Callable[[], npt.NDArray[Any]], ...]] = deque()

    def read() -> None:
        nonlocal num_read
        batch, pooled = (wait() for wait in unread.popleft())
        end = num_read + len(batch)
        maps[num_read:end], scores[num_read:end] = batch, pooled
        num_read = end

    for found in compared:
        batch = anomaly_maps(found, config.score, (height, width))
        if inside is not None:
            batch = batch * to_device(device, inside, slice(num_seen, num_seen + len(batch)))
        num_seen += len(batch)
        unread.append((to_host(batch.float()), to_host(image_scores(batch, config.score.score_top_fraction).float())))
        if len(unread) > 1:  # a GPU works on this batch while the one before it is read
            read()
    while unread:
        read()
    return AnomalyScores(maps, scores)


def score_canvas(
    networks: FrozenNetworks,
    canvas: npt.NDArray[np.uint8] | LargeCanvas,
    frame: Frame,
    config: RunConfig,
    geometry: Geometry,
    device: torch.device,
) -> tuple[npt.NDArray[np.float32], float]:
    """Map, one value per `MAP_STRIDE` pixels, and score of a canvas (h, w, 3) of any size, inspected tile by tile."""
    side = geometry.tile // MAP_STRIDE
    sharp = dataclasses.replace(config.score, blur_sigma=0.0)

    @torch.inference_mode()
    def score_tiles(tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        found = networks.compare(to_device(device, tiles, slice(None)))
        maps: npt.NDArray[np.float32] = anomaly_maps(found, sharp, side).float().cpu().numpy()
        return maps

    sigma = config.score.blur_sigma * side / BLUR_REFERENCE
    heat = stitched_map(canvas, geometry.inside(frame, MAP_STRIDE), geometry, sigma, score_tiles, _BATCH)
    return heat, tiled_score(heat, geometry, config.score.score_top_fraction)


def score_files(
    networks: FrozenNetworks,
    paths: Sequence[Path],
    config: RunConfig,
    geometry: Geometry,
    device: torch.device,
    scale: PixelScale | None,
) -> list[float]:
    """Scores of whole images that are inspected tile by tile, one image in memory at a time."""
    scores = []
    for path in paths:
        framed = load_framed(path, geometry, scale)
        scores.append(score_canvas(networks, framed.rgb, framed.frame, config, geometry, device)[1])
    return scores


def evaluate_tiled(
    networks: FrozenNetworks,
    samples: Sequence[Sample],
    config: RunConfig,
    geometry: Geometry,
    device: torch.device,
    scale: PixelScale | None,
    on_note: Callable[[str], object] = _unheard,
) -> Evaluation:
    """Whole labelled images that are inspected tile by tile; all metrics are on the grid of their maps."""
    state = MetricState()
    seen: list[SeenImage] = []
    for sample in samples:
        framed = load_framed(sample.path, geometry, scale)
        heat, score = score_canvas(networks, framed.rgb, framed.frame, config, geometry, device)
        mask, is_defective = np.zeros(heat.shape, np.bool_), sample.is_defective
        if sample.mask is not None:
            marked = checked_mask(sample, on_note)
            mask = on_map(geometry.mask(marked, framed.frame))
            if geometry.is_outside(marked):
                is_defective = False
                on_note(f"{sample.path} counts as good: its defect lies outside of the region of interest.")
        seen.append(SeenImage(sample.path, sample.defect, is_defective, score))
        is_known = sample.mask is not None or not sample.is_defective
        inside = geometry.inside(framed.frame, MAP_STRIDE)
        state = metrics.update(
            state,
            heat[None],
            mask[None],
            np.array([score]),
            np.array([is_defective]),
            np.array([is_known]),
            inside[None],
        )
    return Evaluation(metrics.compute(state), tuple(seen), state)


@torch.inference_mode()
def disagreements(
    teacher: Teacher | FeatureTable, students: nn.Module, images: npt.NDArray[np.uint8], device: torch.device
) -> Discrepancies:
    """The discrepancies of images (N, H, W, 3), on the CPU; every score configuration starts from them."""
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
    batch_size: int = _BATCH,
) -> Iterator[Discrepancies]:
    if students.training:
        students.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        pixels = normalize(to_device(device, images, chosen))
        targets = teacher.pyramid(chosen, device) if isinstance(teacher, FeatureTable) else teacher(pixels)
        outputs = students(pixels, targets)
        yield discrepancies(targets, outputs.encoder, outputs.decoder)


def compute_metrics(inspection: AnomalyScores, truth: LabelledImages) -> Scores:
    """All metrics of one inspection of `truth.images`."""
    return metrics.compute(metric_state(inspection, truth))


def metric_state(inspection: AnomalyScores, truth: LabelledImages) -> MetricState:
    """What the metrics of one inspection of `truth.images` come from."""
    return metrics.update(
        MetricState(), inspection.maps, truth.masks, inspection.scores, truth.labels, truth.has_mask, truth.inside
    )


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
    seen = score_images(table, students, truth.images, config, device, mine.tolist(), truth.inside)
    known, inside = truth.has_mask[mine], None if truth.inside is None else truth.inside[mine]
    state = metrics.update(MetricState(), seen.maps, truth.masks[mine], seen.scores, truth.labels[mine], known, inside)
    if dist.is_available() and dist.is_initialized():
        states: list[MetricState | None] = [None] * world_size
        dist.all_gather_object(states, state)
        state = metrics.merge(part for part in states if part is not None)
    return metrics.compute(state)
