"""The report of a search: what Optuna, MLflow and the storage know, in one document and one HTML file."""

import datetime
import importlib.metadata
import logging
import platform
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import optuna

from dskd.checkpoint import RECORD_FILE, DetectorRecord
from dskd.config import VERSION
from dskd.report.document import CategoryReport, Command, Fact, Inspected, Limit, Report, Trial, to_json
from dskd.report.judgement import MAX_RATE, judge
from dskd.report.render import render
from tune.jobs.report_trials import importance_of, trials_of
from tune.settings.plan import SearchPlan
from tune.settings.space import describe_changes
from tune.storage.champions import Champion, find_inspected
from tune.storage.files import Storage
from tune.storage.shown import command, shown, shown_url, without_secrets
from tune.storage.temporary import temporary_folder
from tune.study.categories import CategoryResult, pull_command
from tune.study.database import StudyStorage
from tune.tracking.outbox import TrackingRefusedError, TrackingUnavailableError
from tune.tracking.registry import model_name
from tune.tracking.tracker import Tracker
from tune.trial.evaluation import TABLE_RATE

logger = logging.getLogger(__name__)

REPORT_PAGE, REPORT_DOCUMENT = "report.html", "report.json"
_FEW_TEST_IMAGES = 20
"""Fewer good or defective test images than this are a caveat: one image is then more than 5 %."""
_MOST_ON_A_PAGE = 10
"""Categories up to which the run of each gets the page of them all: of N it would be N pages of N categories."""
_LIBRARIES = ("torch", "timm", "ray", "optuna", "mlflow")
_TRACKING_PATIENCE = 60.0
"""Seconds to wait for an absent tracking server; the report lies in the storage already."""


class Written(NamedTuple):
    """A report in the storage."""

    page: str
    """Address or path of the HTML file; empty if there is none."""
    remark: str = ""
    """What went wrong, in one line; empty if nothing did."""


class Run(NamedTuple):
    """The command whose search has ended."""

    began: float
    """`time.monotonic()` at its start."""
    arguments: Sequence[str]
    """The script, as `tune/search.py` or `tune/demo.py`, and what was typed behind it."""
    revision: str
    """Of the code; empty if unknown."""
    page: str
    """How to see the search's runs in MLflow."""


def write_report(
    results: Sequence[CategoryResult], plan: SearchPlan, tracker: Tracker, run: Run, seconds: Mapping[str, float]
) -> Written:
    """Write report.json and report.html beside the champions, and the page to MLflow; replaces an earlier report.

    In MLflow the run of a category has the page of all, or where they are many a page of its own.

    `seconds` is the time of each category in this command. Never raises: the search itself has succeeded.
    """
    try:
        storage = Storage(plan.addresses.home)
        report = gather(results, plan, run, seconds)
        drawn = render(report).encode()
        storage.write(REPORT_DOCUMENT, to_json(report))
        storage.write(REPORT_PAGE, drawn)
    except Exception as error:  # nothing of the search depends on it
        if not isinstance(error, OSError):
            logger.error("%s", without_secrets("".join(traceback.format_exception(error))))
        return Written("", f"no report: {shown(str(error).partition(chr(10))[0] or type(error).__name__)}")
    address = f"{plan.addresses.home}/{REPORT_PAGE}"
    tracked = [result for result in results if result.champion and result.champion.run_id]
    try:
        with temporary_folder() as temporary:
            file = temporary / REPORT_PAGE
            if len(results) <= _MOST_ON_A_PAGE:
                file.write_bytes(drawn)
                tracker.add_report([result.category for result in tracked], file, _TRACKING_PATIENCE)
                return Written(address)
            for result in tracked:
                file.write_text(render(of_category(report, result, plan)), encoding="utf-8")
                tracker.add_report([result.category], file, _TRACKING_PATIENCE)
    except (TrackingUnavailableError, TrackingRefusedError) as error:
        return Written(address, f"the report is not in MLflow: {error}")
    return Written(address)


def gather(results: Sequence[CategoryResult], plan: SearchPlan, run: Run, seconds: Mapping[str, float]) -> Report:
    """The document; arguments as for `write_report`. Raises StorageError where the storage is damaged or away."""
    categories = tuple(_category(result, plan, seconds.get(result.category), run.page) for result in results)
    trained = sum(trial.seconds or 0.0 for category in categories for trial in category.trials)
    chooses = "image AUROC" if plan.config.data.layout == "classes" else "mean of image AUROC and AUPRO"
    on = "on the test images" if plan.selection == "oracle" else "on held-out good images and synthetic defects"
    return Report(
        name=plan.name,
        written=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        data=shown_url(plan.data),
        seconds=time.monotonic() - run.began,
        trial_seconds=trained,
        caveats=tuple(caveats_of(categories, results, plan)),
        objective=f"{chooses}, {on}",
        categories=categories,
        settings=tuple(_settings(plan)),
        trust=tuple(_trust(plan, run.revision)),
        commands=tuple(_commands(plan, categories, run)),
    )


