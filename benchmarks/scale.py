"""What a search's driver pays for a trial and for a category, with trials that take no time: does it stay flat?

    python benchmarks/scale.py --trials 1000 --sampler tpe
    python benchmarks/scale.py --categories 500 --trials 4 --window 50

One category: its study code, Optuna and MLflow as in a search, each in a file; the worker groups are replaced by an
actor that answers at once. Every `--window` ended trials a row tells CPU seconds of this process per trial: in all,
of `suggest`, of what is written to MLflow, and of the rest (Ray Tune, the trials' records). Tune's relays and Ray's own
processes are not in it. The wall time per trial says how many such trials one driver can drive. At the end the memory
that each kind of process has of its own, and what lies in Ray's object store.

Several categories: the whole of tune/search.py, from the checks of the data to the report, but for training and
testing: workers write the detector of a trial at once. A row for every `--window` categories whose trials have ended,
and again for as many whose champions are chosen, tells what one costs. What the search says goes to stderr.
"""

import os
import platform
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import optuna
import psutil
import ray
import tyro
from PIL import Image

import tune.jobs.report
import tune.jobs.search
import tune.study.categories
import tune.trial.groups
from dskd.data.datasets import find_categories
from tune.runtime.relay import relayed
from tune.settings.plan import plan_search, resolve_addresses
from tune.settings.search import SamplerName, SearchSettings
from tune.settings.workers import Workers
from tune.storage.files import Storage
from tune.storage.inputs import CategoryInputs
from tune.study.budget import Share, Shares
from tune.study.category import search_category
from tune.study.hooks import Searcher
from tune.study.progress import SearchProgress
from tune.tracking.events import CategoryContinued, Event, TrialEnded
from tune.tracking.outbox import Outbox
from tune.tracking.tracker import Tracker
from tune.trial.assignment import News, Training
from tune.trial.groups import LoneWorker
from tune.trial.spec import CHECKPOINT, EPOCH, OBJECTIVE, TrialSpec, spec_of

