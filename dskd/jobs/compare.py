"""Compare two detectors on the same images: scores, verdicts that differ, time, and pictures side by side."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from dskd.detector import Detector, Prediction, Unreadable
from dskd.draw.verdict import to_webp
from dskd.predict import OVERLAYS_FOLDER, make_out, overlay_name

COMPARISON_FILE = "comparison.jsonl"
SUMMARY_FILE = "summary.json"


class ComparedImage(NamedTuple):
    """What both detectors say of one image."""

    first: Prediction | Unreadable
    second: Prediction | Unreadable

    @property
    def differs(self) -> bool:
        return self.first.verdict != self.second.verdict

    def to_dict(self, picture: str | None) -> dict[str, Any]:
        """Both predictions in the words of `Prediction.to_dict`, and where their picture lies."""
        return {
            "image": str(self.first.path),
            "differs": self.differs,
            "picture": picture,
            "a": self.first.to_dict(),
            "b": self.second.to_dict(),
        }


class Comparison(NamedTuple):
    """Two detectors on all images together."""

    num_images: int
    num_anomalous: tuple[int, int]
    num_unreadable: int
    num_only_first: int
    """Images that the first alone calls anomalous."""
    num_only_second: int
    seconds_per_image: tuple[float, float]
    """Reading, deciding and finding regions; pictures are not counted."""

    @property
    def num_different(self) -> int:
        return self.num_only_first + self.num_only_second


def compare_images(
    first: Detector,
    second: Detector,
    paths: Sequence[Path],
    out: Path,
    *,
    false_alarm_rate: float = 0.01,
    on_image: Callable[[ComparedImage], object] = lambda image: None,
) -> Comparison:
    """Inspect images with both detectors, each at its own threshold for `false_alarm_rate`, and write the folder `out`.

    A line of comparison.jsonl per image, and a picture of both verdicts where they differ. `on_image` is called after
    every image. Raises ValueError where `out` exists and on an impossible rate.
    """
    # Asked for before anything is written: an impossible rate is said at once.
    seen = [each.inspect(paths, false_alarm_rate=false_alarm_rate) for each in (first, second)]
    make_out(out)
    (out / OVERLAYS_FOLDER).mkdir()
    seconds, images = [0.0, 0.0], []
    with (out / COMPARISON_FILE).open("x", encoding="utf-8") as file:
        for index in range(len(paths)):
            found = []
            for number, verdicts in enumerate(seen):
                began = time.perf_counter()
                found.append(next(verdicts))
                seconds[number] += time.perf_counter() - began
            image = ComparedImage(*found)
            picture = None
            if image.differs and isinstance(image.first, Prediction) and isinstance(image.second, Prediction):
                picture = f"{OVERLAYS_FOLDER}/{overlay_name(index, image.first.path)}"
                (out / picture).write_bytes(to_webp(stacked(image.first.plot("A"), image.second.plot("B"))))
            file.write(json.dumps(image.to_dict(picture), allow_nan=False) + "\n")
            images.append((image.first.verdict, image.second.verdict))
            on_image(image)
    count = max(1, len(paths))
    comparison = Comparison(
        len(paths),
        (sum(one == "anomalous" for one, _ in images), sum(two == "anomalous" for _, two in images)),
        sum("unreadable" in pair for pair in images),
        sum(pair == ("anomalous", "good") for pair in images),
        sum(pair == ("good", "anomalous") for pair in images),
        (seconds[0] / count, seconds[1] / count),
    )
    document = {
        "schema": 1,
        **comparison._asdict(),
        **{name: _identity(each, false_alarm_rate) for name, each in (("a", first), ("b", second))},
    }
    (out / SUMMARY_FILE).write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    return comparison


def _identity(detector: Detector, false_alarm_rate: float) -> dict[str, Any]:
    limit = detector.threshold(false_alarm_rate)
    return detector.record.origin._asdict() | {"threshold": limit.value, "false_alarm_rate": limit.false_alarm_rate}


def stacked(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """Two pictures, one above the other."""
    both = Image.new("RGB", (max(upper.width, lower.width), upper.height + lower.height))
    both.paste(upper, (0, 0))
    both.paste(lower, (0, upper.height))
    return both


def describe_image(image: ComparedImage) -> str:
    """Both verdicts and scores, and the file, in one line; ≠ before an image on which they differ."""
    sides = [
        f"{each.verdict:10}  {each.score:10.4g}" if isinstance(each, Prediction) else f"{each.verdict:10}  {'':10}"
        for each in image[:2]
    ]
    return f"{'≠' if image.differs else ' '} {'  '.join(sides)}  {os.fspath(image.first.path)}"


def describe(comparison: Comparison) -> str:
    """The comparison in a sentence."""
    first, second = comparison.seconds_per_image
    unread = f", {comparison.num_unreadable} unreadable" if comparison.num_unreadable else ""
    return (
        f"{comparison.num_different} of {comparison.num_images} verdicts differ{unread}: "
        f"{comparison.num_only_first} anomalous for A alone, {comparison.num_only_second} for B alone; "
        f"A {1000 * first:.0f} ms an image, B {1000 * second:.0f} ms"
    )