def of_category(report: Report, result: CategoryResult, plan: SearchPlan) -> Report:
    """The report of a search of many categories, with one of them alone."""
    own = tuple(category for category in report.categories if category.name == result.category)
    whole = Fact(name="categories of the search", value=f"{len(report.categories)}, of which this page shows one")
    return msgspec.structs.replace(
        report,
        categories=own,
        caveats=tuple(caveats_of(own, [result], plan)),
        trial_seconds=sum(trial.seconds or 0.0 for category in own for trial in category.trials),
        settings=(whole, *report.settings),
    )


def _category(result: CategoryResult, plan: SearchPlan, seconds: float | None, page: str) -> CategoryReport:
    study = _study(plan, result.category)
    trials: tuple[Trial, ...] = ()
    shares: dict[str, float] = {}
    note = "the search has no trials of it"
    if study is not None:
        trials = trials_of(study, plan.spaces[result.category])
        shares, note = importance_of(study)
    champion = result.champion
    record = _record(plan, champion) if champion else None
    if champion is None or record is None:
        error = result.error or "its record is missing in the storage"
        judged = judge({}, None, error=error)
        return CategoryReport(
            name=result.category, light=judged.light, sentence=judged.sentence, reason=judged.reason, error=error,
            seconds=seconds, trials=trials, importance=shares, importance_note=note,
        )  # fmt: skip
    threshold = record.threshold(TABLE_RATE)
    limit = Limit(
        value=threshold.value,
        false_alarm_rate=threshold.false_alarm_rate,
        num_normals=threshold.num_normals,
        is_proven=not record.is_approximate,
    )
    judged = judge(champion.metrics, limit, is_untrained=record.is_untrained_teacher)
    inspected: Inspected | None = find_inspected(Storage(plan.addresses.home), champion)
    return CategoryReport(
        name=result.category,
        light=judged.light,
        sentence=judged.sentence,
        reason=judged.reason,
        decision=champion.decision or result.decision,
        changes=describe_changes(record.config, plan.configs),
        limit=limit,
        figures=dict(champion.metrics),
        normal_scores=record.normal_scores,
        seconds=seconds,
        trials=trials,
        importance=shares,
        importance_note=note,
        inspected=inspected,
        trust=tuple(_origin(record, champion)),
        link=_link(page, champion),
    )


def _study(plan: SearchPlan, category: str) -> optuna.Study | None:
    """The category's study; None if no trial of it was ever asked for."""
    try:
        return optuna.load_study(study_name=plan.study_name(category), storage=StudyStorage(plan.studies))
    except KeyError:
        return None


def _record(plan: SearchPlan, champion: Champion) -> DetectorRecord | None:
    document = Storage(plan.addresses.home).read_json(f"{champion.folder}/{RECORD_FILE}")
    return None if document is None else DetectorRecord.from_document(document)


def _link(page: str, champion: Champion) -> str:
    """Address of the champion's run, made from that of the search's runs; empty if MLflow is no server."""
    experiment, separator, _ = page.partition("/runs?")
    is_address = page.startswith(("http://", "https://"))  # else it is a command that starts a server
    return f"{experiment}/runs/{champion.run_id}" if is_address and separator and champion.run_id else ""


def caveats_of(categories: Sequence[CategoryReport], results: Sequence[CategoryResult], plan: SearchPlan) -> list[str]:
    """What limits the figures, most serious first, in sentences."""
    found = []
    if plan.selection == "oracle":
        found.append("The test images themselves chose (selection oracle, as in papers): all figures are too good.")
    if plan.teacher.is_untrained:
        found.append("The teacher is untrained: the figures show that the machinery works and mean nothing else.")
    champions = [category for category in categories if not category.error]
    named = (
        ("{} has no detector.", [each for each in categories if each.error]),
        ("{} is not tested: there are no labelled test images of both kinds.",
         [each for each in champions if each.light == "untested"]),
        (f"{{}}: fewer than {_FEW_TEST_IMAGES} good or defective test images, so that one image is more than 5 %.",
         [each for each in champions if _has_few_test_images(each)]),
        (f"{{}}: too few good images to vouch for {MAX_RATE * 100:.0f} % of false alarms.",
         [each for each in champions if each.limit and each.limit.false_alarm_rate > MAX_RATE]),
        ("{}: the rate of false alarms is expected and not proven, since images that set the threshold also helped to "
         "choose, or other detectors scored them.",
         [each for each in champions if each.limit and not each.limit.is_proven]),
        ("{}: tuning gained nothing over the untuned preset.",
         [each for each in champions if each.figures.get("gain/objective") == 0]),
        ("{}: the gain over the untuned preset was not measured on other images.",
         [each for each in champions if "gain/objective" not in each.figures]),
    )  # fmt: skip
    found += [text.format(", ".join(each.name for each in of)) for text, of in named if of]
    if interrupted := sum(result.num_interrupted for result in results):
        found.append(f"The time budget interrupted {interrupted} trials; the same command continues them.")
    return found


