"""One-class novelty on handwritten digits: each of ten classes is normal once, the other nine are anomalous.

    python benchmarks/digits.py --data digits --results digits.jsonl --teacher-weights FILE --image-size 32 --epochs 10

Writes scikit-learn's 1,797 digits of 8 x 8 pixels (UCI's "Optical Recognition of Handwritten Digits", test part) as
class folders, unless they are there, and trains every method on every class with every seed, as presets.py does: a
finished run is a line of the results file, and the same command continues after a kill. A fifth of each class, by file
name, is for test alone. The table has the mean image AUROC over the classes, as STFPM and RD4AD report it of MNIST and
its like.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import presets
import tyro
from PIL import Image


def write_digits(folder: Path) -> None:
    """Write the digits as class folders `0` to `9` of PNG files, named by their place in the set, if there are none."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(digit) / f"{index:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(path)


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """A row per method: its image AUROC on each class, averaged over the seeds, and on all of them together."""
    classes = sorted({record["category"] for record in records})
    lines = [
        f"| method | scored by | {' | '.join(classes)} | mean over classes (± over seeds) | at the end | seeds |",
        "|" + "---|" * (len(classes) + 5),
    ]
    methods = dict.fromkeys((record["method"], entry["scored_by"]) for record in records for entry in record["figures"])
    for method, scored_by in methods:
        found = {
            chosen: {
                (record["category"], record["config"]["train"]["seed"]): presets.figures_of(record, chosen, scored_by)[
                    "image_auroc"
                ]
                for record in records
                if record["method"] == method
            }
            for chosen in ("best", "last")
        }
        seeds = sorted({seed for _, seed in found["best"]})
        by_class = [mean(found["best"][name, seed] for seed in seeds) for name in classes]
        cells = [*(f"{value:.3f}" for value in by_class), *(_over_seeds(found[chosen], seeds) for chosen in found)]
        lines.append(f"| {' | '.join([method, scored_by, *cells, str(len(seeds))])} |")
    return "\n".join(lines)


def _over_seeds(found: dict[tuple[str, int], float], seeds: Sequence[int]) -> str:
    means = [mean(value for (_, own), value in found.items() if own == seed) for seed in seeds]
    return f"{mean(means):.3f}" + (f" ± {stdev(means):.3f}" if len(means) > 1 else "")


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(presets.Options, description=__doc__, args=arguments)
    options = dataclasses.replace(options, set={"layout": "classes", **options.set})
    write_digits(options.data)
    try:
        records = list(presets.missing_and_known(options))
    except (ValueError, OSError) as error:
        sys.exit(f"digits: error: {error}")
    print(markdown(records))


if __name__ == "__main__":
    main()
