"""What training needs for one category: pixels, the teacher and its features, and the held-out images."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector

from dskd.config import AmplificationConfig, DataSpec, RunConfig, Selection
from dskd.data.cache import ArrayCache
from dskd.data.datasets import (
    MAX_TRAINING_TILES,
    MAX_VALIDATION_TILES,
    NUM_VALIDATION_DEFECTS,
    fingerprint,
    read_category,
)
from dskd.data.defects import choose_textures, load_textures
from dskd.data.depth import PixelScale
from dskd.data.exclusions import without_excluded
from dskd.data.folds import num_folds, split_images
from dskd.data.geometry import Geometry, RegionOfInterest
from dskd.data.images import find_scale
from dskd.data.regions import find_region
from dskd.evaluate import LabelledImages, join, synthetic_validation, test_samples
from dskd.model.amplification import AmplifiedTeacher, build_amplifier
from dskd.model.features import FeatureTable, feature_table
from dskd.model.teacher import Teacher, build_teacher, weights_fingerprint
from dskd.training.reading import ImageReader, Seen, check_input
from dskd.training.stage_one import AmplificationEpoch, amplifier_optimizer, fit_amplifier


class TrainingData(NamedTuple):
    """What training needs for one category and one teacher; all trials with that category and teacher share it."""

    category: str
    teacher: Teacher
    """The amplified teacher if `amplification` is set."""
    teacher_source: str
    teacher_sha256: str
    """SHA-256 of the pretrained weights, without the amplifier's."""
    train_images: npt.NDArray[np.uint8]
    train_features: FeatureTable
    validation: LabelledImages
    """Held-out normals for the selection, then copies of them with synthetic defects, then real labelled defects if
    there are some; with the selection "oracle" the labelled test images instead."""
    validation_features: FeatureTable
    validation_files: tuple[str, ...]
    calibration_images: npt.NDArray[np.uint8]
    """Held-out normals for computing the thresholds; if calibration_fraction is 0, the same as for the selection.
    Empty with tiles, as thresholds are computed from the whole images of `calibration_paths` then."""
    calibration_features: FeatureTable
    calibration_files: tuple[str, ...]
    data_sha256: str
    num_validation_defects: int
    """Real labelled defects among the validation images."""
    num_textures: int
    textures_sha256: str
    amplification: AmplificationConfig = AmplificationConfig()
    selection: Selection = "val"
    scale: PixelScale | None = None
    """How images of more than 8 bits are read; computed from all normal training images."""
    notes: tuple[str, ...] = ()
    """Notes for the user on the images: how many are used and left out, unusual masks, clipped values."""
    region: RegionOfInterest | None = None
    calibration_inside: npt.NDArray[np.bool_] | None = None
    """Which pixels of the calibration images are scored; None: all."""
    calibration_paths: tuple[Path, ...] = ()
    """The files of the calibration images."""
    num_folds: int = 0
    """Folds that the normal images are cut into, of which one is held out; 0: they are not."""


