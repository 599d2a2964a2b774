"""Where a category's region of interest is told: in words, in a mask, or in a file of its folder."""

from pathlib import Path

from dskd.data.files import REGION_FILES
from dskd.data.geometry import RegionOfInterest, box_or_polygon, region_of_mask
from dskd.data.images import image_size, read_mask


def find_region(text: str, folder: Path, image: Path) -> RegionOfInterest | None:
    """The region of interest that `text` (`DataSpec.region`) or a file in the category's folder tells; None: all.

    A box or a polygon is in pixels of `image`, one of the category's. Raises ValueError on a region that cannot be
    read, is empty, or is not within the image.
    """
    named = Path(text) if text else None
    if not text:
        there = [folder / name for name in REGION_FILES if (folder / name).is_file()]
        if len(there) > 1:
            raise ValueError(f"{folder} holds {' and '.join(REGION_FILES)}; keep one of them.")
        if not there:
            return None
        named = there[0]
    assert named is not None
    if named.suffix == ".txt" and named.is_file():
        text = named.read_text(encoding="utf-8").strip()
    elif named.is_file():
        try:
            return region_of_mask(read_mask(named))
        except ValueError as error:
            raise ValueError(f"--region {named}: {error}") from None
    return box_or_polygon(text, image_size(image))
