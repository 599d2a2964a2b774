"""How well a search chooses: a bank of trained candidates, and what each way of choosing makes of it.

    python benchmarks/selection.py --data DIR DIR --teacher-weights FILE --results bank.jsonl --images 20 50

Every category is cut to each of the given numbers of good images, drawn with a seed (0: all of them), and these are cut
into folds. Candidates are the untuned preset and others drawn from its default space, the same in all categories.

- Old way: one fold is held out; one half of it chooses, the other sets the thresholds (dskd train's split).
- New way: each candidate is trained without the first fold, all of which chooses. The best few and the untuned preset
  are then trained without each other fold; the best that is ahead of the preset by more than the error wins, else the
  preset.

Test labels are read by this benchmark alone, to say how good the choices were. Training goes on where it was stopped,
and the tables are made of what the results file holds.
"""

import hashlib
import itertools
import json
import math
import random
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from runs import Run, add_run, field_values, finished_runs, print_commands

from dskd.anomaly import anomaly_maps, image_scores
from dskd.calibration import nearest_threshold
from dskd.config import DataSpec, RunConfig, ScoreConfig, TeacherSource
from dskd.data.cache import ArrayCache, default_folder
from dskd.data.datasets import find_categories, read_category, split_calibration
from dskd.data.geometry import Geometry
from dskd.data.samples import Sample, split_key
from dskd.device import computing_device
from dskd.evaluate import AnomalyScores, LabelledImages, compute_metrics, disagreements, labelled_test_split
from dskd.model.features import FeatureTable, feature_table
from dskd.model.network import build_students
from dskd.presets import PRESETS
from dskd.training.evidence import Evidence, resampled_objectives
from dskd.training.inputs import TrainingData, prepare
from dskd.training.loop import Interval, NonFiniteLossError, build_optimizer, fit
from dskd.training.recorded import quickest_step
from dskd.training.run import objective
from dskd.training.score_search import CoarseImages, draw_scores, search_scores
from tune.settings.space import Choice, Range, default_dimensions, with_suggestions
from tune.study.finalists import measure_gains, winning

ALL = -1
"""The fold of a training that sees every good image."""
NUM_SCORES = 10
"""Score configurations of the table of candidates, for each trained student."""
CHOOSING = (5, 10, 20)
"""Numbers of held-out good images of that table, beside all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    data: tuple[Path, ...]
    """Folders of categories."""
    results: Path
    """File of finished trainings, one JSON object per line; new ones are appended."""
    categories: tuple[str, ...] = ()
    """Categories to train on; all by default."""
    images: tuple[int, ...] = (20, 50)
    """Numbers of good images that a category is cut to; 0: all of them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Which images are drawn, and the students' seed."""
    preset: str = "stfpm"
    candidates: int = 6
    """Trained configurations, the untuned preset among them."""
    finalists: int = 2
    folds: int = 5
    steps: int = 120
    image_size: int = 96
    batch_size: int = 8
    score_candidates: int = 200
    """Score configurations that a trained candidate may take without retraining."""
    min_gain_errors: float = 1.5
    """By how many errors a finalist must be ahead of the preset."""
    set: dict[str, str] = field(default_factory=dict)
    """Other configuration fields of every training; values are JSON or plain words."""
    teacher_weights: str = "hub"
    """hub, lite0, a .safetensors or .pth file, or random."""
    device: str = "cpu"
    """auto, cpu, cuda or cuda:N."""
    only_table: bool = False
    """Train nothing, and show what the results file holds."""
    cache_dir: Path = field(default_factory=default_folder)
    cache_gb: float = 20.0

    @property
    def base(self) -> RunConfig:
        """The untuned preset at this benchmark's size."""
        return PRESETS[self.preset].with_values(
            {"image_size": self.image_size, "batch_size": self.batch_size, "steps": self.steps, "folds": self.folds}
            | field_values(self.set)
        )