_DISPATCHER = "answers-at-once"
_LOOK_SECONDS = 2.0
_NUM_IMAGES, _SIDE = 12, 32
"""Training images of a category, and their side in pixels: as small as they can be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    trials: int = 1000
    epochs: int = 3
    """Reports of a trial."""
    sampler: SamplerName = "random"
    at_once: int = 8
    """Trials at once."""
    window: int = 100
    """Ended trials, or categories if there are several, of a row."""
    categories: int = 1
    """Several: the whole of a search."""
    finalists: int = 1
    """Of several categories: trials of each that are compared with the untuned preset on the other of two folds."""
    teacher_weights: str = "random"
    """Of several categories: a file lets champions be promoted, as those of an untrained teacher never are."""


@ray.remote(num_cpus=0)
class AnswersAtOnce:
    """In place of the dispatcher and its worker groups: each assignment is known, and all its reports are there.

    The first ones have none until there are `at_once`: a relay would have ended its trial, and taken the next one,
    before Ray has started a second relay, and Ray would start processes in vain all the time.
    """

    def __init__(self, epochs: int, at_once: int) -> None:
        self._epochs, self._num_awaited = epochs, at_once
        self._known: dict[str, float] = {}

    def submit(self, assignment: Training) -> None:
        rate = float(assignment.spec.config["train"]["learning_rate"])
        self._known[assignment.key] = 0.5 + min(rate, 0.01)
        if len(self._known) >= self._num_awaited:
            self._num_awaited = 0

    def follow(self, key: str, after: int) -> News:
        if key not in self._known:
            return News(is_known=False)
        if self._num_awaited:
            time.sleep(0.1)
            return News()
        reports = tuple(
            {EPOCH: epoch, OBJECTIVE: self._known[key] + epoch / 100, CHECKPOINT: f"workers/{key}"}
            for epoch in range(max(after, 0) + 1, self._epochs + 1)
        )
        return News(reports=reports, is_over=True)

    def keep_only(self, category: str, keys: list[str]) -> None:
        self._known = {key: value for key, value in self._known.items() if key in keys}

    def drop(self, key: str) -> None:
        self._known.pop(key, None)


class Costs:
    """CPU seconds of this process, in all and of its parts."""

    def __init__(self, parts: Sequence[str] = ("suggest", "MLflow")) -> None:
        self.parts = dict.fromkeys(parts, 0.0)
        self.num_ended = 0
        self._before = (time.process_time(), time.perf_counter(), dict(self.parts), 0)

    def counting(self, part: str, act: Callable[..., Any]) -> Callable[..., Any]:
        """`act`, whose CPU time in its own thread is added to a part."""

        def counted(*args: Any, **words: Any) -> Any:
            before = time.thread_time()
            try:
                return act(*args, **words)
            finally:
                self.parts[part] += time.thread_time() - before

        return counted

    def row(self) -> str:
        """Per trial since the last row, in milliseconds."""
        cpu, wall, parts, ended = self._before
        self._before = (time.process_time(), time.perf_counter(), dict(self.parts), self.num_ended)
        number = max(1, self.num_ended - ended)
        whole = (self._before[0] - cpu) / number * 1000
        of_parts = [(self.parts[name] - parts[name]) / number * 1000 for name in parts]
        took = (self._before[1] - wall) / number * 1000
        cells = [whole, *of_parts, whole - sum(of_parts), took]
        return f"| {self.num_ended} | {' | '.join(f'{cell:.0f}' for cell in cells)} |"


class TrainsAtOnce(LoneWorker):
    """A worker that takes assignments from the real dispatcher, and has their results without any training."""

    def serve(self, dispatcher: str, slots: Sequence[str], first: TrialSpec | None, gpus: float) -> None:
        import tune.trial.member

        member: Any = tune.trial.member
        member.train = trained_at_once
        figures = {f"test/{name}": 0.9 for name in ("image_auroc", "pixel_auroc", "aupro")}
        member.evaluate_on_test = lambda assignment, device: figures
        super().serve(dispatcher, slots, None, gpus)


def trained_at_once(spec: TrialSpec, *_: Any) -> Iterator[Any]:
    """In place of a training: all its reports, and a detector of one weight with the last one."""
    import torch

    from dskd.calibration import calibrate
    from dskd.checkpoint import DetectorRecord, write_detector
    from dskd.config import RunConfig
    from dskd.training.evidence import NUM_REPLICATES, Evidence
    from tune.storage.temporary import temporary_folder
    from tune.storage.uris import DETECTOR_FOLDER, EVIDENCE_FILE
    from tune.trial.spec import CATEGORY, DATA_SHA256, Report

    config = RunConfig.from_dict(spec.config)
    value = 0.5 + min(config.train.learning_rate, 0.01)
    last = config.train.num_validations
    for epoch in range(1, last + 1):
        objective = value + epoch / 100
        metrics = {EPOCH: epoch, OBJECTIVE: objective, CATEGORY: spec.category, "val/objective": objective}
        metrics |= {"train/loss": 1 / epoch, "time/train_seconds": 0.0, "time/validation_seconds": 0.0}
        metrics[DATA_SHA256] = f"{config.data.fold:064x}"
        if epoch < last:
            yield Report(metrics, None)
    scores = tuple(1 + index / 100 for index in range(_NUM_IMAGES // 2))
    names = tuple(f"{index:03}.png" for index in range(len(scores)))
    record = DetectorRecord(
        category=spec.category, config=config, teacher=Path(spec.teacher_weights).name, teacher_sha256="0" * 64,
        data_sha256=str(metrics[DATA_SHA256]), validation_files=names, calibration_files=names, step=1,
        thresholds=calibrate(scores), metrics={"val/objective": objective}, normal_scores=scores,
        num_folds=config.data.folds,
    )  # fmt: skip
    with temporary_folder() as folder:
        write_detector(folder / DETECTOR_FOLDER, record, {"weight": torch.zeros(1)})
        evidence = Evidence(objective, (objective,) * NUM_REPLICATES, names, scores)
        (folder / EVIDENCE_FILE).write_text(evidence.to_json())
        yield Report(metrics, folder)


class Used(NamedTuple):
    """What was used since the start, in seconds."""

    cpu: float
    """Of this process."""
    wall: float
    parts: dict[str, float]
    """CPU seconds of parts of it."""
    studies: float
    """CPU seconds of the processes of the categories' studies."""


