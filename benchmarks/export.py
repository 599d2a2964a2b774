"""Speed of a detector in torch and of its ONNX graph in onnxruntime, on the CPU: `python benchmarks/export.py`.

Both compute maps and scores from RGB bytes, alternating in one run, with the same number of threads. The weights
are random, which does not change the speed. Also prints the file sizes and the largest difference of the maps; with
--detectors and --data, what 8 bits cost in accuracy, and with --files the speed of whole inspections.
"""

import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
import tyro

from dskd.checkpoint import DetectorRecord
from dskd.data.datasets import read_category
from dskd.demo.dataset import draw_dataset
from dskd.detector import Detector
from dskd.evaluate import AnomalyScores, compute_metrics, labelled_test_split
from dskd.export import (
    INPUT,
    OUTPUTS,
    OnnxDetector,
    as_inputs,
    build_model,
    compare,
    generated_images,
    network_inputs,
)
from dskd.jobs.quantize import build_int8_model
from dskd.model import AmplifiedTeacher, build_amplifier, build_students, build_teacher
from dskd.predict import Overlays, predict_images
from dskd.presets import PRESETS


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    presets: tuple[str, ...] = tuple(PRESETS)
    image_size: int = 256
    batch_sizes: tuple[int, ...] = (1, 8)
    repeats: int = 15
    """Rounds of the first table; 0: none."""
    threads: int = os.cpu_count() or 1
    detectors: tuple[Path, ...] = ()
    """Trained detectors whose figures on the labelled test images of --data are compared with their int8 graphs'."""
    data: Path | None = None
    files: int = 0
    """Drawn files of that size to inspect by `predict_images`, with and without overlays, beside the network alone."""


def untrained(preset: str, image_size: int) -> Detector:
    config = PRESETS[preset].with_values({"image_size": image_size})
    teacher = build_teacher(config.model.backbone, config.model.levels, "random")
    if config.amplification.amplification:
        teacher = AmplifiedTeacher(teacher, build_amplifier(teacher, config.amplification.memory_size, seed=0))
    record = DetectorRecord(
        category="none", config=config, teacher="random", teacher_sha256="", data_sha256="", validation_files=(),
        calibration_files=(), step=1, thresholds=(), metrics={},
    )  # fmt: skip
    return Detector(record, teacher, build_students(config.model, teacher, seed=0).eval(), torch.device("cpu"))


def seconds_in_turn(
    detector: Detector,
    session: onnxruntime.InferenceSession,
    int8: onnxruntime.InferenceSession,
    images: npt.NDArray[np.uint8],
    repeats: int,
) -> tuple[float, float, float]:
    """Median seconds of detector, session and int8 session, in turn so that other load affects all equally."""
    ways: list[Callable[[], object]] = [
        lambda: detector.score_images(images),
        lambda: session.run(list(OUTPUTS), {INPUT: images}),
        lambda: int8.run(list(OUTPUTS), {INPUT: images}),
    ]
    times: list[list[float]] = [[] for _ in ways]
    for round_ in range(repeats + 1):
        for way, known in zip(ways, times, strict=True):
            started = time.perf_counter()
            way()
            if round_ > 0:  # the first is a warm-up
                known.append(time.perf_counter() - started)
    first, second, third = (median(known) for known in times)
    return first, second, third