def candidates_of(options: Options) -> list[RunConfig]:
    """The configurations of the bank: the preset, then others drawn from its default space."""
    base, rng = options.base, random.Random(0)
    found = [base]
    while len(found) < options.candidates:
        values = {name: _drawn(dimension, rng) for name, dimension in default_dimensions(base).items()}
        found.append(with_suggestions(base, values))
    return found


def _drawn(dimension: Range | Choice, rng: random.Random) -> Any:
    if isinstance(dimension, Choice):
        return rng.choice(dimension.options)
    low, high = dimension.low, dimension.high
    value = math.exp(rng.uniform(math.log(low), math.log(high))) if dimension.log else rng.uniform(low, high)
    return round(value) if isinstance(low, int) and isinstance(high, int) else value


class Cell(NamedTuple):
    """One category cut to so many images with one seed."""

    category: str
    num_good: int
    seed: int


class Bank:
    """The finished trainings, and how a missing one is made."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._known = finished_runs(options.results)
        self._device = computing_device(options.device)
        self._cache = ArrayCache(options.cache_dir, int(options.cache_gb * 1e9)) if options.cache_gb > 0 else None
        self._tests: dict[tuple[str, str], tuple[LabelledImages, FeatureTable]] = {}
        self._inputs: tuple[Any, TrainingData | None] = (None, None)

    def get(self, root: Path, cell: Cell, number: int, config: RunConfig, fold: int) -> Run | None:
        """The record of one candidate, trained without one fold (`ALL`: on everything); None if it is missing."""
        digest = config_digest(config, PRESETS[self._options.preset])
        key = f"{self._options.preset}/{cell.category}/{cell.num_good}/{cell.seed}/{number}/{fold}/{digest}"
        if key not in self._known and not self._options.only_table:
            record = {"key": key, **cell._asdict(), "candidate": number, "fold": fold}
            record |= self._trained(root, cell, config, fold) | {"command": shlex.join(sys.argv)}
            add_run(self._options.results, record)
            self._known[key] = record
        return self._known.get(key)

    def _trained(self, root: Path, cell: Cell, config: RunConfig, fold: int) -> Run:
        started = time.perf_counter()
        config = config.with_values({"fold": max(fold, 0), "seed": cell.seed, "split_seed": cell.seed})
        inputs = self._prepared(root, cell, config)
        test, table = self._test(root, inputs, config)
        if fold == ALL:
            inputs = with_all_images(inputs)
        found = train(config, inputs, test, table, self._options.score_candidates, fold, self._device)
        print(f"{cell}  fold {fold}  {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
        return {"config": config.to_dict(), "seconds": time.perf_counter() - started, **found}

    def _prepared(self, root: Path, cell: Cell, config: RunConfig) -> TrainingData:
        wanted = (cell, config.for_inputs())
        if self._inputs[0] != wanted:
            with TemporaryDirectory(prefix="dskd-") as temporary:
                cut(root, cell, Path(temporary))
                spec = DataSpec(
                    data=Path(temporary), category=cell.category, teacher=TeacherSource(self._options.teacher_weights)
                )
                self._inputs = wanted, prepare(config, spec, device=self._device, cache=self._cache)
        assert self._inputs[1] is not None
        return self._inputs[1]

    def _test(self, root: Path, inputs: TrainingData, config: RunConfig) -> tuple[LabelledImages, FeatureTable]:
        key = (inputs.category, inputs.teacher_sha256)
        if key not in self._tests:
            truth = labelled_test_split(root, inputs.category, Geometry.of(config.data, inputs.region))
            self._tests = {key: (truth, feature_table(inputs.teacher, truth.images, self._device, cache=self._cache))}
        return self._tests[key]


def config_digest(config: RunConfig, preset: RunConfig) -> str:
    """Digest of the fields that differ from the preset, so that a bank outlives fields that are new to all."""
    usual = preset.flat()
    changed = {name: value for name, value in config.flat().items() if value != usual[name]}
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]


def cut(root: Path, cell: Cell, folder: Path) -> None:
    """Link the cell's good images into a category of the same name below `folder`; file names stay."""
    samples: Sequence[Sample] = read_category(root, cell.category).train
    if cell.num_good:
        samples = sorted(samples, key=lambda sample: split_key(sample.path, cell.seed))[: cell.num_good]
    good = folder / cell.category / "train" / "good"
    good.mkdir(parents=True)
    for sample in samples:
        (good / sample.path.name).symlink_to(sample.path.resolve())


