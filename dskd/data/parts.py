"""Which images show one part, and one verdict per part: the worst view decides."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dskd.data.samples import Sample


class PartVerdict(NamedTuple):
    """What is said of one part."""

    part: str
    verdict: Literal["good", "anomalous", "unreadable"]
    """anomalous if a view is; unreadable if none is and a view cannot be read, so that a defect may be there."""
    score: float | None
    """Highest score of its views; None if none can be read."""
    threshold: float
    """Of parts: more views have a higher score by chance than one."""
    image: str
    """The view that decides: that of the highest score, or the first one that cannot be read."""
    num_images: int
    num_unreadable: int

    def to_dict(self) -> dict[str, Any]:
        return self._asdict()


def part_name(image: str, pattern: str) -> str:
    """The part that an image shows: what the groups of the regular expression match in its path, joined by `/`.

    Only the file's name and the two folders above it count. Without a group it is all that matches. An image whose
    path does not match is a part of its own, named by its path.

    >>> part_name("lot7/A12_cam1.png", r"([^/]+)_cam\\d"), part_name("cam2/A12.png", r"cam\\d/(\\w+)")
    ('A12', 'A12')
    """
    found = re.search(pattern, "/".join(image.split("/")[-3:]))
    if found is None:
        return image
    return "/".join(text or "" for text in found.groups()) or found[0]


def part_of(sample: Sample, pattern: str) -> str:
    """The part of a sample; without a pattern every image is a part of its own."""
    return part_name(sample.path.as_posix(), pattern) if pattern else sample.path.as_posix()


def worst_scores(paths: Iterable[Path], scores: Iterable[float], pattern: str) -> list[float]:
    """The highest score of each part's images."""
    worst: dict[str, float] = {}
    for path, score in zip(paths, scores, strict=True):
        name = part_name(path.as_posix(), pattern)
        worst[name] = max(worst.get(name, score), score)
    return list(worst.values())


def judge_parts(images: Iterable[tuple[str, float | None]], pattern: str, threshold: float) -> list[PartVerdict]:
    """A verdict per part from its images and their scores, None where an image has none; in order of appearance."""
    views: dict[str, list[tuple[str, float | None]]] = {}
    for image, score in images:
        views.setdefault(part_name(image, pattern), []).append((image, score))
    verdicts = []
    for part, seen in views.items():
        read = [(score, image) for image, score in seen if score is not None]
        unread = [image for image, score in seen if score is None]
        score, image = max(read, key=lambda view: view[0]) if read else (None, unread[0])
        verdict: Literal["good", "anomalous", "unreadable"] = "good"
        if score is not None and score > threshold:
            verdict = "anomalous"
        elif unread:
            verdict, image = "unreadable", unread[0]
        verdicts.append(PartVerdict(part, verdict, score, threshold, image, len(seen), len(unread)))
    return verdicts
