"""The documents behind a search's report, as they are stored: every field with its unit, and a schema number.

`Inspected` is kept with each champion, `Report` for the whole search. A reader refuses documents of a newer schema;
fields that it does not know are passed over, so that fields may be added without a new number.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

SCHEMA = 1
SCORES_FILE = "scores.json"
"""Scores of a trial's validation images, beside the pictures of them."""

Light = Literal["ready", "more images", "no", "untested"]
"""ready: it may be used; more images: needs more good images; untested: no labelled test images."""


class ImageScore(msgspec.Struct, frozen=True, kw_only=True):
    """One image that a detector scored, and what is known of it."""

    file: str
    """Path below the category's folder, or of training images the file name."""
    defect: str
    """Name of the defect's folder; "good", "synthetic" for a copy with a drawn defect."""
    is_defective: bool
    """As it counts: false also for a defect that lies outside of the region of interest."""
    score: float
    """As the detector computes it; above the threshold it is anomalous."""


class ProPoint(msgspec.Struct, frozen=True, array_like=True):
    """The PRO curve at one threshold: what `dskd.metrics.pro_points` gives."""

    threshold: float
    fpr: float
    """Share of the normal pixels above the threshold."""
    pro: float
    """Mean, over the labelled defects' regions, of the share above the threshold."""


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """A panel of `dskd.draw.verdict`: the image, and beside it the image below its map."""

    file: str
    defect: str
    is_defective: bool
    score: float
    webp: str
    """Base64 text of a WebP file."""
    width: int
    height: int


class Inspected(msgspec.Struct, frozen=True, kw_only=True):
    """What a champion said of the images that it was measured on; nothing of it selects or tunes anything."""

    schema: int = SCHEMA
    category: str
    trial_id: str
    threshold: float
    """At which the pictures were drawn and the verdicts counted."""
    test: tuple[ImageScore, ...] = ()
    """Empty if there is no usable test split."""
    validation: tuple[ImageScore, ...] = ()
    """Held-out good images, and their copies with synthetic defects, of the fold that chose."""
    pro: tuple[ProPoint, ...] = ()
    """Of the test images, by falling threshold; empty without masks."""
    weakest_defects: tuple[Picture, ...] = ()
    """Defective test images with the lowest scores, lowest first."""
    strongest_good: tuple[Picture, ...] = ()
    """Good test images with the highest scores, highest first."""
    suspects: tuple[Picture, ...] = ()
    """Good training images with the highest scores, which detectors gave that did not see them; highest first."""


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """A champion's threshold and what vouches for it."""

    value: float
    false_alarm_rate: float
    """Share of new good images above it, at most."""
    num_normals: int
    """Good images that it rests on."""
    is_proven: bool
    """False: the rate is expected and not proven."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One trial of the search."""

    number: int
    """Counted from 0, in the order of their beginning."""
    state: Literal["finished", "pruned", "failed", "running"]
    objective: float | None
    """Validation objective on the fold that chooses; of a pruned trial the last one before it was stopped."""
    is_untuned: bool
    """Whether it is a preset, unchanged."""
    params: dict[str, bool | int | float | str | None]
    """Values that the search suggested."""
    seconds: float | None = None


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """A command line that can be pasted into a shell, and what it does."""

    what: str
    command: str


class Fact(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a table."""

    name: str
    value: str


class CategoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """One category of the search."""

    name: str
    light: Light
    sentence: str
    """The outcome for somebody who decides, in one sentence."""
    reason: str
    """Why this light, and what to do."""
    error: str = ""
    """Why there is no champion; empty if there is one."""
    decision: str = ""
    """Why this champion, in one sentence."""
    changes: str = ""
    """How its configuration differs from the closest preset."""
    limit: Limit | None = None
    figures: dict[str, float] = {}
    """`val/…`, `test/…` and `gain/…` figures as the storage and MLflow have them."""
    normal_scores: tuple[float, ...] = ()
    """Of the held-out good images that the threshold rests on, each by a detector that did not see it."""
    seconds: float | None = None
    """Since its first trial began, in the command that wrote this; None if none ran in it."""
    trials: tuple[Trial, ...] = ()
    importance: dict[str, float] = {}
    """Share of each varied parameter in the objective's variance, greatest first; empty: see `importance_note`."""
    importance_note: str = ""
    inspected: Inspected | None = None
    """None if an earlier version evaluated the champion."""
    trust: tuple[Fact, ...] = ()
    """Hashes, versions and origin of this champion."""
    link: str = ""
    """Page of the champion's run in MLflow; empty if MLflow has no web page."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A whole search."""

    schema: int = SCHEMA
    name: str
    written: str
    """ISO 8601, UTC."""
    data: str
    seconds: float
    """Of the command that wrote this, from its start."""
    trial_seconds: float
    """Summed over all trials, of earlier commands too."""
    caveats: tuple[str, ...]
    """What limits the figures, most serious first."""
    objective: str
    """What the validation objective is."""
    categories: tuple[CategoryReport, ...]
    settings: tuple[Fact, ...] = ()
    trust: tuple[Fact, ...] = ()
    commands: tuple[Command, ...] = ()


class _Versioned(msgspec.Struct):
    schema: Annotated[int, msgspec.Meta(ge=1)]


def read_report(text: str | bytes) -> Report:
    """The report in a JSON text.

    Raises ValueError, in a sentence, on what is none or of a newer schema.
    """
    try:
        schema = msgspec.json.decode(text, type=_Versioned).schema
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected the report of a search as JSON, with its schema: {error}.") from None
    if schema > SCHEMA:
        raise ValueError(f"the report has schema {schema}, this version reads up to {SCHEMA}: install a newer one.")
    try:
        return msgspec.json.decode(text, type=Report)
    except msgspec.DecodeError as error:
        raise ValueError(f"the report does not fit schema {schema}: {error}.") from None


def read_inspected(document: Mapping[str, Any]) -> Inspected:
    """A parsed `Inspected`; ValueError on what is none, or of a newer schema."""
    try:
        found = msgspec.convert(document, Inspected)
    except msgspec.ValidationError as error:
        raise ValueError(f"these are no scores of a champion's images: {error}.") from None
    if found.schema > SCHEMA:
        raise ValueError(f"the scores of {found.category} have schema {found.schema}, this version reads {SCHEMA}.")
    return found


class _Scores(msgspec.Struct):
    """The file `SCORES_FILE`."""

    images: tuple[ImageScore, ...]
    schema: int = SCHEMA


def scores_json(images: Sequence[ImageScore]) -> bytes:
    """The text of `SCORES_FILE`."""
    return msgspec.json.encode(_Scores(tuple(images)))


def read_scores(document: Mapping[str, Any] | None) -> tuple[ImageScore, ...]:
    """The images in a parsed `SCORES_FILE`; none of trials of older versions, which have no such file."""
    return msgspec.convert(document, _Scores).images if document else ()


def to_json(document: Report | Inspected) -> bytes:
    """The document as JSON, in UTF-8."""
    return msgspec.json.encode(document)