def prepare(
    config: RunConfig,
    spec: DataSpec,
    *,
    device: torch.device,
    cache: ArrayCache | None,
    progress: bool = False,
    on_amplification: Callable[[AmplificationEpoch], object] = lambda epoch: None,
) -> TrainingData:
    """Decode and split the images, amplify the teacher, draw the validation defects and compute the features.

    With a cache each of these steps is done at most once per machine.

    Only the part of `config` that `RunConfig.for_inputs` keeps is used. `on_amplification` is called after every
    epoch of stage I that is computed now, but not if stage I comes from the cache. In a process group every process
    gets the amplifier of the first process. With `progress` a progress bar on the terminal counts the slow steps.
    With the selection "oracle" the held-out normals are not used for training either.
    Raises ValueError on unusable data, textures or weights, NonFiniteLossError if stage I diverges.
    """
    data, category, amplification = config.data, spec.category, config.amplification
    backbone, levels = config.model.backbone, config.model.levels
    teacher = build_teacher(backbone, levels, spec.teacher.weights).to(device)
    teacher_sha256 = weights_fingerprint(teacher)
    texture_files = choose_textures(spec.textures) if spec.textures is not None else []
    texture_images = load_textures(texture_files, max(data.input_size)) if texture_files else None
    listed = read_category(spec.data, category, data.layout)
    samples = without_excluded(listed, spec.exclude)
    region = find_region(spec.region, samples.folder, samples.train[0].path)
    geometry = Geometry.of(data, region, config.model.tile_alignment)
    check_input(teacher, backbone, geometry, device)
    notes = [samples.describe()]
    if num_excluded := len(listed.train) + len(listed.validation) - len(samples.train) - len(samples.validation):
        notes.append(f"{num_excluded} good images are left out by --exclude.")
    scale = find_scale([sample.path for sample in samples.train])
    train, selecting, calibrating, names = split_images(samples, data)
    defects = [sample for sample in samples.validation if sample.is_defective]

    reader = ImageReader(
        geometry, scale, cache, progress, data.split_seed, notes.append, is_whole=data.layout == "classes"
    )
    training = reader.read(train, "training images", MAX_TRAINING_TILES)
    selection = reader.read(selecting, "held-out images", MAX_VALIDATION_TILES)
    # With tiles the thresholds come from whole images, which are read one by one when the students are trained.
    calibration = selection.none() if geometry.tile else reader.read(calibrating, "calibration images")
    content = training.sha256 + fingerprint([sample.path for sample in names])
    if region is not None:  # other images, as far as the network is concerned
        content += hashlib.sha256(repr(region).encode()).hexdigest()
    textures_sha256 = fingerprint(texture_files) if texture_files else ""
    if amplification.amplification:
        teacher = _amplified(
            teacher,
            training,
            texture_images,
            amplification,
            device,
            cache,
            f"{training.content}|{textures_sha256}|{teacher_sha256}|{backbone}|{levels}|{device.type}",
            on_amplification,
        )
    if spec.selection == "oracle":
        defects = []
        test = reader.with_known_defects(test_samples(spec.data, category, notes.append, data.layout))
        validation, _ = reader.read_labelled(test, "test images", 4 * MAX_VALIDATION_TILES)
        if not validation.masks.any() and data.layout != "classes":
            raise ValueError(
                f"category {category} in {spec.data} has no masks of its test defects: AUPRO, a half of the objective "
                "of selection 'oracle', cannot be computed."
            )
    else:
        validation = synthetic_validation(
            selection.images,
            seed=data.split_seed,
            num_defective=NUM_VALIDATION_DEFECTS,
            textures=texture_images,
            inside=selection.inside,
        )
    if data.layout == "classes":  # what is anomalous is the whole image, not a part of it
        validation = validation._replace(masks=np.zeros_like(validation.masks), has_mask=~validation.labels)
    if defects := reader.with_known_defects(defects):
        real, defects_sha256 = reader.read_labelled(defects, "validation defects", 4 * MAX_VALIDATION_TILES)
        validation = join(validation, real)
        masks_sha256 = fingerprint(sample.mask for sample in defects if sample.mask is not None)
        content += defects_sha256 + masks_sha256

    def features(images: npt.NDArray[np.uint8], what: str) -> FeatureTable:
        return feature_table(teacher, images, device, cache=cache, progress=f"teacher on {what}" if progress else None)

    return TrainingData(
        category=category,
        teacher=teacher,
        teacher_source=spec.teacher.of(config.model.backbone).name,
        teacher_sha256=teacher_sha256,
        train_images=training.images,
        train_features=features(training.images, "training images"),
        validation=validation,
        validation_features=features(validation.images, "validation images"),
        validation_files=() if spec.selection == "oracle" else tuple(names[sample] for sample in selecting),
        calibration_images=calibration.images,
        calibration_features=features(calibration.images, "calibration images"),
        calibration_files=tuple(names[sample] for sample in calibrating),
        data_sha256=hashlib.sha256(content.encode()).hexdigest(),
        num_validation_defects=len(defects),
        num_textures=len(texture_files),
        textures_sha256=textures_sha256,
        amplification=amplification,
        selection=spec.selection,
        scale=scale,
        notes=tuple(notes),
        region=region,
        calibration_inside=calibration.inside,
        calibration_paths=tuple(sample.path for sample in calibrating),
        num_folds=num_folds(samples, data),
    )


def _amplified(
    teacher: Teacher,
    training: Seen,
    textures: npt.NDArray[np.uint8] | None,
    config: AmplificationConfig,
    device: torch.device,
    cache: ArrayCache | None,
    key: str,
    on_epoch: Callable[[AmplificationEpoch], object],
) -> AmplifiedTeacher:
    """The teacher after stage I; its weights come from the cache if it has an entry for `key` and `config`."""
    amplifier = build_amplifier(teacher, config.memory_size, config.amplification_seed).to(device)
    parameters = list(amplifier.parameters())
    sizes = [parameter.numel() for parameter in parameters]

    def fill(out: npt.NDArray[np.float32]) -> None:
        optimizer = amplifier_optimizer(amplifier, config)
        for epoch in fit_amplifier(
            amplifier,
            optimizer,
            teacher,
            training.images,
            config,
            device=device,
            textures=textures,
            inside=training.inside,
        ):
            on_epoch(epoch)
        out[:] = parameters_to_vector(parameters).detach().cpu().numpy()

    found = np.empty(sum(sizes), np.float32)
    if cache is None:
        fill(found)
    else:
        found = cache.get(f"amplifier|{key}|{config}", found.shape, np.float32, fill)
    weights = torch.from_numpy(np.array(found)).to(device)
    if dist.is_available() and dist.is_initialized():
        # Stage I ran on every machine and devices round differently, but all students need the same teacher.
        dist.broadcast(weights, 0)
    with torch.no_grad():
        for parameter, values in zip(parameters, weights.split(sizes), strict=True):
            parameter.copy_(values.view_as(parameter))
    return AmplifiedTeacher(teacher, amplifier)
