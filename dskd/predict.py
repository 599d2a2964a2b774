"""Inspect image files with a finished detector, and write verdicts and overlays into a folder."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dskd.atomic import check_can_be_made
from dskd.calibration import Drift, discovery_threshold, drift_of
from dskd.checkpoint import DetectorRecord
from dskd.config import DataConfig
from dskd.data.files import IMAGE_SUFFIXES, Walk, count_unread, walk
from dskd.data.parts import worst_scores
from dskd.detector import Detector, Prediction, Unreadable, basis_of, chosen_limit, rates_of
from dskd.draw.verdict import OVERLAY_SUFFIX, to_webp

PREDICTIONS_FILE = "predictions.jsonl"
OVERLAYS_FOLDER = "overlays"
PARTS_FILE = "parts.jsonl"
SUMMARY_FILE = "summary.json"
Overlays = Literal["all", "anomalous", "none"]
_MAX_DRAWING = 8
"""Overlays that are drawn, or wait for it, while the inspection goes on."""
_HIGHEST = float(np.finfo(np.float32).max)
"""A threshold that no score exceeds."""
_MAX_NAME_BYTES = 200
"""Of an overlay's name: file systems allow 255, and an image's own name may take them all."""


class PredictionSummary(NamedTuple):
    """What was found in all images together."""

    num_anomalous: int
    num_unreadable: int
    num_clipped: int
    """Images with values beyond the scale of images of more than 8 bits."""
    note: str
    """Where the threshold comes from."""
    predictions: list[dict[str, Any]]
    """The lines of `predictions.jsonl`, in the order of the images."""
    parts: Sequence[dict[str, Any]] = ()
    """The lines of `parts.jsonl`, if the detector knows parts that several images show."""
    rates: Mapping[str, float | None] = {}
    """`requested_rate`, `expected_rate` and `guaranteed_rate` of false alarms, and `false_discovery_rate`; None where
    another was asked for, or none is proven."""
    drift: Drift | None = None
    """Whether the images called good still look like those behind the thresholds; None where there are too few."""

    def describe(self) -> str:
        found = f"{self.num_anomalous} of {len(self.predictions)} anomalous"
        if self.num_unreadable:
            found += f", {self.num_unreadable} unreadable"
        if self.num_clipped:
            found += f", {self.num_clipped} with clipped values"
        if self.parts:
            found += f"; {sum(part['verdict'] == 'anomalous' for part in self.parts)} of {len(self.parts)} parts"
        return f"{found}; {self.note}"


def predict_images(
    detector: Detector,
    paths: Sequence[Path],
    out: Path,
    *,
    false_alarm_rate: float = 0.01,
    threshold: float | None = None,
    false_discovery_rate: float | None = None,
    group_by: str = "",
    overlays: Overlays = "all",
    on_prediction: Callable[[Prediction | Unreadable], object] = lambda prediction: None,
) -> PredictionSummary:
    """Inspect images and write `out`: a line of predictions.jsonl per image, as it comes, and an overlay per image.

    `overlays` may leave them out, or draw those of anomalous images alone.

    An image that cannot be read has a line that says why. What was written stays when the inspection is cut short;
    summary.json, which comes last, tells that all images were seen. The threshold is the detector's for
    `false_alarm_rate` in (0, 1), unless `threshold` is given. A detector that was trained with `group_by` also says
    something of each part, in parts.jsonl; `group_by` here finds parts in these images' paths in another way than in
    training. With `false_discovery_rate` the threshold is that of all these images together, which are inspected twice:
    of those called anomalous at most that share is good in expectation. `on_prediction` is called after every image.
    Raises ValueError where `out` exists, also when another inspection makes it at the same time, and on an impossible
    rate or threshold.
    """
    record = detector.record
    check_discovery_rate(record, false_discovery_rate, threshold)
    limit, note = chosen_limit(detector, false_alarm_rate, threshold)
    rates = rates_of(record, false_alarm_rate, threshold)
    if group_by:
        DataConfig(group_by=group_by)  # refuses what is no regular expression
        detector.part_threshold(false_alarm_rate)
    make_out(out)
    if false_discovery_rate is not None:
        seen_once = detector.inspect(paths, _HIGHEST)
        scores = [(str(each.path), each.score) for each in seen_once if isinstance(each, Prediction)]
        found = [score for _, score in scores]
        limit, num_found = discovery_threshold(record.normal_scores, found, false_discovery_rate)
        note = f"threshold {limit:.4g} for at most {false_discovery_rate:.1%} good images among the anomalous"
        note += basis_of(record) if num_found else ": none is rare enough to be called so"
        rates = {"requested_rate": None, "expected_rate": None, "guaranteed_rate": None}
        if record.normal_part_scores:
            pattern = group_by or record.config.data.group_by
            worst = worst_scores([Path(path) for path, _ in scores], found, pattern)
            threshold = discovery_threshold(record.normal_part_scores, worst, false_discovery_rate)[0]
    rates = {**rates, "false_discovery_rate": false_discovery_rate}
    (out / OVERLAYS_FOLDER).mkdir()
    lines: list[dict[str, Any]] = []
    num_clipped = 0
    with (out / PREDICTIONS_FILE).open("x", encoding="utf-8") as file:
        for seen, picture in _drawn(detector.inspect(paths, limit), out, overlays):
            line = seen.to_dict() if isinstance(seen, Unreadable) else seen.to_dict(overlay=picture)
            num_clipped += not isinstance(seen, Unreadable) and seen.num_clipped > 0
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()  # a process that is killed loses nothing of it
            lines.append(line)
            on_prediction(seen)
    parts: list[dict[str, Any]] = []
    if detector.record.part_thresholds:
        seen_images = ((line["image"], line["score"]) for line in lines)
        verdicts = detector.judge_parts(seen_images, false_alarm_rate, group_by=group_by, threshold=threshold)
        parts = [verdict.to_dict() for verdict in verdicts]
        (out / PARTS_FILE).write_text("".join(json.dumps(part, allow_nan=False) + "\n" for part in parts))
    summary = PredictionSummary(
        sum(line["verdict"] == "anomalous" for line in lines),
        sum(line["verdict"] == "unreadable" for line in lines),
        num_clipped,
        note,
        lines,
        parts,
        rates,
        drift_of(record.normal_scores, [line["score"] for line in lines if line["score"] is not None], limit),
    )
    document = {"schema": 1, "num_images": len(lines), **summary._asdict(), "threshold": limit}
    document |= document.pop("rates")
    document["drift"] = summary.drift.to_dict() if summary.drift else None
    document.pop("predictions")
    if document.pop("parts"):
        document |= {
            "num_parts": len(parts),
            "num_anomalous_parts": sum(part["verdict"] == "anomalous" for part in parts),
            "part_threshold": parts[0]["threshold"],
        }
    (out / SUMMARY_FILE).write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    return summary


def _drawn(
    predictions: Iterator[Prediction | Unreadable], out: Path, overlays: Overlays
) -> Iterator[tuple[Prediction | Unreadable, str | None]]:
    """Each prediction with the name of its overlay, which is drawn while the next images are inspected."""
    drawing: deque[tuple[Prediction | Unreadable, str | None, Future[None] | None]] = deque()

    def first() -> tuple[Prediction | Unreadable, str | None]:
        seen, name, future = drawing.popleft()
        if future is not None:
            future.result()
        return seen, name

    pool = ThreadPoolExecutor(1)
    try:
        for index, seen in enumerate(predictions):
            is_wanted = overlays == "all" or (overlays == "anomalous" and seen.verdict == "anomalous")
            if isinstance(seen, Unreadable) or not is_wanted:
                drawing.append((seen, None, None))
            else:
                name = f"{OVERLAYS_FOLDER}/{overlay_name(index, seen.path)}"
                drawing.append((seen, name, pool.submit(_save_overlay, seen, out / name)))
            if len(drawing) > _MAX_DRAWING:
                yield first()
        while drawing:
            yield first()
    finally:
        pool.shutdown(cancel_futures=True)


def _save_overlay(seen: Prediction, path: Path) -> None:
    path.write_bytes(to_webp(seen.plot()))


def check_discovery_rate(record: DetectorRecord, false_discovery_rate: float | None, threshold: float | None) -> None:
    """Raise ValueError on an impossible rate, beside a threshold, and of detectors without scores of good images."""
    if false_discovery_rate is None:
        return
    if not 0 < false_discovery_rate < 1:
        raise ValueError(f"--fdr must lie in (0, 1), got {false_discovery_rate}.")
    if threshold is not None:
        raise ValueError(f"--fdr finds its own threshold; leave --threshold {threshold:g} out.")
    if not record.normal_scores:
        raise ValueError("--fdr needs the scores of good images, which this older detector lacks; train it again.")


def overlay_name(index: int, path: Path) -> str:
    """File name of an image's picture: its number, folder and name."""
    name = os.fsencode(f"{index:05d}_{path.parent.name}_{path.stem}")[:_MAX_NAME_BYTES]
    return f"{name.decode('utf-8', 'ignore')}{OVERLAY_SUFFIX}"


