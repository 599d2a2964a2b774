"""What a lower precision on a GPU does to a detector's verdicts: `python benchmarks/precision.py DETECTOR --data DATA`.

The test split of the detector's category is inspected in each precision, after a CPU or the GPU in float32, whichever
--reference says. A row tells the metrics, the largest change of a score as a share of the threshold, the verdicts that
change, and images a second of the networks with their maps, from bytes to maps in the host's memory.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import get_args

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare copy is not installed

from dskd.config import Precision
from dskd.detector import Detector
from dskd.device import computing_device
from dskd.evaluate import compute_metrics, labelled_test_split

_ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detectors", nargs="+", type=Path, help="detector folders without tiles")
    parser.add_argument("--data", type=Path, required=True, help="folder of categories")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--reference", default="cpu", help="the device of the scores that others are compared with")
    options = parser.parse_args()
    device = computing_device(options.device)
    precisions = get_args(Precision) if device.type == "cuda" else ("float32",)
    columns = "image AUROC | pixel AUROC | AUPRO | score change / threshold | other verdicts | images/s"
    print(f"| category, detector | precision | {columns} |\n|{'---|' * 8}")
    for folder in options.detectors:
        exact = Detector.load(folder, str(computing_device(options.reference)))
        category, threshold = exact.record.category, exact.threshold(0.05).value
        truth = labelled_test_split(options.data, category, exact.geometry, exact.record.scale)
        expected = exact.score_images(truth.images, truth.inside)
        rows = [(f"float32, {options.reference}", expected, float("nan"))]
        for precision in precisions:
            detector = Detector.load(folder, str(device), precision)
            seen, times = detector.score_images(truth.images, truth.inside), []
            for _ in range(_ROUNDS):
                started = time.perf_counter()
                detector.score_images(truth.images, truth.inside)
                times.append(time.perf_counter() - started)
            rows.append((precision, seen, len(truth.images) / median(times)))
        for name, seen, rate in rows:
            found = compute_metrics(seen, truth)
            change = np.abs(seen.scores - expected.scores).max() / threshold
            others = int(((seen.scores > threshold) != (expected.scores > threshold)).sum())
            print(
                f"| {category}, {folder.name} | {name} | {found.image_auroc:.5f} | {found.pixel_auroc:.5f} | "
                f"{found.aupro:.5f} | {change:.1e} | {others} of {len(truth.images)} | {rate:,.0f} |",
                flush=True,
            )
    print(f"\n{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
