"""Compares the methods on real images, and DSKD with its own parts.

    python benchmarks/presets.py --data DIR --teacher-weights FILE --results runs.jsonl --steps 500

Trains every method on every category with every seed. It selects the step only by validation (held-out good
images, some with synthetic defects) and evaluates on the test split afterwards. The seed sets the students'
initial weights and the order of the images; the held-out split is always the same. Two students trained together
are also scored with each student's map alone. `--parts` also trains each student alone, and both without the
decoder's gradient into the encoder. A memory of the teacher's features (nearest.py), which trains nothing, is the
reference that shows what training buys; `--memory-share 0` leaves it out.

Each finished run is one line of the results file. The same command continues after a kill and does not repeat
finished runs. Other flags add runs to the file; the table shows only the runs of the current flags.
"""

import datetime
import hashlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
import tyro
from nearest import build_memory, score_by_memory
from runs import add_run, field_values, finished_runs, print_commands

from dskd import metrics
from dskd.arguments import given_length
from dskd.config import DataSpec, RunConfig, TeacherSource
from dskd.data.cache import ArrayCache, default_folder
from dskd.data.datasets import find_categories
from dskd.data.geometry import Geometry
from dskd.device import computing_device
from dskd.evaluate import AnomalyScores, LabelledImages, compute_metrics, labelled_test_split, score_images
from dskd.model.features import feature_table
from dskd.presets import PRESETS
from dskd.training.inputs import TrainingData, prepare
from dskd.training.run import TrainingRun, objective

PARTS: dict[str, dict[str, Any]] = {
    "dskd: encoder trained alone": {"student_decoder": False},
    "dskd: decoder trained alone, fed by the teacher": {"student_encoder": False, "decoder_input": "teacher"},
    "dskd: embedding detached": {"detach_embedding": True},
}
SCORED_BY: dict[str, dict[str, Any]] = {
    "both": {},
    "encoder's map": {"decoder_score_weight": 0.0},
    "decoder's map": {"encoder_score_weight": 0.0},
}
NEAREST = "nearest neighbours"
FIGURES = ("image_auroc", "pixel_auroc", "aupro", "aupro_rd")