def check_out(out: Path) -> None:
    """Raise ValueError where `out` exists or cannot be made: ask before the detector is loaded."""
    if out.exists() or out.is_symlink():
        raise _exists(out)
    check_can_be_made(out, "--out")


def make_out(out: Path) -> None:
    """Make the folder `out`; of two inspections that do so at once, the second gets the ValueError."""
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        out.mkdir()
    except FileExistsError:
        raise _exists(out) from None


def _exists(out: Path) -> ValueError:
    return ValueError(f"{out} exists; choose another --out, results are never overwritten.")


def describe_prediction(prediction: Prediction | Unreadable) -> str:
    """Verdict, score and file in one line."""
    if isinstance(prediction, Unreadable):
        return f"{prediction.verdict:10}  {'':10}  {prediction.path}"
    return f"{prediction.verdict:10}  {prediction.score:10.4g}  {prediction.path}"


def find_images(paths: Sequence[Path]) -> Walk:
    """The image files among `paths`, and in folders and all their subfolders, in order; and what is not read there.

    A file that is named is taken whatever its name, also a link that leads nowhere, which is then unreadable. Raises
    ValueError where there is no image, and on a path that does not exist.
    """
    found: list[Walk] = []
    for path in paths:
        if path.is_dir():
            walked = walk(path)
            if not walked.images:
                raise ValueError(f"{path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
            found.append(walked)
        elif os.path.lexists(path):
            found.append(Walk((path,), {}, {}, ()))
        else:
            raise ValueError(f"image {path} does not exist.")
    if not found:
        raise ValueError("no image given; name image files or folders after the detector.")
    return count_unread(found)
