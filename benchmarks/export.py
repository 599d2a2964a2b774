"""Speed of a detector in torch and of its ONNX graph in onnxruntime, on the CPU: `python benchmarks/export.py`.

Both compute maps and scores from RGB bytes, alternating in one run, with the same number of threads. The weights
are random, which does not change the speed. Also prints the file sizes and the largest difference of the maps.
"""

import os
import platform
import time
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
import tyro

from dskd.checkpoint import DetectorRecord
from dskd.detector import Detector
from dskd.export import INPUT, OUTPUTS, as_inputs, build_model, compare, generated_images
from dskd.model import AmplifiedTeacher, build_amplifier, build_students, build_teacher
from dskd.presets import PRESETS


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    presets: tuple[str, ...] = tuple(PRESETS)
    image_size: int = 256
    batch_sizes: tuple[int, ...] = (1, 8)
    repeats: int = 15
    threads: int = os.cpu_count() or 1


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
    detector: Detector, session: onnxruntime.InferenceSession, images: npt.NDArray[np.uint8], repeats: int
) -> tuple[float, float]:
    """Median seconds of detector and session, alternating so that other load affects both equally."""
    in_torch, in_onnxruntime = [], []
    for round_ in range(repeats + 1):
        started = time.perf_counter()
        detector.score_images(images)
        between = time.perf_counter()
        session.run(list(OUTPUTS), {INPUT: images})
        ended = time.perf_counter()
        if round_ > 0:  # the first is a warm-up
            in_torch.append(between - started)
            in_onnxruntime.append(ended - between)
    return median(in_torch), median(in_onnxruntime)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = options.threads
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, "
        f"{options.threads} threads of "
        f"{os.cpu_count()} CPUs; {options.image_size} pixels, medians of {options.repeats}\n"
    )
    print("| preset | batch | torch, images/s | onnxruntime, images/s | ratio | file, MB | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for preset in options.presets:
        detector = untrained(preset, options.image_size)
        model = build_model(detector).SerializeToString()
        error = compare(detector, model, as_inputs(generated_images(options.image_size))).map_error
        session = onnxruntime.InferenceSession(model, session_options, providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(0)
        for batch in options.batch_sizes:
            images = rng.integers(0, 256, (batch, options.image_size, options.image_size, 3), dtype=np.uint8)
            in_torch, in_onnxruntime = seconds_in_turn(detector, session, images, options.repeats)
            print(
                f"| {preset} | {batch} | {batch / in_torch:.1f} | {batch / in_onnxruntime:.1f} | "
                f"{in_torch / in_onnxruntime:.2f} | {len(model) / 1e6:.1f} | {error:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
