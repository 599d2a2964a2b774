"""What the page asks of those who judge: one process with its detectors, or a cluster of them."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from dskd.calibration import Threshold

Judged = Literal["good", "defect"]
"""What a person says of an image."""


class Refusal(Exception):
    """A request that is not answered: a status of 4xx or 503, one sentence, and more of them where there are several.

    `details` has a sentence for each image of the request, in order, or nothing.
    """

    def __init__(self, status: int, sentence: str, details: Sequence[str] = ()) -> None:
        super().__init__(status, sentence, details)  # all three, which pickle passes on
        self.status, self.sentence, self.details = status, sentence, details


class Category(NamedTuple):
    """What the page shows of a category before any image of it is seen."""

    name: str
    detector_version: str
    teacher: str
    threshold: Threshold
    """Of `DEFAULT_RATE`, or of the lowest rate that the good images vouch for."""
    thresholds: tuple[Threshold, ...]
    """The stored ones, loosest first."""
    normal_scores: tuple[float, ...]
    """Of good images; none of older detectors."""
    note: str = ""
    """Why its verdicts or rates have to be taken with care; empty if they have not."""


class Photo(NamedTuple):
    """An image as it was sent."""

    name: str
    """What the sender calls it: to be shown, never to be opened."""
    content: bytes


class Question(NamedTuple):
    """One image to be judged."""

    category: str
    photo: Photo
    false_alarm_rate: float
    threshold: float | None = None
    """Taken as it is, instead of the one for the rate."""
    with_map: bool = False


class Inspector(Protocol):
    """All that the page needs. Each method raises `Refusal` where it cannot answer."""

    async def categories(self) -> Sequence[Category]: ...

    async def inspect(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """For each image the fields of `Prediction.to_dict`, and `map` (`dskd.page.panel`), None unless asked for."""
        ...

    async def keep_feedback(self, category: str, photo: Photo, judged: Judged) -> dict[str, Any]:
        """Put an image that a person has judged into quarantine; says where."""
        ...


DEFAULT_RATE = 0.01


def unknown_category(name: str, known: Sequence[str]) -> Refusal:
    return Refusal(404, f"There is no category {name!r}; there are: {', '.join(sorted(known)) or 'none yet'}.")
