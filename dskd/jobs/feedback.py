"""Images that people judged after the training: kept in quarantine, then added to a detector's evidence.

A detector's folder holds them below `feedback/`: `quarantine/` (what the page took, until someone approves it),
`good/` and `defect/` (accepted), and `log.jsonl` (which image came when from where, and what it changed). Nothing is
trained: good images recalibrate the thresholds, defects tell how many of them are found.
"""

import dataclasses
import datetime
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from PIL import Image, UnidentifiedImageError

from dskd.atomic import file_in_making
from dskd.calibration import Threshold, calibrate
from dskd.checkpoint import FEEDBACK_FOLDER, DetectorRecord, rewrite_record
from dskd.data.datasets import find_categories, read_category
from dskd.data.files import walk
from dskd.detector import Detector, Unreadable

Judged = Literal["good", "defect"]
MAX_ENTRIES, MAX_BYTES = 2000, 4 * 2**30
"""A quarantine takes no more than these, so that whoever may send images cannot fill the disk."""
LOG_FILE = "log.jsonl"
_RATE = 0.01
_HIGHEST = 1e30


class QuarantineFullError(Exception):
    """The message says what to do."""


class Entry(NamedTuple):
    """A judged image."""

    path: Path
    judged: Judged
    name: str
    """What its sender called it, or where it was read."""
    sha256: str
    source: str
    """page or files."""


def judged_note(content: bytes, judged: Judged, name: str, detector_version: str) -> dict[str, Any]:
    """What is noted beside a judged image, `file`."""
    sha256 = hashlib.sha256(content).hexdigest()
    return {
        "sha256": sha256,
        "judged": judged,
        "name": name,
        "file": f"{sha256[:16]}{_suffix(content)}",
        "detector_version": detector_version,
        "time": _now(),
    }


class Quarantine(NamedTuple):
    """Judged images that nobody has approved yet: for each its bytes, and a note beside them."""

    folder: Path

    @classmethod
    def of(cls, detector: Path) -> Self:
        return cls(detector / FEEDBACK_FOLDER / "quarantine")

    def keep(self, content: bytes, judged: Judged, name: str, detector_version: str) -> dict[str, Any]:
        """Take an image; one that is there already gets the new judgement. Returns its note.

        Raises QuarantineFullError.
        """
        note = judged_note(content, judged, name, detector_version)
        path = self.folder / str(note["file"])
        if not path.exists():
            sizes = [each.stat().st_size for each in self.folder.glob("*")] if self.folder.is_dir() else []
            if len(sizes) >= 2 * MAX_ENTRIES or sum(sizes) + len(content) > MAX_BYTES:
                raise QuarantineFullError(
                    "The quarantine of judged images is full; someone has to look at it (dskd feedback --approve)."
                )
            with file_in_making(path) as partial:
                partial.write_bytes(content)
        with file_in_making(path.with_suffix(".json")) as partial:
            partial.write_text(json.dumps(note, indent=2) + "\n")
        return note

    def entries(self) -> Iterator[Entry]:
        """What lies there, in order of names; raises ValueError on a note that is damaged or leads elsewhere."""
        for path in sorted(self.folder.glob("*.json")):
            try:
                note = json.loads(path.read_text())
                file, judged, name, sha256 = (str(note[key]) for key in ("file", "judged", "name", "sha256"))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is damaged ({error!r}); remove it and its image.") from None
            if judged not in ("good", "defect") or Path(file).name != file or not (self.folder / file).is_file():
                raise ValueError(f"{path} names no judged image beside it; remove it.")
            yield Entry(self.folder / file, judged, name, sha256, "page")  # type: ignore[arg-type]


def entries_of(paths: Sequence[Path], judged: Judged) -> list[Entry]:
    """Image files that a person has judged."""
    return [Entry(path, judged, str(path), hashlib.sha256(path.read_bytes()).hexdigest(), "files") for path in paths]


class Feedback(NamedTuple):
    """What judged images did to a detector."""

    num_added: int
    num_known: int
    """Images that were accepted before with the same judgement."""
    num_good: int
    """Accepted so far."""
    num_defective: int
    num_false_alarms: int
    """Of the good ones, those above the threshold that held before."""
    num_missed: int
    """Of the defects, those not above the threshold that holds now."""
    before: Threshold
    after: Threshold
    version_before: str
    version_after: str

    def describe(self) -> str:
        said = (
            f"{self.num_added} images added, {self.num_known} known before; threshold {self.before.value:.4g} at "
            f"{self.before.false_alarm_rate:.1%} false alarms → {self.after.value:.4g} at "
            f"{self.after.false_alarm_rate:.1%}; {self.num_false_alarms} of {self.num_good} good ones lay above before"
        )
        if self.num_defective:
            said += f"; {self.num_missed} of {self.num_defective} defects are missed now"
        return f"{said}; detector {self.version_before} → {self.version_after}"


