"""What the shape of an image is worth: squares, letterboxes and tiles at equal training time, and a region of interest.

    python benchmarks/geometry.py --data DIR --categories screw magnetic_tile --teacher-weights FILE --results R.jsonl

Trains with tiles first, `--tile-epochs` epochs. Squares and letterboxes of the same side are then trained until they
have taken as many seconds (of the processor, on a CPU: other work on the machine does not count). All are measured on
the same whole test images, their maps in the images' own pixels. "Seam" is the largest difference between the maps of
a test image and of the same image shifted by 32 pixels, in shares of the threshold, 32 pixels away from the border;
"without tiles" is the same of the maps of these views seen at once.

A drawn category, a flange in front of clutter, is trained with and without a region of interest (`--no-clutter` leaves
it out). `--train-images` and `--test-images` take excerpts, drawn by file name. Each finished run is a line of the
results file; the same command continues after a kill and repeats no finished run.
"""

import dataclasses
import datetime
import hashlib
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import tyro
from PIL import Image
from runs import add_run, field_values, finished_runs, print_commands
from scipy import ndimage

from dskd import metrics
from dskd.anomaly import BLUR_REFERENCE, anomaly_maps
from dskd.config import DataSpec, RunConfig, TeacherSource
from dskd.data.cache import ArrayCache, default_folder
from dskd.data.datasets import read_category, read_test_split
from dskd.data.geometry import ALIGNMENT, Geometry
from dskd.data.images import Framed, checked_mask, read_image
from dskd.data.regions import find_region
from dskd.data.samples import Sample, split_key
from dskd.data.tiles import MAP_STRIDE
from dskd.demo.dataset import draw_dataset
from dskd.detector import Detector
from dskd.metrics import MetricState
from dskd.model.distances import discrepancies
from dskd.model.teacher import normalize
from dskd.presets import PRESETS
from dskd.training.inputs import prepare
from dskd.training.loop import Step
from dskd.training.run import TrainingRun

FIGURES = ("image_auroc", "pixel_auroc", "aupro")
TILES, SQUARE, LETTERBOX = "tiles", "square", "letterbox"
WHOLE, REGION = "whole image", "region of interest"
_CLUTTER = "flange in clutter"
_MANY_EPOCHS = 100_000
_SHIFT = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    results: Path
    """File of finished runs, one JSON object per line; new runs are appended."""
    data: Path | None = None
    """Folder of categories; without it only the drawn category is trained."""
    categories: tuple[str, ...] = ()
    modes: tuple[str, ...] = (TILES, SQUARE, LETTERBOX)
    """tiles, which set the training time and come first, square and letterbox."""
    clutter: bool = True
    """Train on the drawn category too, with and without its region of interest."""
    preset: str = "stfpm"
    """Its schedule must be constant, since a run ends by time: stfpm or rd4ad."""
    seeds: tuple[int, ...] = (0, 1, 2)
    side: int = 256
    """Of squares, letterboxes and tiles, in pixels."""
    overlap: int | None = None
    """Of tiles, in pixels; by default that of `dskd train`."""
    tile_epochs: int = 20
    """Epochs on tiles; the other modes get as much time."""
    clutter_epochs: int = 20
    batch_size: int = 16
    train_images: int = 0
    """Train on an excerpt of this many images of a category; 0: on all."""
    test_images: int = 0
    """Test on an excerpt of this many images of each kind; 0: on all."""
    set: dict[str, str] = field(default_factory=dict)
    """Other configuration fields of every run; values are JSON or plain words."""
    teacher_weights: str = "hub"
    device: str = "cpu"
    cache_dir: Path = field(default_factory=default_folder)
    cache_gb: float = 20.0


