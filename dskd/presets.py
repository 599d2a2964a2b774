"""The published methods as configurations of the one network."""

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import tomli_w

from dskd.config import AmplificationConfig, LossConfig, ModelConfig, RunConfig, ScoreConfig, TrainConfig, replaced

# Lengths. The papers count epochs on MVTec AD, whose 15 categories have 3,629 training images, 242 in the mean; what a
# protocol amounts to is epochs x ceil(242 / batch) steps of the optimiser. Few images make short epochs: with the
# papers' epochs, 40 images would train a sixth as long, so a preset's length is that number of steps on any data.
PRESETS: dict[str, RunConfig] = {
    # Yao, Gao, arXiv 2402.00448. What is public of the paper is silent on the layers, the optimiser and
    # the fusion; every value here is our reconstruction and not the paper's. A learning rate that falls to zero
    # stabilises the student encoder, which swings from epoch to epoch under a constant one. Length, batch and optimiser
    # are RD4AD's.
    "dskd": RunConfig(train=TrainConfig(schedule="cosine", batch_size=16, steps=3200)),
    # Wang et al., BMVC 2021, arXiv 2103.04257 v3: 100 epochs of 8 steps.
    "stfpm": RunConfig(
        model=ModelConfig(student_decoder=False),
        loss=LossConfig(encoder_match="position"),
        score=ScoreConfig(level_fusion="product", blur_sigma=0.0),
        train=TrainConfig(optimizer="sgd", learning_rate=0.4, batch_size=32, steps=800),
    ),
    # Deng, Li, CVPR 2022, arXiv 2201.10703; WideResNet50-2 in the paper. 200 epochs of 16 steps.
    "rd4ad": RunConfig(
        model=ModelConfig(student_encoder=False, decoder_input="teacher"),
        loss=LossConfig(decoder_match="flattened"),
        score=ScoreConfig(level_fusion="sum", blur_sigma=4.0),
        train=TrainConfig(optimizer="adam", learning_rate=0.005, batch_size=16, steps=3200),
    ),
    # Tang et al., TIP 2026, arXiv 2405.02068; WideResNet50-2 in the paper, whose embedding has 3 blocks. Its
    # code resizes bicubically where ours is bilinear for all, and selects by the test set where ours does not.
    # 120 epochs of 16 steps; stage I counts its own epochs.
    "aand": RunConfig(
        model=ModelConfig(student_encoder=False, decoder_input="teacher"),
        loss=LossConfig(decoder_match="flattened", hkd_weight=1.0, hkd_hardest=10, decoder_hkd_margin=0.0),
        score=ScoreConfig(level_fusion="sum", blur_sigma=4.0),
        train=TrainConfig(optimizer="adam", learning_rate=0.005, schedule="multistep", batch_size=16, steps=1920),
        amplification=AmplificationConfig(amplification=True, amplification_epochs=100),
    ),
}

_PRESET = "preset"
_USUAL_LEVELS = ModelConfig().levels
_TRANSFORMER_LEVELS = {"large": (7, 15, 23)}
"""Ends of the second, fourth and last sixth block of each third; the smaller ones have 12 blocks."""
_SMALL_TRANSFORMER_LEVELS = (3, 7, 11)


def with_backbone(config: RunConfig, backbone: str) -> RunConfig:
    """`config` with another teacher, and with what goes with that teacher's family where `config` has the usual.

    Vision transformers have no stages, so their levels are blocks at a third, two thirds and the end, and ConvNeXt
    counts its stages from 0. For both, two students become the decoder alone, fed by the teacher (RD4AD): a student
    encoder of such a network learns too little from some hundred images. The image size, and what tiles share, become
    the nearest of whole patches.
    """
    values: dict[str, Any] = {"backbone": backbone}
    is_transformer = re.search(r"patch\d+", backbone) is not None
    is_convnext = backbone.startswith("convnext")
    if config.model.levels == _USUAL_LEVELS and is_transformer:
        sizes = [levels for size, levels in _TRANSFORMER_LEVELS.items() if f"_{size}_" in backbone]
        values["levels"] = (*sizes, _SMALL_TRANSFORMER_LEVELS)[0]
    elif config.model.levels == _USUAL_LEVELS and is_convnext:
        values["levels"] = (0, 1, 2)
    if (is_transformer or is_convnext) and config.model.student_encoder and config.model.student_decoder:
        values |= {"student_encoder": False, "decoder_input": "teacher"}
    model = dataclasses.replace(config.model, **values)
    multiple, _ = model.image_multiple
    if config.data.image_size % multiple:
        values["image_size"] = max(1, round(config.data.image_size / multiple)) * multiple
    if config.data.overlap is not None and config.data.overlap % model.tile_alignment:
        values["overlap"] = round(config.data.overlap / model.tile_alignment) * model.tile_alignment
    return config.with_values(values)


def read_config(path: Path, preset: str | None = None, backbone: str | None = None) -> RunConfig:
    """The configuration in a TOML file; what it leaves out is the preset's, with what goes with its teacher.

    `preset` overrides the file's own, which overrides "dskd". `backbone` is the teacher of a file that names none; in
    any other it chooses the teacher's family alone, for a caller that replaces the file's.
    Raises ValueError naming the file, and the section and field where one is unknown, of the wrong type or out
    of range.
    """
    own, document = read_document(path)
    base = PRESETS[preset or own or "dskd"]
    backbone = backbone or document.get("model", {}).get("backbone")
    try:
        sections = (base if backbone is None else with_backbone(base, backbone)).to_dict()
        for name, fields in document.items():
            sections[name] = replaced(sections[name], fields)
        return RunConfig.from_dict(sections)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def read_document(path: Path) -> tuple[str | None, dict[str, dict[str, Any]]]:
    """The preset that a TOML file names, if it does, and the fields that it sets, by section.

    Raises ValueError naming the file, and the section or field where one is unknown.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}.") from None
    own = document.pop(_PRESET, None)
    if own is not None and (not isinstance(own, str) or own not in PRESETS):
        raise ValueError(f"{path}: preset must be one of {', '.join(PRESETS)}, got {own!r}.")
    sections = RunConfig().to_dict()
    if unknown := sorted(set(document) - set(sections)):
        raise ValueError(f"{path}: unknown section {unknown[0]!r}; known: {', '.join([_PRESET, *sections])}.")
    for name, fields in document.items():
        if not isinstance(fields, dict):
            raise ValueError(f"{path}: [{name}] must be a section of fields, got {name} = {fields!r}.")
        if unknown := sorted(set(fields) - set(sections[name])):
            raise ValueError(
                f"{path}: unknown field {unknown[0]!r} in [{name}]; known: {', '.join(sorted(sections[name]))}."
            )
    return own, document


def to_toml(config: RunConfig) -> str:
    """Every field of `config` that has a value as TOML; `read_config` reads back the same, with any preset.

    >>> print(to_toml(PRESETS["stfpm"])[:23])
    [data]
    image_size = 256
    """
    sections = {
        section: {name: value for name, value in fields.items() if value is not None}  # TOML has no null
        for section, fields in config.to_dict().items()
    }
    return tomli_w.dumps(sections)


Preset = Literal["dskd", "stfpm", "rd4ad", "aand"]
