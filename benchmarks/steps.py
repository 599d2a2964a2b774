"""Test figures against the number of steps and the number of good images.

    python benchmarks/steps.py --data DIR --teacher-weights FILE --results runs.jsonl --categories screw

Cuts every category to each of the given numbers of good images, drawn with a seed so that fewer are a part of more,
and trains on them with each of the given lengths; a part of them is held out as ever. The test split stays whole, and
is evaluated afterwards. A length is a training of its own, since a schedule falls over the whole of it.

Each finished run is one line of the results file. The same command continues after a kill and does not repeat
finished runs. Other flags add runs to the file; the table shows only the runs of the current flags.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from presets import key_of, run
from runs import add_run, field_values, finished_runs, print_commands

from dskd.config import DataSpec, RunConfig, TeacherSource
from dskd.data.cache import ArrayCache, default_folder
from dskd.data.datasets import find_categories, read_category
from dskd.data.samples import split_key
from dskd.presets import PRESETS
from dskd.training.inputs import TrainingData, prepare

FIGURES = ("image_auroc", "pixel_auroc", "aupro")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    data: Path
    """Folder of categories; dskd check-data lists the supported layouts."""
    results: Path
    """File of finished runs, one JSON object per line; new runs are appended."""
    categories: tuple[str, ...] = ()
    """Categories to train on; all by default."""
    presets: tuple[str, ...] = ("stfpm",)
    """Methods to train."""
    images: tuple[int, ...] = (20, 50, 200)
    """Numbers of good images that a category is cut to; the held-out ones are among them."""
    steps: tuple[int, ...] = (100, 300, 1000)
    """Lengths of the trainings."""
    seeds: tuple[int, ...] = (0,)
    image_size: int = 256
    batch_size: int | None = None
    """Images per batch; by default that of the preset."""
    set: dict[str, str] = field(default_factory=dict)
    """Other configuration fields of every run, such as `--set backbone test_resnet`; values are JSON or plain words."""
    teacher_weights: str = "hub"
    """hub, a .safetensors or .pth file, or random."""
    device: str = "cpu"
    cache_dir: Path = field(default_factory=default_folder)
    cache_gb: float = 20.0


def configuration(options: Options, preset: str, steps: int, seed: int) -> RunConfig:
    """Configuration of one run. Raises ValueError on an unknown preset or a value out of range."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}.")
    batch = {} if options.batch_size is None else {"batch_size": options.batch_size}
    others = field_values(options.set)
    return PRESETS[preset].with_values(
        {"image_size": options.image_size, "steps": steps, "seed": seed, **batch, **others}
    )


def cut(data: Path, category: str, count: int, root: Path) -> None:
    """Link `count` of a category's good training images into a category of the same name below `root`.

    Raises ValueError if it has fewer.
    """
    samples = sorted(read_category(data, category).train, key=lambda sample: split_key(sample.path, 0))
    if len(samples) < count:
        raise ValueError(f"{category} has {len(samples)} good images, fewer than the {count} of --images.")
    good = root / category / "train" / "good"
    good.mkdir(parents=True)
    for number, sample in enumerate(samples[:count]):
        (good / f"{number:04d}{sample.path.suffix}").symlink_to(sample.path.resolve())


def missing_and_known(options: Options) -> Iterator[dict[str, Any]]:
    """The record of every requested run; a run that is not in the results file is trained."""
    device = torch.device(options.device)
    cache = ArrayCache(options.cache_dir, int(options.cache_gb * 1e9)) if options.cache_gb > 0 else None
    known = finished_runs(options.results)
    wanted = [
        (preset, configuration(options, preset, steps, seed))
        for steps in sorted(options.steps)  # the cheap ones first
        for preset in options.presets
        for seed in options.seeds
    ]
    teacher = TeacherSource(options.teacher_weights)
    for category in options.categories or tuple(find_categories(options.data)):
        for count in options.images:
            with TemporaryDirectory(prefix="dskd-") as temporary:
                cut(options.data, category, count, Path(temporary))
                spec = DataSpec(data=Path(temporary), category=category, teacher=teacher)
                prepared: dict[RunConfig, TrainingData] = {}
                for preset, config in wanted:
                    needs = config.for_inputs()
                    if needs not in prepared:
                        prepared[needs] = prepare(config, spec, device=device, cache=cache)
                    inputs = prepared[needs]
                    key = key_of(f"{preset} on {count} images", config, inputs)
                    if key not in known:
                        record = {
                            "key": key,
                            "num_good": count,
                            **run(preset, config, inputs, options.data, device, cache),
                            "command": shlex.join(sys.argv),
                        }
                        add_run(options.results, record)
                        known[key] = record
                    yield known[key]


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """One row per category, method and number of images, one column per length; means over the seeds."""
    lengths = sorted({record["num_steps"] for record in records})
    lines = [
        f"| category | method | good images (trained on) | {' | '.join(f'{steps} steps' for steps in lengths)} |",
        "|" + "---|" * (3 + len(lengths)),
    ]
    rows: dict[tuple[str, str, int, int], dict[int, list[dict[str, Any]]]] = {}
    for record in records:
        row = (record["category"], record["method"], record["num_good"], record["num_train"])
        rows.setdefault(row, {}).setdefault(record["num_steps"], []).append(record)
    for (category, method, num_good, num_train), runs in rows.items():
        cells = [_cell(runs[steps]) if steps in runs else "–" for steps in lengths]
        lines.append(f"| {category} | {method} | {num_good} ({num_train}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(runs: Sequence[dict[str, Any]]) -> str:
    """Figures of the students that validation chose, scored by all of them: the first such entry of each run."""
    chosen = [next(entry for entry in record["figures"] if entry["chosen"] == "best") for record in runs]
    values = [[entry[figure] for entry in chosen] for figure in FIGURES]
    return " / ".join("–" if None in each else f"{mean(each):.3f}" for each in values)


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(Options, description=__doc__, args=arguments)
    try:
        records = list(missing_and_known(options))
    except (ValueError, OSError) as error:
        sys.exit(f"steps: error: {error}")
    print(markdown(records))
    first = records[0]
    print(f"\nimage AUROC / pixel AUROC / AUPRO; image size {options.image_size}, batches of "
          f"{first['config']['train']['batch_size']}, {len(options.seeds)} seeds; teacher {first['teacher']}; torch "
          f"{first['torch']}, {first['device']}, {first['threads']} threads of {first['cpus']} CPUs")  # fmt: skip
    print_commands(records)


if __name__ == "__main__":
    main()