def excerpt(data: Path, category: str, options: Options, out: Path) -> Path:
    """A folder with links to some images of a category, or `data` if all are wanted."""
    if not options.train_images and not options.test_images:
        return data
    train, test = read_category(data, category).train, read_test_split(data, category).test
    by_defect: dict[str, list[Sample]] = {}
    for sample in test:
        by_defect.setdefault(sample.defect, []).append(sample)
    chosen = [("train/good", some(train, options.train_images))]
    chosen += [(f"test/{name}", some(samples, options.test_images)) for name, samples in by_defect.items()]
    for folder, samples in chosen:
        for sample in samples:
            link(sample.path, out / category / folder / sample.path.name)
            if sample.mask is not None:
                mask = f"{sample.path.stem}_mask{sample.mask.suffix}"
                link(sample.mask, out / category / "ground_truth" / sample.defect / mask)
    return out


def some(samples: Sequence[Sample], count: int) -> list[Sample]:
    return sorted(samples, key=lambda sample: split_key(sample.path, 0))[: count or len(samples)]


def link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve())


CLUTTER_BOX = (96, 32, 224, 160)
"""Where the flange is in an image of 320 x 192 pixels: left, top, right, bottom."""
_BOX = ",".join(map(str, CLUTTER_BOX))


def draw_clutter(out: Path) -> None:
    """A category in MVTec AD's layout: drawn flanges in front of boxes and cables that lie otherwise in each image."""
    left, top, right, bottom = CLUTTER_BOX
    with tempfile.TemporaryDirectory(prefix="dskd-") as temporary:
        plain = Path(temporary, "plain")
        draw_dataset(plain, categories=("flange",), num_train=60, num_test=40, image_size=right - left)
        rng = np.random.default_rng(0)
        for path in sorted((plain / "flange").rglob("*.png")):
            name = path.relative_to(plain / "flange")
            pixels = np.full((192, 320, 3), 90, np.uint8)
            if name.parts[0] == "ground_truth":
                pixels[:] = 0
            else:
                for _ in range(40):
                    y, x = rng.integers(0, 192), rng.integers(0, 320)
                    high, wide = rng.integers(4, 60, 2)
                    pixels[y : y + high, x : x + wide] = rng.integers(0, 256, 3)
            pixels[top:bottom, left:right] = read_image(path)
            target = out / _CLUTTER / name
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target)


def configuration(mode: str, seed: int, options: Options) -> RunConfig:
    shapes: dict[str, dict[str, Any]] = {
        TILES: {"tile": options.side, "overlap": options.overlap},
        LETTERBOX: {"resize": "letterbox"},
    }
    values = {"image_size": options.side, "batch_size": options.batch_size, "epochs": _MANY_EPOCHS, "seed": seed}
    others = field_values(options.set)
    config = PRESETS[options.preset].with_values(values | shapes.get(mode, {}) | others)
    if config.train.schedule != "constant":
        raise ValueError(f"--preset must have a constant schedule, as a run ends by time; got {options.preset}.")
    return config


class Task(NamedTuple):
    """One run."""

    category: str
    mode: str
    seed: int
    folder: Path
    region: str = ""
    epochs: int = _MANY_EPOCHS
    """It ends after this many epochs,"""
    seconds: float = math.inf
    """or after the epoch in which its training has taken this many seconds."""

    def key(self, config: RunConfig, options: Options) -> str:
        """Equal for runs of which one is enough."""
        wanted = [self.category, self.mode, config.to_dict(), self.region, self.epochs, str(self.seconds)]
        wanted += [options.train_images, options.test_images, options.device, options.teacher_weights]
        return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds of the processor on a CPU, so that other work on the machine does not count; else of the wall."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def train(run: TrainingRun, task: Task) -> tuple[Detector, int, float]:
    """The detector of a task, its epochs and seconds of training."""
    clock = clock_of(run.device)
    seconds, epochs, last = 0.0, 0, clock()
    for event in run.steps():
        if isinstance(event, Step):
            event.loss.item()  # waits for the device
            seconds += clock() - last
        else:
            epochs += 1
            print(f"  epoch {epochs}  {seconds:.1f} s  validation {event.objective:.4f}", file=sys.stderr, flush=True)
            if epochs >= task.epochs or seconds >= task.seconds:
                break
        last = clock()
    record, _ = run.detector()
    return Detector(record, run.inputs.teacher, run.students.eval(), run.device), epochs, seconds


