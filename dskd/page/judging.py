"""Verdicts on images that were sent, in batches: what one process and a replica of a cluster share."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dskd.checkpoint import DetectorRecord
from dskd.data.images import image_size, in_threads
from dskd.detector import UNTRAINED_TEACHER, Detector, Prediction, basis_of, predictions, unreadable_to_dict
from dskd.page.inspector import DEFAULT_RATE, Category, Photo, Question, Refusal
from dskd.page.panel import map_picture, shown_picture

BROWSERS_READ = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM")
"""How files begin that every browser shows by itself."""


def describe_category(record: DetectorRecord) -> Category:
    notes = [UNTRAINED_TEACHER] if record.is_untrained_teacher else []
    if basis := basis_of(record).strip(" ()"):
        notes.append(f"false-alarm rates are {basis}")
    return Category(
        record.category,
        record.detector_version,
        record.teacher,
        record.threshold(DEFAULT_RATE),
        record.thresholds,
        record.normal_scores,
        "; ".join(notes),
    )


def judge_photos(detector: Detector, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """The answer to each question, computed as one batch; of images in tiles one after the other.

    An image that cannot be read or judged has the verdict "unreadable", and `error` says why.
    """
    step = 1 if detector.geometry.tile else max(1, len(questions))
    return [row for start in range(0, len(questions), step) for row in _judged(detector, questions[start:][:step])]


def _judged(detector: Detector, questions: Sequence[Question]) -> list[dict[str, Any]]:
    origin, record = detector.record.origin, detector.record
    rows = []
    with TemporaryDirectory(prefix="dskd-") as temporary:
        paths = [_written(question.photo, Path(temporary, str(number))) for number, question in enumerate(questions)]
        loaded = in_threads(detector.load_image, paths)
        framed = [each for each in loaded if not isinstance(each, str)]
        found = iter(zip(framed, *detector.score_framed(framed), strict=True))
        for question, path, each in zip(questions, paths, loaded, strict=True):
            threshold, name = question.threshold, question.photo.name
            if threshold is None:
                threshold = record.threshold(question.false_alarm_rate).value
            error = each
            if not isinstance(each, str):
                image, heat, score = next(found)
                seen = next(
                    predictions(
                        [path], [image], [heat], [score], threshold, detector.geometry, origin, record.normal_scores
                    )
                )
                if isinstance(seen, Prediction):
                    rows.append(seen.to_dict() | {"image": name} | _pictures(question, seen))
                    continue
                error = seen.error
            # The message has the temporary file's name, which the sender does not know.
            said = str(error).replace(str(path), name)
            rows.append(unreadable_to_dict(origin, name, threshold, said) | {"map": None, "picture": None})
    return rows


def _written(photo: Photo, path: Path) -> Path:
    path.write_bytes(photo.content)
    return path


def _pictures(question: Question, seen: Prediction) -> dict[str, Any]:
    if not question.with_map:
        return {"map": None, "picture": None}
    is_shown = question.photo.content.startswith(BROWSERS_READ)
    return {"map": map_picture(seen), "picture": None if is_shown else shown_picture(seen)}


def check_photo(photo: Photo) -> None:
    """Raise `Refusal` if this is no image, by its header."""
    with TemporaryDirectory(prefix="dskd-") as temporary:
        path = _written(photo, Path(temporary, "0"))
        try:
            image_size(path)
        except ValueError as error:
            raise Refusal(422, str(error).replace(str(path), photo.name)) from None