class Whole:
    """What a search of many categories costs: this process by its parts, and the processes below it by their kind."""

    parts = ("MLflow", "progress", "inputs", "pictures")

    def __init__(self) -> None:
        self.costs = Costs(self.parts)
        self.of_kinds: dict[str, float] = defaultdict(float)
        """CPU seconds."""
        self._known: dict[int, tuple[str, float]] = {}
        """Kind and CPU seconds by process."""
        self._looking = 0.0
        self._counted: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._before = self._now()

    def look(self) -> None:
        """Add up what the processes below this one have used since the last look; itself it does not count."""
        began = time.thread_time()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                times, name = process.cpu_times(), process.name().partition(".")[0]
                kind, before = self._known.get(process.pid, ("", 0.0))
                kind = kind if name in ("ray::IDLE", "python") and kind else name
                used = times.user + times.system
                self.of_kinds[kind] += used - before
                self._known[process.pid] = (kind, used)
        self._looking += time.thread_time() - began

    @contextmanager
    def looking(self) -> Iterator[None]:
        """`look` again and again while the block runs."""
        has_ended = threading.Event()

        def again() -> None:
            while not has_ended.wait(_LOOK_SECONDS):
                self.look()

        thread = threading.Thread(target=again, name="looks", daemon=True)
        thread.start()
        try:
            yield
        finally:
            has_ended.set()
            thread.join()

    def _now(self) -> Used:
        studies = sum(used for kind, used in self.of_kinds.items() if "search_category" in kind)
        return Used(time.process_time() - self._looking, time.perf_counter(), dict(self.costs.parts), studies)

    def row(self, what: str, number: int, last: int) -> str:
        """Since the last row, divided by `number`; `last` is what to count up to."""
        before, now = self._before, self._now()
        self._before = now
        cpu, parts = now.cpu - before.cpu, [now.parts[name] - before.parts[name] for name in self.parts]
        figures = [cpu, *parts, cpu - sum(parts), now.studies - before.studies, now.wall - before.wall]
        process = psutil.Process()
        cells = [f"{figure / number * 1000:.0f}" for figure in figures]
        cells += [f"{process.num_threads()}", f"{process.num_fds()}", f"{process.memory_full_info().uss / 2**20:.0f}"]
        return f"| {what} | {last} | {' | '.join(cells)} |"

    def ends(self, what: str, window: int, act: Callable[..., Any]) -> Callable[..., Any]:
        """`act` on one category, with a row after each `window` of them."""

        def counted(*args: Any, **words: Any) -> Any:
            found = act(*args, **words)
            with self._lock:
                self._counted[what] += 1
                if self._counted[what] % window == 0:
                    tell(self.row(what, window, self._counted[what]))
            return found

        return counted


def drive_many(options: Options, folder: Path) -> int:
    """Search many categories below `folder`, printing what each part costs; returns how many have a champion."""
    draw_categories(folder, options.categories)
    asked = SearchSettings(
        data=str(folder / "data"), name="scale", storage=str(folder / "results"), trials=options.trials,
        epochs=options.epochs, sampler=options.sampler, max_concurrent=options.at_once, image_size=_SIDE, batch_size=4,
        folds=2, finalists=options.finalists, teacher_weights=options.teacher_weights, score_candidates=0,
        cpus_per_worker=(os.cpu_count() or 1) / options.at_once,
    )  # fmt: skip
    whole = Whole()
    categories: Any = tune.study.categories
    counting = whole.costs.counting
    Tracker._write = counting("MLflow", Tracker._write)  # type: ignore[method-assign]
    Outbox.write_now = counting("MLflow", Outbox.write_now)  # type: ignore[method-assign]
    SearchProgress.show = counting("progress", SearchProgress.show)  # type: ignore[method-assign]
    CategoryInputs.verify = counting("inputs", CategoryInputs.verify)  # type: ignore[method-assign]
    categories._draw_study = counting("pictures", categories._draw_study)
    tune.trial.groups.LoneWorker = TrainsAtOnce  # type: ignore[misc]
    run_search, found = categories.run_search, []

    def searched(*args: Any) -> Any:
        tell(whole.row("prepared", options.categories, options.categories))
        found.extend(run_search(*args))
        tell(f"\n{memory()}\n")
        whole.row("", 1, 0)
        return found

    categories.run_search = searched
    categories.study_one = whole.ends("trials", options.window, categories.study_one)
    categories.conclude_one = whole.ends("champions", options.window, categories.conclude_one)
    of_process = ("studies", "wall ms", "threads", "files", "MiB")
    columns = ["", "categories", "CPU ms each", *whole.parts, "the rest", *of_process]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    with whole.looking():
        tune.jobs.search.search(asked)
    print(whole.row("reported", options.categories, options.categories))
    page = (folder / "results" / "scale" / "report.html").stat().st_size
    stored = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"\nthe report: {page / 2**20:.1f} MiB; all files: {stored / 2**20:.0f} MiB; CPU seconds of processes:")
    for kind, used in sorted(whole.of_kinds.items(), key=lambda item: -item[1]):
        print(f"{kind}: {used:.0f}")
    return sum(result.champion is not None for result in found)


def tell(line: str) -> None:
    """Print to stdout, which a search leaves to its JSON document."""
    print(line, file=sys.__stdout__, flush=True)