def accept(detector: Detector, folder: Path, entries: Sequence[Entry]) -> Feedback:
    """Add judged images to the detector in `folder`, and recalibrate its thresholds with all good ones so far.

    An image that was accepted with the other judgement changes sides. All accepted images are scored anew by the
    detector as it is. Parts that several images show keep their thresholds. Raises ValueError, and changes nothing,
    if an image cannot be read, is given as good and as a defect, or if the detector keeps no scores of good images.
    """
    record = detector.record
    if not record.normal_scores:
        raise ValueError(
            "this older detector keeps no scores of its good images, so that none can be added; train it again."
        )
    _check_one_judgement(entries)
    before = record.threshold(_RATE)
    _scores(detector, [entry.path for entry in entries])  # all or none
    store = folder / FEEDBACK_FOLDER
    added = [entry for entry in entries if _place(store, entry, entry.judged) is None]
    for entry in added:
        _move_in(store, entry)
    accepted = {judged: accepted_images(folder, judged) for judged in ("good", "defect")}
    scores = {judged: _scores(detector, paths) for judged, paths in accepted.items()}
    changed = _recalibrated(record, [path.name for path in accepted["good"]], scores["good"])
    after = changed.threshold(_RATE)
    num_missed = sum(score <= after.value for score in scores["defect"])
    changed = dataclasses.replace(
        changed,
        metrics={
            **record.metrics,
            "feedback/num_good": float(len(scores["good"])),
            "feedback/num_defective": float(len(scores["defect"])),
            "feedback/num_missed": float(num_missed),
        },
    )
    version = rewrite_record(folder, changed)
    _write_log(store, added, record.detector_version, version)
    return Feedback(
        len(added),
        len(entries) - len(added),
        len(scores["good"]),
        len(scores["defect"]),
        sum(score > before.value for score in scores["good"]),
        num_missed,
        before,
        after,
        record.detector_version,
        version,
    )


def accepted_images(folder: Path, judged: str) -> list[Path]:
    """The accepted images of a detector's folder."""
    place = folder / FEEDBACK_FOLDER / judged
    return list(walk(place).images) if place.is_dir() else []


def clear(quarantine: Quarantine, entries: Sequence[Entry]) -> None:
    """Take what was approved or refused out of quarantine."""
    for entry in entries:
        entry.path.with_suffix(".json").unlink(missing_ok=True)
        entry.path.unlink(missing_ok=True)


def copy_into_data(folder: Path, data: Path, category: str) -> int:
    """Copy the accepted images to where the next training finds them; returns how many were new there.

    Good ones go beside the training images, defects into `validation/feedback`. Raises ValueError if there is no such
    category, or its layout has no place for them.
    """
    home = find_categories(data).get(category)
    if home is None:
        raise ValueError(f"there is no category {category!r} in {data}; --data takes the folder of a search.")
    train = read_category(data, category).train[0].path.parent
    if not train.is_relative_to(home) or not {"good", "ok", "normal"} & {train.name.lower()}:
        raise ValueError(
            f"{home} has a layout without a folder of good images; copy those of {folder / FEEDBACK_FOLDER} by hand."
        )
    count = 0
    for judged, place in (("good", train), ("defect", home / "validation" / "feedback")):
        for path in accepted_images(folder, judged):
            target = place / f"feedback-{path.name}"
            if not target.exists():
                with file_in_making(target) as partial:
                    partial.write_bytes(path.read_bytes())
                count += 1
    return count


def _check_one_judgement(entries: Sequence[Entry]) -> None:
    seen: dict[str, Entry] = {}
    for entry in entries:
        other = seen.setdefault(entry.sha256, entry)
        if other.judged != entry.judged:
            raise ValueError(f"{entry.name} and {other.name} are the same image, given as good and as a defect.")


def _scores(detector: Detector, paths: Sequence[Path]) -> list[float]:
    scores = []
    for seen in detector.inspect(paths, _HIGHEST):
        if isinstance(seen, Unreadable):
            raise ValueError(f"{seen.error} Nothing was changed.")
        scores.append(seen.score)
    return scores


def _recalibrated(record: DetectorRecord, names: Sequence[str], scores: Sequence[float]) -> DetectorRecord:
    """The record with these good images in place of those that feedback brought before."""
    first = len(record.normal_scores) - record.num_feedback
    normal_scores = (*record.normal_scores[:first], *scores)
    return dataclasses.replace(
        record,
        calibration_files=(*record.calibration_files[:first], *(f"{FEEDBACK_FOLDER}/good/{name}" for name in names)),
        normal_scores=normal_scores,
        thresholds=calibrate(normal_scores),
        num_feedback=len(scores),
    )


def _place(store: Path, entry: Entry, judged: str) -> Path | None:
    return next((store / judged).glob(f"{entry.sha256[:16]}.*"), None)


def _move_in(store: Path, entry: Entry) -> None:
    content = entry.path.read_bytes()
    with file_in_making(store / entry.judged / f"{entry.sha256[:16]}{_suffix(content)}") as partial:
        partial.write_bytes(content)
    other = "defect" if entry.judged == "good" else "good"
    if (old := _place(store, entry, other)) is not None:
        old.unlink()


def _write_log(store: Path, added: Sequence[Entry], before: str, after: str) -> None:
    store.mkdir(exist_ok=True)
    with (store / LOG_FILE).open("a", encoding="utf-8") as file:
        for entry in added:
            line = {**entry._asdict(), "time": _now(), "version_before": before, "version_after": after}
            del line["path"]
            file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _suffix(content: bytes) -> str:
    """Of an image's file, by its content; .tif for what Pillow does not know, which are deep TIFFs."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2", "PPM": ".ppm"}.get(
                str(image.format), f".{str(image.format).lower()}"
            )
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return ".tif"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