def with_all_images(inputs: TrainingData) -> TrainingData:
    """The same with the held-out images among those to train on; nothing is held out then."""
    held = len(inputs.calibration_images)
    rows = inputs.train_features.rows, inputs.calibration_features.rows
    return inputs._replace(
        train_images=np.concatenate([inputs.train_images, inputs.calibration_images[:held]]),
        train_features=inputs.train_features._replace(rows=np.concatenate(rows)),
    )


class Chooser(NamedTuple):
    """A rule that keeps the students of some validation, and the images that it looks at."""

    name: str
    indices: np.ndarray | None
    """Of the validation images; None: it looks at none."""


def train(
    config: RunConfig,
    inputs: TrainingData,
    test: LabelledImages,
    table: FeatureTable,
    score_candidates: int,
    fold: int,
    device: torch.device,
) -> Run:
    """Train once and say what each rule to choose students makes of it: the best step by all or by half of the fold,
    the last step, and an exponential moving average.
    """
    truth = inputs.validation
    students = build_students(config.model, inputs.teacher, config.train.seed).to(device)
    average = torch.optim.swa_utils.AveragedModel(
        students, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.95), use_buffers=True
    )
    half = half_of(inputs, config)
    best: dict[str, tuple[float, int, dict[str, torch.Tensor]]] = {}
    optimizer = build_optimizer(students, config.train)
    try:
        features = inputs.train_features
        for each in fit(
            students, optimizer, inputs.train_images, features, config, device=device, take_step=quickest_step(device)
        ):
            if not isinstance(each, Interval):
                average.update_parameters(students)
                continue
            found = disagreements(inputs.validation_features, students, truth.images, device)
            seen = scored(found, config.score, truth)
            for name, chosen in (("whole", None), ("half", half)):
                value = objective(compute_metrics(part_of_scores(seen, chosen), part(truth, chosen)))
                if value > best.get(name, (-1.0, 0, {}))[0]:
                    best[name] = value, each.step, copy_of(students)
    except NonFiniteLossError as error:
        return {"error": str(error)}
    weights = {name: kept[2] for name, kept in best.items()}
    weights |= {"last": copy_of(students), "ema": copy_of(average.module)}
    if fold == ALL:  # what a fold would choose was trained on
        weights = {name: weights[name] for name in ("last", "ema")}
    elif fold > 0:
        weights = {"whole": weights["whole"]}
    entries: dict[str, Any] = {}
    for name, kept in weights.items():
        students.load_state_dict(kept)
        chosen = half if name == "half" else None
        held = disagreements(inputs.validation_features, students, truth.images, device)
        on_test = disagreements(table, students, test.images, device)
        entries[name] = {"step": best[name][1] if name in best else config.train.steps}
        entries[name]["given"] = figures(held, truth, chosen, on_test, test, config.score)
        if fold > 0:
            images = CoarseImages.of(held, truth.masks, truth.labels, truth.has_mask)
            replicates = resampled_objectives(images, config.score, truth.sources)
            entries[name]["given"]["replicates"] = [round(value, 5) for value in replicates]
        if fold == 0 and name in ("whole", "half"):
            looked, of_them = part_of_discrepancies(held, chosen), part(truth, chosen)
            searched = search_scores(
                looked, of_them.masks, of_them.labels, of_them.has_mask, of_them.sources, config.score,
                num_candidates=score_candidates, seed=config.train.seed,
            )  # fmt: skip
            entries[name]["delivered"] = figures(held, truth, chosen, on_test, test, searched.best)
        if fold == 0 and name == "whole":
            entries[name]["candidates"] = score_table(held, truth, on_test, test, config)
    return {"students": entries}