def evaluate(
    detector: Detector, samples: Sequence[Sample], within: Geometry, clock: Callable[[], float]
) -> tuple[dict[str, float], float]:
    """Figures on whole images, maps and masks in their own pixels; and seconds an image, reading included.

    Only what lies in the region of interest of `within` counts.
    """
    state, seconds = MetricState(), 0.0
    for sample in samples:
        started = clock()
        framed = detector.load_image(sample.path)
        if isinstance(framed, str):
            raise ValueError(framed)
        (heat,), (score,) = detector.score_framed([framed])
        seconds += clock() - started
        full = framed.frame.to_image(heat, MAP_STRIDE if detector.geometry.tile else 1)
        mask = np.zeros(full.shape, np.bool_)
        if sample.mask is not None:
            whole = Geometry(width=full.shape[1], height=full.shape[0])
            mask = whole.mask(checked_mask(sample), whole.frame(full.shape[1], full.shape[0]))
        inside = np.zeros(full.shape, np.bool_)
        left, top, right, bottom = within.frame(full.shape[1], full.shape[0]).box
        inside[top:bottom, left:right] = True
        state = metrics.update(
            state, full[None], mask[None], np.array([score]), np.array([sample.is_defective]), inside=inside[None]
        )
    found = metrics.compute(state)._asdict()
    return {name: found[name] for name in FIGURES}, seconds / len(samples)