def draw_categories(folder: Path, number: int) -> None:
    """Write a few images to `folder`, and link them into so many categories in its folder `data`."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for index in range(_NUM_IMAGES):
        drawn = Image.fromarray(random.integers(0, 255, (_SIDE, _SIDE, 3), dtype=np.uint8))
        drawn.save(folder / "images" / f"{index:03}.png")
    for category in range(number):
        good = folder / "data" / f"part-{category:04}" / "train" / "good"
        good.mkdir(parents=True)
        for image in (folder / "images").iterdir():
            os.link(image, good / image.name)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, ray {ray.__version__}, optuna {optuna.__version__}")
    if options.categories > 1:
        print(
            f"{options.categories} categories, each {options.trials} trials of {options.epochs} reports, sampler "
            f"{options.sampler}, {options.at_once} at once, {options.finalists} finalists\n"
        )
        with tempfile.TemporaryDirectory(prefix="dskd-scale-") as folder:
            num_champions = drive_many(options, Path(folder))
        print(f"\n{num_champions} categories have a champion", flush=True)
        return
    print(
        f"{options.trials} trials of {options.epochs} reports, sampler {options.sampler}, {options.at_once} at once\n"
    )
    print(
        "| trials ended | CPU ms a trial | suggest | MLflow | the rest | wall ms a trial |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(prefix="dskd-scale-") as folder:
        num_finished = drive(options, Path(folder))
    print(f"\n{num_finished} trials finished, the others were pruned", flush=True)


def drive(options: Options, folder: Path) -> int:
    """Search one category below `folder`, printing a row for every window; returns how many trials finished."""
    (folder / "data" / "bolt" / "train" / "good").mkdir(parents=True)
    (folder / "data" / "bolt" / "train" / "good" / "0.png").touch()
    asked = SearchSettings(
        data=str(folder / "data"), name="scale", storage=str(folder / "results"), teacher_weights="random",
        trials=options.trials, epochs=options.epochs, sampler=options.sampler, max_concurrent=options.at_once,
    )  # fmt: skip
    addresses = resolve_addresses(asked)
    assert list(find_categories(folder / "data")) == ["bolt"]
    plan = plan_search(asked, addresses, folder / "data")
    Storage(addresses.home)
    spec = spec_of(plan, "bolt", Workers(1, 1.0, 0.0), revision="")
    costs = Costs()
    Searcher.suggest = costs.counting("suggest", Searcher.suggest)  # type: ignore[method-assign]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    held = AnswersAtOnce.options(name=_DISPATCHER).remote(options.epochs, min(options.at_once, options.trials))  # type: ignore[attr-defined]
    shares = ray.remote(Shares).options(num_cpus=0).remote(1, 1)
    Tracker._write = costs.counting("MLflow", Tracker._write)  # type: ignore[method-assign]
    tracker = Tracker(addresses.tracking, "scale", artifact_location=None, tags={}, unsent=folder / "unsent.jsonl")

    def handle(event: Event | CategoryContinued) -> None:
        if isinstance(event, CategoryContinued):
            return
        tracker.put(event)
        if isinstance(event, TrialEnded):
            costs.num_ended += 1
            if costs.num_ended % options.window == 0:
                print(costs.row(), flush=True)

    try:
        with relayed(handle, print) as events:
            found = search_category(
                plan.of_category("bolt", plan.spaces["bolt"]), spec, Share(shares), events, None, _DISPATCHER
            )
        if num_unsent := tracker.close(600):
            print(f"{num_unsent} events were not written to MLflow", file=sys.stderr)
        print(f"\n{memory()}", flush=True)
    finally:
        ray.kill(cast(Any, held))
        ray.shutdown()
    return len(found.finished)


def memory() -> str:
    """MiB of their own of this process and of those below it, by name, and the bytes in the object store."""
    whole, free = ray.cluster_resources(), ray.available_resources()
    stored = (whole["object_store_memory"] - free.get("object_store_memory", 0.0)) / 2**20
    found: dict[str, list[float]] = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        is_this = process.pid == os.getpid()
        with suppress(psutil.NoSuchProcess):
            # A Ray worker's name holds what it does now, such as ray::ImplicitFunc.train.
            name = "this process" if is_this else process.name().partition(".")[0]
            found.setdefault(name, []).append(process.memory_full_info().uss / 2**20)
    rows = [f"{len(each)} x {name}: {max(each):.0f} MiB" for name, each in sorted(found.items())]
    return "\n".join([*rows, f"object store: {stored:.1f} MiB"])


if __name__ == "__main__":
    main()
