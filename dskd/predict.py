"""Inspect image files with a finished detector, and write verdicts and overlays into a folder."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dskd.atomic import folder_in_making
from dskd.data.files import IMAGE_SUFFIXES
from dskd.detector import UNTRAINED_TEACHER, Detector, Prediction, chosen_limit
from dskd.show.overlays import overlay

PREDICTIONS_FILE = "predictions.jsonl"
OVERLAYS_FOLDER = "overlays"


class PredictionSummary(NamedTuple):
    """What was found in all images together."""

    num_anomalous: int
    note: str
    """Where the threshold comes from."""
    predictions: list[dict[str, Any]]
    """The lines of `predictions.jsonl`, in the order of the images."""

    def describe(self) -> str:
        return f"{self.num_anomalous} of {len(self.predictions)} anomalous; {self.note}"


def predict_images(
    detector: Detector,
    paths: Sequence[Path],
    out: Path,
    *,
    false_alarm_rate: float = 0.01,
    threshold: float | None = None,
    on_prediction: Callable[[Prediction], object] = lambda prediction: None,
) -> PredictionSummary:
    """Inspect images and write `out`: predictions.jsonl and an overlay per image; it appears complete, or not at all.

    The threshold is the detector's for `false_alarm_rate` in (0, 1), unless `threshold` is given.
    `on_prediction` is called after every image. Raises ValueError where `out` exists, on an impossible rate and on a
    file that is no readable image.
    """
    check_out(out)
    limit, note = chosen_limit(detector, false_alarm_rate, threshold)
    caption = UNTRAINED_TEACHER if detector.record.is_untrained_teacher else ""
    lines: list[dict[str, Any]] = []
    with folder_in_making(out) as folder:
        (folder / OVERLAYS_FOLDER).mkdir()
        for index, seen in enumerate(detector.predict(paths, limit)):
            picture = f"{OVERLAYS_FOLDER}/{index:05d}_{seen.path.parent.name}_{seen.path.stem}.png"
            overlay(seen, caption).save(folder / picture)
            lines.append(seen.to_dict(detector.record, overlay=picture))
            on_prediction(seen)
        (folder / PREDICTIONS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    num_anomalous = sum(line["verdict"] == "anomalous" for line in lines)
    return PredictionSummary(num_anomalous, note, lines)


def check_out(out: Path) -> None:
    """Raise ValueError where `out` exists: ask before the detector is loaded."""
    if out.exists():
        raise ValueError(f"{out} exists; choose another --out, results are never overwritten.")


def describe_prediction(prediction: Prediction) -> str:
    """Verdict, score and file in one line."""
    return f"{prediction.verdict:9}  {prediction.score:10.4g}  {prediction.path}"


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The image files among `paths`, and in folders and all their subfolders, in order.

    Raises ValueError where there is none, and on a path that does not exist.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise ValueError(f"{path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"image {path} does not exist.")
    if not files:
        raise ValueError("no image given; name image files or folders after the detector.")
    return files
