"""The flags of `tune/demo.py`, checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dskd.config import TeacherSource
from dskd.presets import Preset
from tune.settings.search import SearchSettings


class _Usual(NamedTuple):
    """What the demonstration takes with a teacher unless asked otherwise: all it does in eight minutes on two cores."""

    image_size: int
    steps: int


_WITH_RESNET18 = _Usual(192, 160)
_WITH_LITE0 = _Usual(256, 320)
"""The smaller network sees the board's small parts at the size that they were drawn in, in no more time."""
NUM_TRAIN = 120
"""Drawn good images of each product: as many as a threshold needs that flags few good ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """Show the whole system on drawn images: search three categories, pull the champions, inspect test images."""

    out: Path = Path("dskd-demo")
    """Folder for everything that the demo writes: data, results, detectors, verdicts."""
    teacher_weights: str | None = None
    """hub, lite0 (EfficientNet-Lite0 from an installed package), a .safetensors or .pth file, or random (untrained). By
    default hub; if it cannot be reached, lite0."""
    trials: int = 3
    """Trials per category."""
    preset: Preset = "rd4ad"
    """Method; dskd takes twice as long."""
    steps: int | None = None
    """Optimiser steps of a trial that is not pruned; unless --epochs is given 320 with lite0, else 160."""
    epochs: int | None = None
    """Length in passes over the training images instead of steps."""
    image_size: int | None = None
    """Side in pixels that images are resized to, a multiple of 32; by default 256 with lite0, else 192."""
    batch_size: int = 8
    """Images of one optimiser step."""
    name: str | None = None
    """Name of the search; by default demo-hub, demo-lite0, demo-random or demo-file, depending on the teacher."""
    address: str | None = None
    """Ray cluster: auto or ray://…; by default one started on this machine. Its nodes must be able to read --out."""

    def __post_init__(self) -> None:
        self.search("random")  # raises the search's own errors before anything is drawn

    @property
    def data(self) -> Path:
        return self.out / "data"

    def search(self, weights: str) -> SearchSettings:
        """Settings of the search over the drawn categories, with these teacher weights.

        Raises ValueError on values out of range.
        """
        source = TeacherSource(weights)
        label = "file" if source.is_file else source.name
        usual = _WITH_LITE0 if source == TeacherSource("lite0") else _WITH_RESNET18
        return SearchSettings(
            data=str(self.data),
            name=self.name or f"demo-{label}",
            trials=self.trials,
            preset=self.preset,
            steps=usual.steps if self.steps is None and self.epochs is None else self.steps,
            epochs=self.epochs,
            image_size=usual.image_size if self.image_size is None else self.image_size,
            batch_size=self.batch_size,
            folds=3,
            finalists=0,  # comparing them on the other folds takes six minutes more
            teacher_weights=weights,
            storage=str(self.out / "results"),
            address=self.address,
        )
