"""Entry: `python tune/demo.py` shows the whole system on one machine, with no flag, server or data set.

It draws three product categories, searches them on a local Ray, pulls the champions and inspects
test images with one of them. The teacher comes from the hub where that answers; elsewhere an
untrained one stands in, and every output says so.
"""

import sys
from pathlib import Path

from dskd.checkpoint import read_record
from dskd.demo.dataset import CATEGORIES, draw_dataset
from dskd.detector import UNTRAINED_TEACHER, Detector
from dskd.device import computing_device
from dskd.model.teacher import TeacherUnavailableError, build_teacher
from dskd.predict import describe_prediction, find_images, predict_images
from dskd.presets import PRESETS
from tune.jobs.search import launch
from tune.pull import pull
from tune.settings.search import SearchSettings

_HOME = Path("dskd-demo")


def main() -> None:
    """Run the demonstration below `dskd-demo/`; running it again continues or repeats it."""
    model = PRESETS["dskd"].model
    try:
        build_teacher(model.backbone, model.levels, "hub")
        weights = "hub"
    except TeacherUnavailableError as error:
        _say(f"{error}\nGoing on with an untrained teacher: good for seeing the machinery, not for inspection.")
        weights = "random"
    _say(f"Drawing {', '.join(CATEGORIES)} in {_HOME / 'data'} …")
    draw_dataset(_HOME / "data")
    settings = SearchSettings(
        data=str(_HOME / "data"),
        name=f"demo-{weights}",
        trials=4,
        epochs=8,
        image_size=128,
        batch_size=8,
        teacher_weights=weights,
        storage=str(_HOME / "results"),
    )
    if code := launch(settings):
        sys.exit(code)
    detectors = _HOME / "detectors"
    pull(("all",), to=detectors, name=settings.name, storage=settings.storage)
    category = max(CATEGORIES, key=lambda name: read_record(detectors / name).metrics["val/objective"])
    verdicts = _next_free(_HOME / "verdicts")
    detector = Detector.load(detectors / category, str(computing_device("auto")))
    summary = predict_images(
        detector,
        find_images([_HOME / "data" / category / "test"]).images,
        verdicts,
        false_alarm_rate=0.05,
        on_prediction=lambda seen: print(describe_prediction(seen)),  # noqa: T201
    )
    highest = max(summary.predictions, key=lambda prediction: float(prediction["score"]))
    _say(summary.describe())
    if detector.record.is_untrained_teacher:
        _say(UNTRAINED_TEACHER)
    _say(
        f"\nLook at          {verdicts / highest['overlay']}\n"
        f"Compare runs     .venv/bin/mlflow ui --backend-store-uri {settings.tracking}\n"
        f"Your own images  .venv/bin/python tune/search.py --data DIR   (DIR/<category>/train/good/*.png)\n"
        f"                 .venv/bin/dskd predict {detectors / category} IMAGES --out verdicts"
    )


def _next_free(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, … that does not exist: results are never overwritten."""
    candidates = (folder if number == 1 else folder.with_name(f"{folder.name}-{number}") for number in range(1, 10**6))
    return next(candidate for candidate in candidates if not candidate.exists())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
