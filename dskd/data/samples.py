"""One image and what is known of it, and the key by which images are split."""

import hashlib
from pathlib import Path
from typing import NamedTuple


class Sample(NamedTuple):
    """One image file and what is known of it."""

    path: Path
    defect: str
    """Name of the defect's folder; "good" for a normal image, whatever its data set calls it."""
    mask: Path | None
    mask_above: int = 127
    """A mask pixel above this grey level is a defect; 0 where masks hold small class numbers (VisA)."""

    @property
    def is_defective(self) -> bool:
        """Taken from the folder and never from the mask: published sets have defects with an empty mask."""
        return self.defect != "good"


def split_key(path: Path, seed: int) -> bytes:
    """A sort key that puts files in a random order; it depends on file name and seed alone, on every machine."""
    # the names of files need not be text
    return hashlib.sha256(f"{seed}/{path.name}".encode("utf-8", "surrogateescape")).digest()
