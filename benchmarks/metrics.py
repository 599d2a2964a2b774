"""Speed and accuracy of `dskd.metrics` on maps of the size of one category: `python benchmarks/metrics.py`.

83 maps of 256x256 pixels, as in MVTec's smaller test sets: coarse noise, enlarged and blurred like the
detectors' maps, with round defects under a wider, weaker response. No files are read or written; the
run takes less than a minute.
"""

import os
import platform
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import scipy
import sklearn
import torch
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from dskd import metrics
from dskd.metrics import MetricState, compute, merge, update

NUM_MAPS, NUM_NORMAL, SIDE = 83, 21, 256
REPEATS = 15
BATCH = 16


def drawn_set(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Maps, masks, image scores and labels; the first `NUM_NORMAL` images are normal."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((NUM_MAPS, SIDE, SIDE), dtype=bool)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for mask in masks[NUM_NORMAL:]:
        for _ in range(rng.integers(1, 4)):
            row, column = rng.integers(20, SIDE - 20, size=2)
            mask |= (rows - row) ** 2 + (columns - column) ** 2 < rng.integers(4, 28) ** 2
    noise = rng.gamma(2.0, 0.05, size=(NUM_MAPS, SIDE // 8, SIDE // 8))
    response = ndimage.zoom(noise, (1, 8, 8), order=1) + 0.15 * ndimage.gaussian_filter(
        masks.astype(np.float64), (0, 8, 8)
    )
    maps = ndimage.gaussian_filter(response, (0, 4, 4)).astype(np.float32)
    labels = np.arange(NUM_MAPS) >= NUM_NORMAL
    return maps, masks, maps.max(axis=(1, 2)), labels


def sweep_aupro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """AUPRO in float64 from all distinct thresholds of the sorted pixels."""
    neighbours = np.zeros((3, 3, 3), dtype=bool)
    neighbours[1] = True
    regions, num_regions = ndimage.label(masks, neighbours)
    regions = regions.ravel()
    weights = np.zeros(regions.size)
    sizes = np.bincount(regions)
    weights[regions > 0] = 1 / (sizes[regions[regions > 0]] * num_regions)
    values = maps.astype(np.float64).ravel()
    order = np.argsort(-values, kind="stable")
    last_of_value = np.append(np.diff(values[order]) != 0, True)
    fpr = np.append(0, (np.cumsum(regions[order] == 0) / sizes[0])[last_of_value])
    pro = np.append(0, np.cumsum(weights[order])[last_of_value])
    inside = fpr <= limit
    x = np.append(fpr[inside], limit)
    y = np.append(pro[inside], np.interp(limit, fpr, pro) if not inside.all() else pro[-1])
    return float(np.trapezoid(y, x)) / limit


def milliseconds(function: Callable[[], object], repeats: int = REPEATS) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * median(times)


def main() -> None:
    print(
        f"python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}, "
        f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, {os.cpu_count()} CPUs"
    )
    maps, masks, scores, labels = drawn_set(0)
    print(
        f"{NUM_MAPS} maps of {SIDE}x{SIDE} float32, {masks.mean():.2%} defect pixels; "
        f"median of {REPEATS} runs, one process\n"
    )

    def in_batches() -> MetricState:
        states = [
            update(MetricState(), *(values[i : i + BATCH] for values in (maps, masks, scores, labels)))
            for i in range(0, NUM_MAPS, BATCH)
        ]
        return merge(states)

    state = in_batches()
    sort = milliseconds(lambda: np.sort(maps, axis=None))
    rows: list[tuple[str, float]] = [
        ("np.sort of the same pixels", sort),
        ("aupro", milliseconds(lambda: metrics.aupro(maps, masks))),
        ("aupro, maps and masks as tensors", milliseconds(_on_tensors(maps, masks))),
        ("aupro, fpr_limit 0.05", milliseconds(lambda: metrics.aupro(maps, masks, 0.05))),
        ("aupro_rd", milliseconds(lambda: metrics.aupro_rd(maps, masks))),
        ("pixel_auroc", milliseconds(lambda: metrics.pixel_auroc(maps, masks))),
        (
            "score_maps, all seven figures",
            milliseconds(lambda: metrics.score_maps(maps, masks, scores, labels)),
        ),
        (f"update in batches of {BATCH}", milliseconds(in_batches)),
        ("compute of the merged batches", milliseconds(lambda: compute(state))),
        ("scikit-learn roc_auc_score", milliseconds(lambda: roc_auc_score(masks.ravel(), maps.ravel()), 3)),
    ]
    for name, duration in rows:
        print(f"{name:34s}{duration:9.1f} ms {duration / sort:7.2f} x np.sort")

    print("\nabsolute error against a float64 sweep of all thresholds (AUPRO) and scikit-learn (pixel figures)")
    whole = metrics.score_maps(maps, masks, scores, labels)
    for name, values in (
        ("continuous", maps),
        ("1000 levels", _quantised(maps, 1000)),
        ("8 levels", _quantised(maps, 8)),
    ):
        errors = [
            abs(metrics.aupro(values, masks, limit) - sweep_aupro(values, masks, limit)) for limit in (0.05, 0.3, 1.0)
        ]
        found = metrics.score_maps(values, masks, scores, labels)
        auroc_error = abs(found.pixel_auroc - roc_auc_score(masks.ravel(), values.ravel()))
        ap_error = abs(found.pixel_ap - average_precision_score(masks.ravel(), values.ravel()))
        print(f"{name:12s} aupro {max(errors):.1e}   pixel_auroc {auroc_error:.1e}   pixel_ap {ap_error:.1e}")
    reverse = compute(MetricState(state.batches[::-1]))
    print(f"batches in reverse order give identical figures: {reverse == whole}")
    print("\n" + "  ".join(f"{name} {figure:.4f}" for name, figure in whole._asdict().items()))
    print(f"aupro_rd {metrics.aupro_rd(maps, masks):.4f}")


def _on_tensors(maps: np.ndarray, masks: np.ndarray) -> Callable[[], float]:
    map_tensor, mask_tensor = torch.from_numpy(maps), torch.from_numpy(masks)
    return lambda: metrics.aupro(map_tensor, mask_tensor)


def _quantised(maps: np.ndarray, levels: int) -> np.ndarray:
    return np.floor(maps * (levels / float(maps.max())), dtype=np.float32)


if __name__ == "__main__":
    main()