# Image AUROC, pixel AUROC and PRO as published; each method defines PRO differently, and none as we do.
PUBLISHED: dict[tuple[str, str], str] = {
    ("stfpm", "hazelnut"): "1.000 / .985 / .952 (authors' README, ResNet18)",
    ("stfpm", "screw"): ".895 / .989 / .949 (authors' README, ResNet18)",
    ("stfpm", "transistor"): ".939 / .819 / .881 (authors' README, ResNet18)",
    ("rd4ad", "hazelnut"): ".999 / .989 / .955 (paper, WideResNet50-2)",
    ("rd4ad", "screw"): ".970 / .996 / .982 (paper, WideResNet50-2)",
    ("rd4ad", "transistor"): ".967 / .925 / .780 (paper, WideResNet50-2)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    data: Path
    """Folder of categories; dskd check-data lists the supported layouts."""
    results: Path
    """File of finished runs, one JSON object per line; new runs are appended."""
    categories: tuple[str, ...] = ()
    """Categories to train on; all by default."""
    presets: tuple[str, ...] = tuple(PRESETS)
    """Methods to train."""
    parts: bool = False
    """Also train DSKD's students alone, and together without the decoder's gradient into the encoder."""
    memory_share: float = 0.05
    """Share of the good images' patches that the reference without students keeps; 0: no such reference."""
    seeds: tuple[int, ...] = (0,)
    image_size: int = 256
    steps: int | None = None
    """Optimiser steps of every run; by default those of the preset."""
    epochs: int | None = None
    """Length of every run in epochs instead."""
    steps_of: dict[str, int] = field(default_factory=dict)
    """Steps of single presets, such as `--steps-of stfpm 800 rd4ad 500`; DSKD's parts use those of DSKD."""
    batch_size: int | None = None
    """Images per batch; by default that of the preset."""
    set: dict[str, str] = field(default_factory=dict)
    """Other configuration fields of every run, such as `--set backbone test_resnet`; values are JSON or plain words."""
    teacher_weights: str = "hub"
    """hub, a .safetensors or .pth file, or random."""
    textures: Path | None = None
    """Folder of texture images for the synthetic defects."""
    device: str = "cpu"
    cache_dir: Path = field(default_factory=default_folder)
    cache_gb: float = 20.0


def methods(options: Options) -> dict[str, RunConfig]:
    """Configurations of one category and seed, by their name in the table."""
    if unknown := [name for name in (*options.presets, *options.steps_of) if name not in PRESETS]:
        raise ValueError(f"unknown preset {unknown[0]!r}; known: {', '.join(PRESETS)}.")
    if not 0 <= options.memory_share <= 1:
        raise ValueError(f"--memory-share must lie in [0, 1], got {options.memory_share}.")
    chosen: dict[str, dict[str, Any]] = {name: {} for name in options.presets}
    if options.parts:
        chosen |= PARTS
    found = {}
    if options.memory_share:
        values = {"image_size": options.image_size} | field_values(options.set)
        found[f"{NEAREST}, {100 * options.memory_share:g}% kept"] = PRESETS["dskd"].with_values(values).for_inputs()
    for name, values in chosen.items():
        preset = name.partition(":")[0]
        own = options.steps_of.get(preset)
        length = given_length(options.steps, options.epochs) if own is None else {"steps": own}
        given = {"image_size": options.image_size, "batch_size": options.batch_size, **length}
        changes = {key: value for key, value in given.items() if value is not None}
        found[name] = PRESETS[preset].with_values(values | changes | field_values(options.set))
    if any(config.data.tile for config in found.values()):
        raise ValueError("methods are compared on whole images; tiles are measured by benchmarks/geometry.py.")
    return found


def remember(
    name: str, config: RunConfig, inputs: TrainingData, share: float, data: Path, device: torch.device,
    cache: ArrayCache | None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate the reference without students; its figures are those of the best and of the last step alike."""
    started = time.perf_counter()
    width, height = config.data.input_size
    memory = build_memory(inputs.train_features, device, share, config.train.seed)
    truth = _test_split(config, inputs, data)
    table = feature_table(inputs.teacher, truth.images, device, cache=cache)
    figures = _figures(score_by_memory(table, memory, (height, width), device, truth.inside), truth)
    seen = score_by_memory(inputs.validation_features, memory, (height, width), device, inputs.validation.inside)
    validated = compute_metrics(seen, inputs.validation)
    print(f"{inputs.category}  {name}  {len(memory)} patches", file=sys.stderr, flush=True)
    return {
        "category": inputs.category,
        "method": name,
        "best_step": None,
        "num_steps": None,
        "validation": objective(validated),
        "seconds_per_step": None,
        "figures": [{"chosen": chosen, "scored_by": "its own map", **figures} for chosen in ("best", "last")],
        **_circumstances(config, inputs, len(truth.images), device, started),
    }


def _test_split(config: RunConfig, inputs: TrainingData, data: Path) -> LabelledImages:
    geometry = Geometry.of(config.data, inputs.region)
    return labelled_test_split(data, inputs.category, geometry, layout=config.data.layout)


def _figures(seen: AnomalyScores, truth: LabelledImages) -> dict[str, float | None]:
    """All metrics by name; None for those that do not exist, as no image has a mask, or only a part is inspected."""
    scores = compute_metrics(seen, truth)._asdict()
    is_known = truth.masks.any() and truth.inside is None
    scores["aupro_rd"] = (
        metrics.aupro_rd(seen.maps[truth.has_mask], truth.masks[truth.has_mask]) if is_known else math.nan
    )
    return {figure: value if math.isfinite(value) else None for figure, value in scores.items()}


def _circumstances(
    config: RunConfig, inputs: TrainingData, num_test: int, device: torch.device, started: float
) -> dict[str, Any]:
    """With what a run was made."""
    return {
        "seconds": time.perf_counter() - started,
        "num_train": len(inputs.train_images),
        "num_test": num_test,
        "config": config.to_dict(),
        "teacher": inputs.teacher_source,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "command": shlex.join(sys.argv),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def run(
    name: str, config: RunConfig, inputs: TrainingData, data: Path, device: torch.device, cache: ArrayCache | None
) -> dict[str, Any]:
    """Train and evaluate one method; `figures` has the metrics at the best validation and at the end, for each map."""
    started = time.perf_counter()
    distillation = TrainingRun.begin(config, inputs, device)
    seconds = 0.0
    for progress in distillation.intervals():
        seconds += progress.interval.seconds
        print(
            f"{inputs.category}  {name}  seed {config.train.seed}  step {distillation.step}/{distillation.num_steps}  "
            f"loss {progress.interval.loss:.4f}  validation {progress.objective:.4f}  {seconds:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    last = {name: tensor.detach().clone() for name, tensor in distillation.students.state_dict().items()}
    truth = _test_split(config, inputs, data)
    table = feature_table(inputs.teacher, truth.images, device, cache=cache)
    is_pair = config.model.student_encoder and config.model.student_decoder
    figures = []
    for chosen, weights in (("best", distillation.best_weights), ("last", last)):
        distillation.students.load_state_dict(weights)
        for scored_by, values in SCORED_BY.items() if is_pair else [("its own map", {})]:
            seen = score_images(
                table, distillation.students, truth.images, config.with_values(values), device, inside=truth.inside
            )
            figures.append({"chosen": chosen, "scored_by": scored_by, **_figures(seen, truth)})
    return {
        "category": inputs.category,
        "method": name,
        "best_step": distillation.history[distillation.best_interval].interval.step,
        "num_steps": distillation.step,
        "validation": distillation.best_objective,
        "seconds_per_step": seconds / distillation.step,
        "figures": figures,
        **_circumstances(config, inputs, len(truth.images), device, started),
    }


def key_of(name: str, config: RunConfig, inputs: TrainingData) -> str:
    """Digest of everything that a run's metrics depend on: configuration, images, teacher and textures."""
    content = [inputs.category, inputs.data_sha256, inputs.teacher_sha256, inputs.textures_sha256]
    parts = [name, config.to_dict(), *content]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def missing_and_known(options: Options) -> Iterator[dict[str, Any]]:
    """The record of every requested run; a run that is not in the results file is trained."""
    device = computing_device(options.device)
    cache = ArrayCache(options.cache_dir, int(options.cache_gb * 1e9)) if options.cache_gb > 0 else None
    known = finished_runs(options.results)
    wanted = methods(options)
    layout = next(iter(wanted.values())).data.layout
    for category in options.categories or tuple(find_categories(options.data, layout)):
        inputs: dict[RunConfig, TrainingData] = {}
        for seed in options.seeds:
            for name, unseeded in wanted.items():
                config = unseeded.with_values({"seed": seed})
                needs = config.for_inputs()
                if needs not in inputs:
                    inputs[needs] = prepare(
                        config,
                        DataSpec(
                            data=options.data,
                            category=category,
                            teacher=TeacherSource(options.teacher_weights),
                            textures=options.textures,
                        ),
                        device=device,
                        cache=cache,
                        on_amplification=lambda epoch: print(
                            f"stage I epoch {epoch.number + 1}  {epoch.seconds:.1f} s", file=sys.stderr, flush=True
                        ),
                    )
                key = key_of(name, config, inputs[needs])
                if key not in known:
                    if name.startswith(NEAREST):
                        found = remember(name, config, inputs[needs], options.memory_share, options.data, device, cache)
                    else:
                        found = run(name, config, inputs[needs], options.data, device, cache)
                    record = {"key": key, **found}
                    add_run(options.results, record)
                    known[key] = record
                yield known[key]


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """One row per category, method and map: mean over seeds (± standard deviation), chosen and at the end."""
    lines = [
        "| category | method | scored by | image AUROC | pixel AUROC | AUPRO | AUPRO as RD4AD's code | at the end: "
        "image / pixel / AUPRO | chosen step | batch | s per step | seeds | published: image / pixel / their PRO |",
        "|" + "---|" * 13,
    ]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        for scored_by in dict.fromkeys(entry["scored_by"] for entry in record["figures"]):
            groups.setdefault((record["category"], record["method"], scored_by), []).append(record)
    for (category, method, scored_by), runs in groups.items():
        figures = {
            chosen: {figure: [figures_of(record, chosen, scored_by)[figure] for record in runs] for figure in FIGURES}
            for chosen in ("best", "last")
        }
        cells = [
            category,
            method,
            scored_by,
            *(_spread(figures["best"][figure]) for figure in FIGURES),
            " / ".join(_spread(figures["last"][figure]) for figure in FIGURES[:3]),
            *(
                ("–", "–", "–")
                if runs[0]["best_step"] is None
                else (
                    f"{', '.join(str(record['best_step']) for record in runs)} of {runs[0]['num_steps']}",
                    str(runs[0]["config"]["train"]["batch_size"]),
                    f"{median(record['seconds_per_step'] for record in runs):.2g}",
                )
            ),
            str(len(runs)),
            PUBLISHED.get((method, category), ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figures_of(record: dict[str, Any], chosen: str, scored_by: str) -> dict[str, Any]:
    """The metrics of a run's students, `chosen` "best" or "last", with one of its maps."""
    (found,) = (entry for entry in record["figures"] if (entry["chosen"], entry["scored_by"]) == (chosen, scored_by))
    return dict(found)


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    return f"{mean(known):.3f}" + (f" ± {stdev(known):.3f}" if len(known) > 1 else "")


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(Options, description=__doc__, args=arguments)
    try:
        records = list(missing_and_known(options))
    except (ValueError, OSError) as error:
        sys.exit(f"presets: error: {error}")
    print(markdown(records))
    first = records[0]
    images = {record["category"]: (record["num_train"], record["num_test"]) for record in records}
    described = ", ".join(f"{name} ({train} to train, {test} to test)" for name, (train, test) in images.items())
    print(f"\n{described}; image size {options.image_size}; teacher {first['teacher']}; torch {first['torch']}, "
          f"{first['device']}, {first['threads']} threads of {first['cpus']} CPUs")  # fmt: skip
    print(
        "Published figures are on the whole category at full size and with other PRO variants; ours may be an excerpt."
    )
    print_commands(records)


if __name__ == "__main__":
    main()