def of_files(detector: Detector, options: Options) -> str:
    """Images per second of the network on batches in memory, and the shares of it that whole inspections reach."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_dataset(folder / "drawn", categories=("flange",), num_train=8, num_test=4, image_size=options.image_size)
        paths = (sorted((folder / "drawn").rglob("good/*.png")) * options.files)[: options.files]
        framed = [detector.load_image(path) for path in paths[:32]]
        batch = np.stack([image.rgb for image in framed if not isinstance(image, str)])
        shares: dict[Overlays, list[float]] = {"none": [], "all": []}
        rates = []
        for round_ in range(4):
            for overlays, known in shares.items():
                started = time.perf_counter()
                detector.score_images(batch)
                between = time.perf_counter()
                out = folder / f"{overlays}{round_}"
                predict_images(detector, paths, out, threshold=1.0, overlays=overlays)
                rate = len(batch) / (between - started)
                if round_ > 0:
                    rates.append(rate)
                    known.append(len(paths) / (time.perf_counter() - between) / rate)
    return f"{median(rates):.1f} | {median(shares['none']):.0%} | {median(shares['all']):.0%}"


def accuracy(folder: Path, data: Path) -> str:
    """A row: image AUROC, pixel AUROC and AUPRO in float32 and of the int8 graph, and its largest error of a score."""
    detector = Detector.load(folder)
    truth = labelled_test_split(data, detector.record.category, detector.geometry, detector.record.scale)
    samples = read_category(data, detector.record.category)
    good = network_inputs(detector, [sample.path for sample in samples.train])
    model = build_int8_model(detector, good)
    exact = detector.score_images(truth.images, truth.inside)
    maps, scores = OnnxDetector(model).score_framed(as_inputs(truth.images))
    seen = AnomalyScores(np.stack(maps), np.array(scores, np.float32))
    cells = []
    for found in (compute_metrics(exact, truth), compute_metrics(seen, truth)):
        cells.append(f"{found.image_auroc:.4f} / {found.pixel_auroc:.4f} / {found.aupro:.4f}")
    error = float(np.abs(seen.scores / exact.scores - 1).max())
    limit = detector.threshold(0.05).value
    others = int(((seen.scores > limit) != (exact.scores > limit)).sum())
    return f"| {folder.name} | {cells[0]} | {cells[1]} | {error:.1%} | {others} of {len(truth.images)} |"


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = options.threads
    # Its threads would go on spinning for work while torch has its turn.
    session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, "
        f"{options.threads} threads of "
        f"{os.cpu_count()} CPUs; {options.image_size} pixels, medians of {options.repeats}\n"
    )
    print(
        "| preset | batch | torch, images/s | onnxruntime, images/s | ratio | int8, images/s | file, MB | int8, MB | "
        "largest difference |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for preset in options.presets if options.repeats else ():
        detector = untrained(preset, options.image_size)
        model = build_model(detector).SerializeToString()
        error = compare(detector, model, as_inputs(generated_images(options.image_size))).map_error
        small = build_int8_model(detector, as_inputs(generated_images(options.image_size)))
        session, int8 = (
            onnxruntime.InferenceSession(each, session_options, providers=["CPUExecutionProvider"])
            for each in (model, small)
        )
        rng = np.random.default_rng(0)
        for batch in options.batch_sizes:
            images = rng.integers(0, 256, (batch, options.image_size, options.image_size, 3), dtype=np.uint8)
            in_torch, in_onnxruntime, in_int8 = seconds_in_turn(detector, session, int8, images, options.repeats)
            print(
                f"| {preset} | {batch} | {batch / in_torch:.1f} | {batch / in_onnxruntime:.1f} | "
                f"{in_torch / in_onnxruntime:.2f} | {batch / in_int8:.1f} | {len(model) / 1e6:.1f} | "
                f"{len(small) / 1e6:.1f} | {error:.1e} |",
                flush=True,
            )
    if options.files:
        print("\n| preset | network, images/s | predict without overlays | with overlays |\n|---|---|---|---|")
        for preset in options.presets:
            print(f"| {preset} | {of_files(untrained(preset, options.image_size), options)} |", flush=True)
    if options.detectors and options.data is not None:
        print("\n| detector | float32: image AUROC / pixel AUROC / AUPRO | int8 | score | other verdicts |")
        print("|---|---|---|---|---|")
        for folder in options.detectors:
            print(accuracy(folder, options.data), flush=True)


if __name__ == "__main__":
    main()
