"""The whole demonstration: draw, search, pull, inspect, and print the next steps."""

from pathlib import Path
from typing import NamedTuple

from dskd.checkpoint import read_record
from dskd.config import TeacherSource
from dskd.demo.dataset import CATEGORIES, draw_dataset
from dskd.detector import Detector
from dskd.model.teacher import TeacherUnavailableError, build_teacher
from dskd.predict import OVERLAYS_FOLDER, find_images, predict_images
from dskd.presets import PRESETS
from tune.jobs.pull import pull
from tune.jobs.report import REPORT_PAGE
from tune.jobs.search import search
from tune.settings.demo import NUM_TRAIN, DemoSettings
from tune.settings.entry import say
from tune.settings.plan import resolve_addresses
from tune.settings.pull import PullSettings
from tune.storage.shown import command
from tune.tracking.client import tracking_ui_command

FALSE_ALARM_RATE = 0.05


def demo(settings: DemoSettings) -> int:
    """Run the demonstration in `settings.out` and return the exit code; running it again continues or repeats it.

    Raises ValueError on unusable teacher weights, and on a folder with other contents.
    """
    asked = settings.search(chosen_weights(settings.teacher_weights))
    say(f"Drawing {', '.join(CATEGORIES)} in {settings.data} …")
    draw_dataset(settings.data, num_train=NUM_TRAIN)
    if code := search(asked):
        return code
    detectors = settings.out / "detectors"
    pull(PullSettings(categories=("all",), out=detectors, name=asked.name, storage=asked.storage))
    verdicts = next_free(settings.out / "verdicts")
    inspected = [inspect_test(settings.data / name / "test", detectors / name, verdicts / name) for name in CATEGORIES]
    say(f"All products: {Inspected(*map(sum, zip(*inspected, strict=True))).describe()}; overlays in {verdicts}")
    category = max(CATEGORIES, key=lambda name: read_record(detectors / name).metrics["val/objective"])
    addresses = resolve_addresses(asked)
    runs = tracking_ui_command(addresses.tracking)
    predict = command(["dskd", "predict", str(detectors / category), "IMAGES", "--out", "verdicts"])
    say(
        f"\nLook at          {verdicts / category / OVERLAYS_FOLDER}\n"
        f"Read the report  {addresses.home}/{REPORT_PAGE}\n"
        f"Compare runs     {runs if runs.startswith('open ') else f'.venv/bin/{runs}'}\n"
        f"Your own images  .venv/bin/python tune/search.py --data DIR   (DIR/<category>/train/good/*.png)\n"
        f"                 .venv/bin/{predict}"
    )
    return 0


class Inspected(NamedTuple):
    """What a detector said of labelled images."""

    found: int
    """Defective images that were called anomalous."""
    defective: int
    flagged: int
    """Good images that were called anomalous."""
    good: int

    def describe(self) -> str:
        return f"{self.found} of {self.defective} defects found, {self.flagged} of {self.good} good images flagged"


def inspect_test(images: Path, folder: Path, out: Path) -> Inspected:
    """Inspect a folder of test images with a detector, say how many it tells right, and write verdicts to `out`."""
    seen = predict_images(Detector.load(folder), find_images([images]).images, out, false_alarm_rate=FALSE_ALARM_RATE)
    is_good = [Path(each["image"]).parent.name == "good" for each in seen.predictions]
    alarms = [each["verdict"] == "anomalous" for each in seen.predictions]
    flagged = sum(alarm for alarm, good in zip(alarms, is_good, strict=True) if good)
    counts = Inspected(sum(alarms) - flagged, len(is_good) - sum(is_good), flagged, sum(is_good))
    say(f"{images.parent.name:8}  {counts.describe()}; {seen.note}")
    return counts


def chosen_weights(asked: str | None) -> str:
    """The given teacher weights, after loading them once; if none are given, hub, else lite0, else random.

    Raises ValueError if the given weights are unusable.
    """
    model = PRESETS["dskd"].model
    for weights in (asked,) if asked else ("hub", "lite0"):
        try:
            build_teacher(TeacherSource(weights).backbone or model.backbone, model.levels, weights)
        except TeacherUnavailableError as error:
            if asked:
                raise
            say(str(error))
            continue
        if not asked and weights == "lite0":
            say("Continuing with EfficientNet-Lite0 from an installed package, smaller than the hub's ResNet18.")
        return weights
    say("Continuing with an untrained teacher: it shows how the system works, not for inspection.")
    return "random"


def next_free(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, … that does not exist: results are never overwritten."""
    candidates = (folder if number == 1 else folder.with_name(f"{folder.name}-{number}") for number in range(1, 10**6))
    return next(candidate for candidate in candidates if not candidate.exists())
