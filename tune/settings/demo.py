"""What the demonstration is asked to do: the flags of `tune/demo.py`, checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tune.settings.search import SearchSettings

TeacherLabel = Literal["hub", "random", "file"]
"""Where the teacher's weights came from, as it stands in the name of the search."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """Show the whole system on drawn images: search three categories, pull the champions, inspect test images."""

    out: Path = Path("dskd-demo")
    """Folder of everything that the demo makes: data, results, detectors, verdicts."""
    teacher_weights: str | None = None
    """hub, a .safetensors or .pth file, or random (untrained); unless given, hub where it can be reached, else
    random, and every output says so."""
    trials: int = 4
    """Trials per category."""
    epochs: int = 8
    """Epochs of a trial that is not pruned."""
    image_size: int = 128
    """Side in pixels that images are resized to; a multiple of 32."""
    batch_size: int = 8
    """Images of one optimiser step."""
    name: str | None = None
    """Name of the search; demo-hub, demo-random or demo-file, by its teacher, unless given."""
    address: str | None = None
    """Ray cluster: auto or ray://…; unless given, one started on this machine. Its nodes must see --out."""

    def __post_init__(self) -> None:
        self.search("random")  # refuses what the search would refuse, before anything is drawn

    @property
    def data(self) -> Path:
        return self.out / "data"

    def search(self, weights: str) -> SearchSettings:
        """The search of the drawn categories with a teacher of these weights.

        Raises ValueError on values out of range.
        """
        label: TeacherLabel = "hub" if weights == "hub" else "random" if weights == "random" else "file"
        return SearchSettings(
            data=str(self.data),
            name=self.name or f"demo-{label}",
            trials=self.trials,
            epochs=self.epochs,
            image_size=self.image_size,
            batch_size=self.batch_size,
            teacher_weights=weights,
            storage=str(self.out / "results"),
            address=self.address,
        )
