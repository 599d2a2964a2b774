"""What the commands print: reports, figures and verdicts as text or as JSON."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dskd.calibration import images_for, lowest_rate
from dskd.data.datasets import num_held_out
from dskd.show.lines import fitted, line_width
from dskd.show.times import duration

if TYPE_CHECKING:
    from dskd.checkpoint import DetectorRecord
    from dskd.config import DataConfig, RunConfig
    from dskd.data.check import Report
    from dskd.evaluate import Evaluation
    from dskd.training.run import IntervalResult

_MANY_NOTES = 5  # of one kind in one folder; more are only counted


def interval_document(progress: "IntervalResult") -> dict[str, float | None]:
    figures = progress.interval._asdict()
    del figures["number"]
    return {
        "step": figures.pop("step"),
        **figures,
        "val/objective": progress.objective,
        **{f"val/{name}": value if math.isfinite(value) else None for name, value in progress.scores._asdict().items()},
    }


def describe_thresholds(record: "DetectorRecord") -> str:
    from dskd.detector import basis_of

    said = ", ".join(f"threshold {t.value:.4g} at {t.false_alarm_rate:.1%} false alarms" for t in record.thresholds)
    return said + basis_of(record)


def training_document(report: "Report", config: "RunConfig", seconds_per_step: float | None) -> dict[str, Any]:
    """Length of a training of each category, and its time where a step was measured."""
    train = config.train
    found: dict[str, Any] = {"batch_size": train.batch_size, "seconds_per_step": seconds_per_step, "categories": {}}
    for category in report.categories:
        if num_images := category.num_training_images(config.data.validation_fraction):
            steps, batch = train.num_steps(num_images), min(train.batch_size, num_images)
            seconds = None if seconds_per_step is None else seconds_per_step * steps * batch / train.batch_size
            found["categories"][category.name] = {
                "images": num_images,
                "steps": steps,
                "times_each_image_is_seen": steps * batch / num_images,
                "seconds": seconds,
                "false_alarms": vouched_rates(
                    category.counts["train"].get("good", 0), category.counts["validation"].get("good", 0), config.data
                ),
            }
    return found


def vouched_rates(num_good: int, num_validation: int, data: "DataConfig") -> dict[str, Any]:
    """The lowest false-alarm rates that so many good images can vouch for, and how many 1 % would take.

    Of one training, whose threshold rests on a part of the held-out images; and of a search, where all good images
    serve, and the rate is expected and not proven. `num_validation` are good validation images of the user's own.
    """
    held = num_validation or num_held_out(num_good, data.validation_fraction)
    calibrating = num_held_out(held, data.calibration_fraction) if held > 1 and data.calibration_fraction else held
    share = (1.0 if num_validation else data.validation_fraction) * (data.calibration_fraction or 1.0)
    of_search = calibrating if num_validation else num_good
    return {
        "training_rate": lowest_rate(calibrating),
        "training_images_for_1_percent": math.ceil(images_for(0.01) / share),
        "search_rate": lowest_rate(of_search),
        "search_images_for_1_percent": math.ceil(images_for(0.01) / (share if num_validation else 1)),
    }


def _rates_line(rates: Mapping[str, Any]) -> str:
    said = (
        f"one training vouches for {rates['training_rate']:.1%} at best (1% takes "
        f"{rates['training_images_for_1_percent']} good images)"
    )
    if rates["search_rate"] == rates["training_rate"]:
        return said
    return (
        f"{said}; a search can be asked for {rates['search_rate']:.1%}, not proven (1% takes "
        f"{rates['search_images_for_1_percent']})"
    )


def print_report(report: "Report", training: Mapping[str, Any]) -> None:
    for category in report.categories:
        show(f"{category.name}  ({category.layout}, {category.folder})")
        for split, counts in category.counts.items():
            show(f"  {split:11} {_counted(counts)}")
        if (length := training["categories"].get(category.name)) is not None:
            show(
                f"  {'training':11} {length['steps']} steps, each of {length['images']} images seen "
                f"{length['times_each_image_is_seen']:.0f} times"
                + ("" if length["seconds"] is None else f"; {duration(length['seconds'])} on this machine")
            )
            show(f"  {'alarms':11} {_rates_line(length['false_alarms'])}")
        if category.extent:
            show(f"  {'size':11} {_span(category.extent.width)} x {_span(category.extent.height)} pixels")
        depths = ", ".join(f"{count} of {name}" for name, count in category.depths.items())
        if category.values:
            low, high = category.values
            depths += f" ({low:g} to {high:g}; {category.scale or 'no common scale'})"
        show(f"  {'depth':11} {depths or 'no image can be read'}")
    errors = [problem for problem in report.problems if problem.severity == "error"]
    for problem in errors:
        show(f"error: {problem.message}")
    notes: dict[tuple[str, Path], list[str]] = {}
    for problem in report.problems[len(errors) :]:
        notes.setdefault((problem.kind, problem.path.parent), []).append(problem.message)
    for (kind, folder), messages in notes.items():
        for message in messages if len(messages) <= _MANY_NOTES else messages[:1]:
            show(f"note: {message}")
        if len(messages) > _MANY_NOTES:
            show(f"note: {len(messages) - 1} more of this kind ({kind}) in {folder}; --json names them.")
    verdict = "can be trained on" if report.is_trainable else "cannot be trained on as it is"
    say(f"{len(errors)} errors, {len(report.problems) - len(errors)} notes: {report.root} {verdict}")


def _counted(counts: Mapping[str, int]) -> str:
    defects = {name: count for name, count in counts.items() if name != "good"}
    parts = [f"{counts['good']} good"] if "good" in counts else []
    if defects:
        parts.append(f"{sum(defects.values())} defective")
    names = f" ({', '.join(f'{count} {name}' for name, count in defects.items())})" if defects else ""
    return (", ".join(parts) or "none") + names


def _span(sides: tuple[int, int]) -> str:
    return str(sides[0]) if sides[0] == sides[1] else f"{sides[0]}–{sides[1]}"


def print_evaluation(found: "Evaluation", threshold: float, note: str) -> None:
    """Figures, then right and wrong verdicts at the threshold, then what was found of each kind of defect."""
    for name, value in found.scores._asdict().items():
        show(f"{name:14} {value:.4f}" if math.isfinite(value) else f"{name:14} –")
    counts = found.confusion(threshold)
    show(f"\n{len(found.images)} test images; {note}")
    rows = {
        "": ("called good", "called anomalous"),
        "good": (counts.num_good - counts.num_false_alarms, counts.num_false_alarms),
        "defective": (counts.num_missed, counts.num_defective - counts.num_missed),
    }
    for name, (good, anomalous) in rows.items():
        show(f"{name:14} {good:>11}  {anomalous:>16}")
    show("\nfound of each kind of defect")
    kinds = found.recall(threshold)
    width = max((len(name) for name in kinds), default=0)
    for name, recall in kinds.items():
        share = recall.num_found / recall.num_images
        show(f"{name:{max(width, 14)}} {recall.num_found} of {recall.num_images} ({share:.0%})")


def evaluation_document(found: "Evaluation", threshold: float) -> dict[str, Any]:
    """The same as plain values; JSON has no NaN, which the pixel figures are where no mask has a defect pixel."""
    return {
        **{name: value if math.isfinite(value) else None for name, value in found.scores._asdict().items()},
        "threshold": threshold,
        "confusion": found.confusion(threshold)._asdict(),
        "defects": {name: recall._asdict() for name, recall in found.recall(threshold).items()},
    }


def print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, allow_nan=False))


def show(line: str) -> None:
    """Print a line on stdout, which is for results."""
    print(fitted(line, line_width(sys.stdout)), flush=True)


def say(line: str) -> None:
    """Print a line on stderr, which is for people."""
    print(fitted(line, line_width(sys.stderr)), file=sys.stderr, flush=True)
