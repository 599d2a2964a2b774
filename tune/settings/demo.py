"""The flags of `tune/demo.py`, checked."""

from dataclasses import dataclass
from pathlib import Path

from dskd.config import TeacherSource
from tune.settings.search import SearchSettings

_STEPS = 120
"""Enough for good verdicts on the drawn products (benchmarks/README.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """Show the whole system on drawn images: search three categories, pull the champions, inspect test images."""

    out: Path = Path("dskd-demo")
    """Folder for everything that the demo writes: data, results, detectors, verdicts."""
    teacher_weights: str | None = None
    """hub, lite0 (EfficientNet-Lite0 from an installed package), a .safetensors or .pth file, or random (untrained). By
    default hub; if it cannot be reached, lite0."""
    trials: int = 4
    """Trials per category."""
    steps: int | None = None
    """Optimiser steps of a trial that is not pruned; 120 unless --epochs is given."""
    epochs: int | None = None
    """Length in passes over the training images instead of steps."""
    image_size: int = 128
    """Side in pixels that images are resized to; a multiple of 32."""
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
        return SearchSettings(
            data=str(self.data),
            name=self.name or f"demo-{label}",
            trials=self.trials,
            steps=_STEPS if self.steps is None and self.epochs is None else self.steps,
            epochs=self.epochs,
            image_size=self.image_size,
            batch_size=self.batch_size,
            teacher_weights=weights,
            storage=str(self.out / "results"),
            address=self.address,
        )