def figures(
    held: Any, truth: LabelledImages, chosen: np.ndarray | None, on_test: Any, test: LabelledImages, score: ScoreConfig
) -> dict[str, Any]:
    seen, seen_test = scored(held, score, truth), scored(on_test, score, test)
    metrics = compute_metrics(seen_test, test)
    return {
        "score": {name: getattr(score, name) for name in score.__dataclass_fields__},
        "objective": objective(compute_metrics(part_of_scores(seen, chosen), part(truth, chosen))),
        "test": {name: round(getattr(metrics, name), 5) for name in ("image_auroc", "pixel_auroc", "aupro")},
        "held": [round(float(value), 6) for value in seen.scores[~truth.labels]],
        "test_good": [round(float(value), 6) for value in seen_test.scores[~test.labels]],
        "test_bad": [round(float(value), 6) for value in seen_test.scores[test.labels]],
    }


def score_table(
    held: Any, truth: LabelledImages, on_test: Any, test: LabelledImages, config: RunConfig
) -> list[dict[str, Any]]:
    """Objective by so many held-out images, and the same figure on the test images, of several score configurations."""
    rng = np.random.default_rng(0)
    scores = [config.score, *draw_scores(config.score, held, rng, NUM_SCORES - 1)]
    order = rng.permutation(np.unique(truth.sources))
    parts = {str(count): np.flatnonzero(np.isin(truth.sources, order[:count])) for count in CHOOSING
             if count < len(order)} | {"all": np.arange(len(truth.labels))}  # fmt: skip
    images = CoarseImages.of(held, truth.masks, truth.labels, truth.has_mask)
    of_test = CoarseImages.of(on_test, test.masks, test.labels, test.has_mask)
    table = []
    for score in scores:
        by = dict(zip(parts, images.objectives(score, list(parts.values())), strict=True))
        table.append({"by": by, "test": of_test.objectives(score, [np.arange(len(test.labels))])[0]})
    return table


def half_of(inputs: TrainingData, config: RunConfig) -> np.ndarray:
    """Validation images that the old way would choose by: one half of the fold, and its defective copies."""
    samples = [Sample(path, "good", None) for path in inputs.calibration_paths]
    selecting, _ = split_calibration(samples, config.data.calibration_fraction, config.data.split_seed)
    chosen = [index for index, sample in enumerate(samples) if sample in set(selecting)]
    return np.flatnonzero(np.isin(inputs.validation.sources, chosen))


def scored(found: Any, score: ScoreConfig, truth: LabelledImages) -> AnomalyScores:
    maps = anomaly_maps(found, score, truth.images.shape[1])
    return AnomalyScores(maps.numpy(), image_scores(maps, score.score_top_fraction).numpy())


def part(truth: LabelledImages, indices: np.ndarray | None) -> LabelledImages:
    if indices is None:
        return truth
    images, masks, labels, has_mask, sources = (value[indices] for value in truth[:5])
    return LabelledImages(images, masks, labels, has_mask, sources)


def part_of_scores(seen: AnomalyScores, indices: np.ndarray | None) -> AnomalyScores:
    return seen if indices is None else AnomalyScores(seen.maps[indices], seen.scores[indices])


def part_of_discrepancies(found: Any, indices: np.ndarray | None) -> Any:
    if indices is None:
        return found
    parts = [None if levels is None else tuple(level[indices] for level in levels) for levels in found]
    return type(found)(*parts)


def copy_of(students: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in students.state_dict().items()}


class Result(NamedTuple):
    """What both ways made of one cell."""

    cell: Cell
    old_gain: float
    """Test figure (mean of image AUROC and AUPRO) of the old way's choice minus that of the untuned preset."""
    new_gain: float
    """The same of the new way, both as trained without the first fold."""
    winner: int
    """Candidate that the new way chose; 0: the preset stayed."""
    alarms: Mapping[str, Mapping[float, tuple[float, float, float]]]
    """(false alarms on good test images, detected defects, attainable rate) by delivery and nominal rate."""
    of_test: Mapping[str, float]
    """Test figure of what each delivery delivers."""


RATES = (0.1, 0.05, 0.02, 0.01)


