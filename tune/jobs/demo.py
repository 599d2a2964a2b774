"""The whole demonstration: draw, search, pull, inspect, and print the next steps."""

from pathlib import Path

from dskd.checkpoint import read_record
from dskd.config import TeacherSource
from dskd.demo.dataset import CATEGORIES, draw_dataset
from dskd.detector import Detector
from dskd.model.teacher import TeacherUnavailableError, build_teacher
from dskd.predict import OVERLAYS_FOLDER, describe_prediction, find_images, predict_images
from dskd.presets import PRESETS
from tune.jobs.pull import pull
from tune.jobs.search import search
from tune.settings.demo import DemoSettings
from tune.settings.entry import say
from tune.settings.plan import resolve_addresses
from tune.settings.pull import PullSettings
from tune.storage.shown import command
from tune.tracking.client import tracking_ui_command


def demo(settings: DemoSettings) -> int:
    """Run the demonstration in `settings.out` and return the exit code; running it again continues or repeats it.

    Raises ValueError on unusable teacher weights, and on a folder with other contents.
    """
    asked = settings.search(chosen_weights(settings.teacher_weights))
    say(f"Drawing {', '.join(CATEGORIES)} in {settings.data} …")
    draw_dataset(settings.data)
    if code := search(asked):
        return code
    detectors = settings.out / "detectors"
    pull(PullSettings(categories=("all",), out=detectors, name=asked.name, storage=asked.storage))
    category = max(CATEGORIES, key=lambda name: read_record(detectors / name).metrics["val/objective"])
    verdicts = next_free(settings.out / "verdicts")
    images = find_images([settings.data / category / "test"]).images
    found = predict_images(
        Detector.load(detectors / category),
        images,
        verdicts,
        false_alarm_rate=0.05,
        on_prediction=lambda prediction: print(describe_prediction(prediction)),  # noqa: T201
    )
    say(f"{found.describe()}; overlays in {verdicts / OVERLAYS_FOLDER}")
    highest = max(found.predictions, key=lambda prediction: float(prediction["score"]))
    runs = tracking_ui_command(resolve_addresses(asked).tracking)
    predict = command(["dskd", "predict", str(detectors / category), "IMAGES", "--out", "verdicts"])
    say(
        f"\nLook at          {verdicts / highest['overlay']}\n"
        f"Compare runs     {runs if runs.startswith('open ') else f'.venv/bin/{runs}'}\n"
        f"Your own images  .venv/bin/python tune/search.py --data DIR   (DIR/<category>/train/good/*.png)\n"
        f"                 .venv/bin/{predict}"
    )
    return 0


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
