"""One image with its label and mask, and the key by which images are split."""

import hashlib
from pathlib import Path
from typing import NamedTuple


class Sample(NamedTuple):
    """One image file with its label and mask."""

    path: Path
    defect: str
    """Name of the defect's folder; "good" for a normal image, whatever its folder is called."""
    mask: Path | None
    mask_above: int = 127
    """A mask pixel above this grey level is a defect; 0 if masks hold small class numbers (VisA)."""

    @property
    def is_defective(self) -> bool:
        """By the folder, never by the mask: published data sets have defects with an empty mask."""
        return self.defect != "good"


def split_key(path: Path, seed: int) -> bytes:
    """A sort key that puts files in a random order; it depends only on file name and seed, on every machine."""
    # file names need not be valid text
    return hashlib.sha256(f"{seed}/{path.name}".encode("utf-8", "surrogateescape")).digest()