def choose(options: Options, bank: Bank, root: Path, cell: Cell) -> Result | None:
    """Both ways on one cell; None if a training is missing or diverged."""
    configs = candidates_of(options)
    first = {number: bank.get(root, cell, number, config, 0) for number, config in enumerate(configs)}
    usable = {number: run["students"] for number, run in first.items() if run is not None and "students" in run}
    if 0 not in usable or len(first) > len([run for run in first.values() if run is not None]):
        return None
    old = max(usable, key=lambda number: usable[number]["half"]["delivered"]["objective"])
    ranked = sorted(usable, key=lambda number: -usable[number]["whole"]["delivered"]["objective"])
    others: dict[int, list[dict[str, Any]]] = {}
    for number in (*ranked[: options.finalists], -1):  # -1: the preset, untuned
        students = usable[max(number, 0)]["whole"]
        score = students["given" if number < 0 else "delivered"]["score"]
        config = configs[max(number, 0)].with_values({**score, "score_candidates": 0})
        runs = [bank.get(root, cell, max(number, 0), config, fold) for fold in range(1, options.folds)]
        runs += [bank.get(root, cell, max(number, 0), config, ALL)]
        if any(run is None for run in runs):
            return None
        if all("students" in run for run in runs if run is not None):
            others[number] = [run["students"] for run in runs if run is not None]
    if -1 not in others:
        return None
    of_preset, *of_finalists = (evidence_of(others[number][:-1]) for number in (-1, *sorted(others.keys() - {-1})))
    gains = measure_gains(dict(zip(map(str, sorted(others.keys() - {-1})), of_finalists, strict=True)), of_preset)
    won = winning(gains, options.min_gain_errors)
    winner = -1 if won is None else int(won.trial_id)
    kept = usable[max(winner, 0)]["whole"]["given" if winner < 0 else "delivered"]
    folds = [kept, *(each["whole"]["given"] for each in others[winner][:-1])]
    whole = others[winner][-1]
    deliveries = {
        "a: split": split_alarms(usable[old]["half"]["delivered"], cell, options),
        "b: all folds' detectors": cross_alarms(folds),
        "c: one trained on all, last step": single_alarms(folds, whole["last"]["given"]),
        "c: one trained on all, average": single_alarms(folds, whole["ema"]["given"]),
        "d: the first fold's": single_alarms(folds, kept),
    }
    preset_old, preset_new = usable[0]["half"]["given"], usable[0]["whole"]["given"]
    return Result(
        cell,
        test_figure(usable[old]["half"]["delivered"]) - test_figure(preset_old),
        test_figure(kept) - test_figure(preset_new),
        max(winner, 0),
        deliveries,
        {
            "a: split": test_figure(usable[old]["half"]["delivered"]),
            "c: one trained on all, last step": test_figure(whole["last"]["given"]),
            "c: one trained on all, average": test_figure(whole["ema"]["given"]),
            "d: the first fold's": test_figure(kept),
        },
    )


def test_figure(entry: Mapping[str, Any]) -> float:
    return float(entry["test"]["image_auroc"] + entry["test"]["aupro"]) / 2


def evidence_of(folds: Sequence[Mapping[str, Any]]) -> list[Evidence]:
    """The records of one candidate on several folds, as the search has them."""
    entries = [each["whole"]["given"] for each in folds]
    return [Evidence(each["objective"], tuple(each["replicates"]), (), tuple(each["held"])) for each in entries]


Alarms = dict[float, tuple[float, float, float]]