def seam(detector: Detector, samples: Sequence[Sample]) -> tuple[float, float]:
    """See the module's docstring: with tiles, and the control; NaN where no image is large enough."""
    tiled, control = math.nan, math.nan
    for sample in samples:
        image = read_image(sample.path)
        height, width = ((side - _SHIFT) // ALIGNMENT * ALIGNMENT for side in image.shape[:2])
        if min(height, width) <= max(detector.geometry.tile, 3 * _SHIFT):
            continue
        views = [np.ascontiguousarray(image[step:, step:][:height, :width]) for step in (0, _SHIFT)]
        frames = [Framed(view, detector.geometry.frame(width, height), view) for view in views]
        tiled = max(shifted_apart(detector, detector.score_framed(frames)[0]), 0 if math.isnan(tiled) else tiled)
        maps = [at_once(detector, view) for view in views]
        control = max(shifted_apart(detector, maps), 0 if math.isnan(control) else control)
    return tiled, control


def shifted_apart(detector: Detector, maps: Sequence[npt.NDArray[np.float32]]) -> float:
    """Largest difference of the maps of two views, the second `_SHIFT` pixels further, in shares of the threshold."""
    moved = near = _SHIFT // MAP_STRIDE
    first, second = maps[0][moved + near : -near, moved + near : -near], maps[1][near:, near:]
    apart = np.abs(first - second[: first.shape[0], : first.shape[1]]).max()
    return float(apart / detector.record.thresholds[0].value)


@torch.inference_mode()
def at_once(detector: Detector, canvas: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The map (h / 4, w / 4) of a canvas (h, w, 3) without tiles, blurred as with them."""
    score = detector.record.config.score
    pixels = normalize(torch.from_numpy(canvas[None]))
    targets = detector.teacher(pixels)
    outputs = detector.students(pixels, targets)
    found = discrepancies(targets, outputs.encoder, outputs.decoder)
    size = (canvas.shape[0] // MAP_STRIDE, canvas.shape[1] // MAP_STRIDE)
    (heat,) = anomaly_maps(found, dataclasses.replace(score, blur_sigma=0.0), size).numpy()
    sigma = score.blur_sigma * detector.geometry.tile / MAP_STRIDE / BLUR_REFERENCE
    return np.asarray(ndimage.gaussian_filter(heat, sigma, mode="reflect") if sigma > 0 else heat)


def measured(task: Task, config: RunConfig, options: Options, cache: ArrayCache | None) -> dict[str, Any]:
    """Train and measure one task."""
    print(f"{task.category}  {task.mode}  seed {task.seed}", file=sys.stderr, flush=True)
    device, started = torch.device(options.device), time.perf_counter()
    teacher = TeacherSource(options.teacher_weights)
    spec = DataSpec(data=task.folder, category=task.category, teacher=teacher, region=task.region)
    inputs = prepare(config, spec, device=device, cache=cache)
    prepared = time.perf_counter() - started
    detector, epochs, seconds = train(TrainingRun.begin(config, inputs, device), task)
    samples = read_test_split(task.folder, task.category).test
    within = Geometry(width=1, height=1)
    if task.category == _CLUTTER:
        within = dataclasses.replace(within, region=find_region(_BOX, task.folder, samples[0].path))
    figures, per_image = evaluate(detector, samples, within, clock_of(device))
    apart, control = seam(detector, samples[:8]) if detector.geometry.tile else (math.nan, math.nan)
    return {
        "category": task.category,
        "mode": task.mode,
        "seed": task.seed,
        "figures": figures,
        "epochs": epochs,
        "train_seconds": seconds,
        "prepare_seconds": prepared,
        "seconds_per_image": per_image,
        "seam": None if math.isnan(apart) else apart,
        "seam_without_tiles": None if math.isnan(control) else control,
        "num_train": len(inputs.train_images),
        "num_test": len(samples),
        "side": options.side,
        "overlap": detector.geometry.overlap,
        "preset": options.preset,
        "teacher": teacher.name,
        "threads": torch.get_num_threads(),
        "device": device.type,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/geometry.py", *sys.argv[1:]]),
    }


def records(options: Options, drawn: Path) -> Iterator[dict[str, Any]]:
    """The finished runs of these options, computed now or earlier."""
    known = finished_runs(options.results)
    cache = ArrayCache(options.cache_dir, int(options.cache_gb * 1e9)) if options.cache_gb > 0 else None

    def run(task: Task) -> dict[str, Any]:
        config = configuration(task.mode, task.seed, options)
        key = task.key(config, options)
        if key not in known:
            known[key] = {"key": key, **measured(task, config, options, cache)}
            add_run(options.results, known[key])
        return known[key]

    for category in options.categories if options.data else ():
        assert options.data is not None
        folder = excerpt(options.data, category, options, drawn / f"excerpt of {category}")
        for seed in options.seeds:
            tiles = run(Task(category, TILES, seed, folder, epochs=options.tile_epochs))
            yield tiles
            for mode in options.modes:
                if mode != TILES:
                    yield run(Task(category, mode, seed, folder, seconds=tiles["train_seconds"]))
    if options.clutter:
        draw_clutter(drawn)
        for seed in options.seeds:
            for mode, region in ((WHOLE, ""), (REGION, _BOX)):
                yield run(Task(_CLUTTER, mode, seed, drawn, region, epochs=options.clutter_epochs))


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """One row per category and mode: mean over the seeds (± standard deviation)."""
    lines = [
        "| category | mode | image AUROC | pixel AUROC | AUPRO | s of training | epochs | s an image | seam | "
        "without tiles | seeds |",
        "|" + "---|" * 11,
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in found:
        groups.setdefault((record["category"], record["mode"]), []).append(record)
    for (category, mode), runs in groups.items():
        seams, controls = (
            [record[name] for record in runs if record.get(name) is not None] for name in ("seam", "seam_without_tiles")
        )
        cells = [
            category,
            mode,
            *(_spread([record["figures"][name] for record in runs]) for name in FIGURES),
            f"{mean(record['train_seconds'] for record in runs):.0f}",
            f"{mean(record['epochs'] for record in runs):.0f}",
            f"{mean(record['seconds_per_image'] for record in runs):.3f}",
            f"{max(seams):.1%}" if seams else "",
            f"{max(controls):.1%}" if controls else "",
            str(len(runs)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(Options, args=arguments)
    with tempfile.TemporaryDirectory(prefix="dskd-") as temporary:
        found = list(records(options, Path(temporary)))
    print(markdown(found))
    first = found[0]
    print(
        f"\n{first['date']}, preset {first['preset']}, {first['side']} px, {first['overlap']} px shared, teacher "
        f"{first['teacher']}, {first['device']}, {first['threads']} threads"
    )
    for record in {each["category"]: each for each in found}.values():
        print(f"{record['category']}: {record['num_test']} test images")
    print_commands(found)


if __name__ == "__main__":
    main()