def _has_few_test_images(category: CategoryReport) -> bool:
    counts = [category.figures.get(f"test/{name}") for name in ("num_good", "num_defective")]
    return any(count is not None and count < _FEW_TEST_IMAGES for count in counts)


def _settings(plan: SearchPlan) -> list[Fact]:
    config = plan.config
    values = {
        "trials of each category": plan.trials,
        "presets": ", ".join(plan.configs),
        "backbones": ", ".join(plan.teachers),
        "input": f"{' × '.join(map(str, config.data.input_size))} pixels, batches of {config.train.batch_size}",
        "validations of a trial": plan.num_reports,
        "sampler": f"{plan.sampler}, seed {plan.seed}",
        "finalists": f"{plan.finalists}, which must be ahead by {plan.min_gain_errors:g} errors",
        "starts from": ", ".join(plan.earlier_searches) or "the presets alone",
        "workers of a trial": plan.num_workers,
        "left out": ", ".join(plan.exclude) or "no image",
        "textures of the synthetic defects": Path(plan.textures).name or "drawn",
        "time budget": f"{plan.budget_seconds:.0f} s" if plan.budget_seconds else "none",
    }
    return [Fact(name=name, value=str(value)) for name, value in values.items()]


def _trust(plan: SearchPlan, revision: str) -> list[Fact]:
    data = plan.config.data
    if plan.selection == "oracle":
        chose, opened = "The labelled test images (selection oracle).", "From the first trial on."
    else:
        chose = "Held-out good images and copies of them with synthetic defects; no test image and no test label."
        opened = "Once for each category, after its champion had been chosen; for the champions of --start-from again."
    split = (
        f"Good images in {data.folds} folds: one chooses the trials, the others compare the finalists with the untuned "
        "preset, and all set the threshold, each image scored by a detector that did not see it."
        if plan.finalists
        else f"{data.folds} folds, one held out." if data.folds
        else f"{data.validation_fraction:.0%} of the good images held out."
    )  # fmt: skip
    versions = {"dskd": VERSION, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _LIBRARIES}
    values = {
        "What chose": chose,
        "Test labels were opened": opened,
        "Split": f"{split} Split seed {data.split_seed}.",
        "Teacher": plan.teacher.of(plan.config.model.backbone).name,
        "Code": f"commit {revision}" if revision else "commit unknown",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Storage": shown_url(plan.addresses.home),
        "MLflow": shown_url(plan.addresses.tracking),
    }
    return [Fact(name=name, value=value) for name, value in values.items()]


def _origin(record: DetectorRecord, champion: Champion) -> list[Fact]:
    values = {
        "detector version": record.detector_version,
        "trial": champion.trial_id,
        "MLflow run": champion.run_id or "not tracked",
        "folder": champion.folder,
        "training images": f"sha256 {record.data_sha256}",
        "teacher's weights": f"{record.teacher}, sha256 {record.teacher_sha256}",
        "good images behind the threshold": str(len(record.calibration_files)),
        "detectors that scored them": str(record.calibration_folds or 1),
        "real defects in validation": str(record.num_validation_defects),
        "code": f"commit {record.revision}" if record.revision else "commit unknown",
        "trained steps": str(record.step or "unknown"),
    }
    return [Fact(name=name, value=value) for name, value in values.items()]


def _repeated(arguments: Sequence[str]) -> str:
    """The command, without the address of a webhook: all of that may be a secret."""
    shown_ones, words = [], iter(arguments)
    for word in words:
        if word == "--webhook":
            next(words, None)
        elif not word.startswith("--webhook="):
            shown_ones.append(word)
    return without_secrets(command(["python", *shown_ones]))


def _commands(plan: SearchPlan, categories: Sequence[CategoryReport], run: Run) -> list[Command]:
    tracking = shown_url(plan.addresses.tracking)
    found = {
        "Repeat or continue the search": _repeated(run.arguments),
        "Pull all champions": pull_command(plan, "all"),
        "See its runs in MLflow": run.page,
        "Draw this page again": command(["dskd", "report", REPORT_DOCUMENT, "--out", REPORT_PAGE]),
    }
    served = next((category.name for category in categories if not category.error), None)
    if served is not None:
        model = f"models:/{model_name(served)}@champion"
        serve = command(["mlflow", "models", "serve", "--model-uri", model, "--env-manager", "local", "--port", "5001"])
        found["Serve a champion (here the first)"] = f"{command([f'MLFLOW_TRACKING_URI={tracking}'])} {serve}"
        predict = ["dskd", "predict", f"detectors/{served}", "IMAGES", "--out", "verdicts"]
        found["Inspect images with a pulled champion"] = command(predict)
    return [Command(what=what, command=text) for what, text in found.items()]