def split_alarms(entry: Mapping[str, Any], cell: Cell, options: Options) -> Alarms:
    """Thresholds from the half of the fold that did not choose, at the lowest rate that it vouches for."""
    held = np.array(entry["held"])
    order = np.random.default_rng(0).permutation(len(held))  # the record does not say which half: any is as good
    calibrating = held[order[len(held) // 2 :]]
    return _alarms(calibrating, np.array(entry["test_good"]), np.array(entry["test_bad"]))


def single_alarms(folds: Sequence[Mapping[str, Any]], delivered: Mapping[str, Any]) -> Alarms:
    """Thresholds from the scores of all images, each by the detector that did not see it."""
    out_of_fold = np.concatenate([each["held"] for each in folds])
    return _alarms(out_of_fold, np.array(delivered["test_good"]), np.array(delivered["test_bad"]))


def _alarms(normals: np.ndarray, good: np.ndarray, bad: np.ndarray) -> Alarms:
    found = {}
    for rate in RATES:
        limit = nearest_threshold(normals.tolist(), rate)
        alarms, hits = float((good > limit.value).mean()), float((bad > limit.value).mean())
        found[rate] = alarms, hits, limit.false_alarm_rate
    return found


def cross_alarms(folds: Sequence[Mapping[str, Any]]) -> Alarms:
    """Cross-conformal p-values: each image is compared with every held-out one under the detector of the latter's
    fold."""

    def p_values(kind: str) -> np.ndarray:
        above = [(np.array(each["held"])[None] >= np.array(each[kind])[:, None]).sum(axis=1) for each in folds]
        return np.asarray((1 + np.sum(above, axis=0)) / (1 + sum(len(each["held"]) for each in folds)))

    good, bad = p_values("test_good"), p_values("test_bad")
    lowest = 1 / (1 + sum(len(each["held"]) for each in folds))
    return {
        rate: (
            float((good <= max(rate, lowest) + 1e-12).mean()),
            float((bad <= max(rate, lowest) + 1e-12).mean()),
            max(rate, lowest),
        )
        for rate in RATES
    }


def results_of(options: Options, bank: Bank) -> Iterator[Result]:
    """The results of all cells, few images first; trains what is missing."""
    roots = {name: root for root in options.data for name in find_categories(root)}
    for count, seed in itertools.product(options.images, options.seeds):
        for category in options.categories or tuple(roots):
            found = choose(options, bank, roots[category], Cell(category, count, seed))
            if found is not None:
                yield found


def interval(values: Sequence[float], rng: np.random.Generator) -> str:
    """Mean and 90 % interval by the bootstrap."""
    if len(values) < 2:
        return f"{mean(values):+.3f}"
    means = [np.mean(rng.choice(values, len(values))) for _ in range(5000)]
    low, high = np.quantile(means, [0.05, 0.95])
    return f"{mean(values):+.3f} ({low:+.3f} to {high:+.3f})"


def gains_table(results: Sequence[Result]) -> str:
    rng = np.random.default_rng(0)
    lines = ["| category | good images | old way | new way | preset kept | cells |", "|---|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[Result]] = {}
    for each in results:
        count = str(each.cell.num_good or "all")
        for key in ((each.cell.category, count), ("all", "all")):
            groups.setdefault(key, []).append(each)
    for (category, count), cells in sorted(groups.items(), key=lambda item: item[0][0] == "all"):
        old, new = [each.old_gain for each in cells], [each.new_gain for each in cells]
        stayed = sum(each.winner == 0 for each in cells)
        lines.append(
            f"| {category} | {count} | {interval(old, rng)} | {interval(new, rng)} | {stayed} | {len(cells)} |"
        )
    return "\n".join(lines)


def deliveries_table(results: Sequence[Result]) -> str:
    """False alarms / detected defects at each nominal rate, and the test figure of what is delivered."""
    lines = [
        "| category | good images | delivery | " + " | ".join(f"{rate:.0%}" for rate in RATES) + " | test figure |",
        "|---|---|---|" + "---|" * len(RATES) + "---|",
    ]
    groups: dict[tuple[str, int, str], list[Result]] = {}
    for each in results:
        for delivery in each.alarms:
            groups.setdefault((each.cell.category, each.cell.num_good, delivery), []).append(each)
    for (category, count, delivery), cells in sorted(groups.items()):
        texts = []
        for rate in RATES:
            found = [each.alarms[delivery][rate] for each in cells]
            false, hits, rates = (mean(values) for values in zip(*found, strict=True))
            texts.append(f"{false:.1%} / {hits:.0%}" + (f" (at {rates:.1%})" if rates > rate + 1e-9 else ""))
        known = [each.of_test[delivery] for each in cells if delivery in each.of_test]
        figure = f"{mean(known):.3f}" if known else "–"
        lines.append(f"| {category} | {count or 'all'} | {delivery} | {' | '.join(texts)} | {figure} |")
    return "\n".join(lines)


def candidates_table(options: Options, bank: Bank) -> str:
    """What choosing among trained students × score configurations gives, by the number of images that choose."""
    configs = candidates_of(options)
    roots = {name: root for root in options.data for name in find_categories(root)}
    regrets: dict[str, list[tuple[float, float, float, float]]] = {}
    for count, seed in itertools.product(options.images, options.seeds):
        for category in options.categories or tuple(roots):
            cell = Cell(category, count, seed)
            runs = [bank.get(roots[category], cell, number, config, 0) for number, config in enumerate(configs)]
            tables = [run["students"]["whole"]["candidates"] for run in runs if run is not None and "students" in run]
            if len(tables) < len(configs):
                continue
            entries = [entry for table in tables for entry in table]
            tests = np.array([entry["test"] for entry in entries])
            for by in entries[0]["by"]:
                values = np.array([entry["by"][by] for entry in entries])
                chosen = tests[values.argmax()]
                ranks = float(np.corrcoef(values.argsort().argsort(), tests.argsort().argsort())[0, 1])
                regrets.setdefault(by, []).append(
                    (chosen - tests[0], chosen - tests.max(), tests.mean() - tests[0], ranks)
                )
    rng = np.random.default_rng(0)
    lines = [
        "| held-out good images that choose | minus untuned | minus best | (random minus untuned) | rank correlation "
        "| cells |",
        "|---|---|---|---|---|---|",
    ]
    for by, found in regrets.items():
        gains, losses, randoms, correlations = zip(*found, strict=True)
        lines.append(
            f"| {by} | {interval(gains, rng)} | {mean(losses):+.3f} | {mean(randoms):+.3f} | {mean(correlations):.2f} "
            f"| {len(found)} |"
        )
    return "\n".join(lines)


def epochs_table(options: Options, bank: Bank) -> str:
    """Test figure of the students of the best step by the whole fold, by half of it, the last step, and the average."""
    configs = candidates_of(options)
    roots = {name: root for root in options.data for name in find_categories(root)}
    found: dict[str, list[float]] = {}
    for count, seed in itertools.product(options.images, options.seeds):
        for category in options.categories or tuple(roots):
            for number, config in enumerate(configs):
                run = bank.get(roots[category], Cell(category, count, seed), number, config, 0)
                if run is not None and "students" in run:
                    for name, entry in run["students"].items():
                        found.setdefault(name, []).append(test_figure(entry["given"]))
    lines = ["| students of | test figure | minus best step by the whole fold | trainings |", "|---|---|---|---|"]
    rng = np.random.default_rng(0)
    for name, values in found.items():
        differences = list(np.subtract(values, found["whole"]))
        lines.append(f"| {name} | {mean(values):.3f} | {interval(differences, rng)} | {len(values)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(Options, description=__doc__, args=arguments)
    torch.set_num_threads(1)
    try:
        bank = Bank(options)
        results = list(results_of(options, bank))
    except (ValueError, OSError) as error:
        sys.exit(f"selection: error: {error}")
    for title, table in (
        ("Gain over the untuned preset, mean of image AUROC and AUPRO on the test images (90 % interval)",
         gains_table(results)),
        ("False alarms / detected defects on the test images", deliveries_table(results)),
        ("Choosing among trained students × score configurations", candidates_table(options, bank)),
        ("Students of which step", epochs_table(options, bank)),
    ):  # fmt: skip
        print(f"{title}\n\n{table}\n")
    base = options.base
    print(f"{options.preset}, {base.train.length}, batch {base.train.batch_size}, {base.data.image_size} px, "
          f"{options.candidates} candidates, {options.finalists} finalists, {options.folds} folds; "
          f"teacher {TeacherSource(options.teacher_weights).name}; torch {torch.__version__}")  # fmt: skip
    print_commands(run for run in finished_runs(options.results).values())


if __name__ == "__main__":
    main()
