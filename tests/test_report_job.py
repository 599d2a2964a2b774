"""What a search gathers into its report, from a storage, a study and a plan, without Ray."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from dskd.checkpoint import RECORD_FILE, read_record
from dskd.config import RunConfig
from dskd.report.document import ImageScore, Inspected, read_report
from tune.jobs.report import REPORT_DOCUMENT, REPORT_PAGE, Run, caveats_of, gather, write_report
from tune.jobs.report_trials import importance_of, trials_of
from tune.settings.plan import plan_search, resolve_addresses
from tune.settings.search import SearchSettings
from tune.settings.space import Space, build_space
from tune.storage.champions import Champion, write_inspected
from tune.storage.files import Storage
from tune.study.categories import CategoryResult
from tune.tracking.category_page import FEWEST_TO_WEIGH
from tune.tracking.outbox import TrackingUnavailableError
from tune.tracking.runs_page import how_to_open

FIGURES = {
    "val/objective": 0.9132, "gain/objective": 0.0, "gain/error": 0.0091, "test/image_auroc": 0.95,
    "test/num_good": 12.0, "test/num_false_alarms": 1.0, "test/num_defective": 36.0, "test/num_missed": 3.0,
}  # fmt: skip


PAGE = "http://mlflow:5000/#/experiments/3/runs?viewStateShareKey=dskd"


class FakeTracker:
    """Keeps the page that it is given; or is away."""

    def __init__(self, is_away: bool = False) -> None:
        self.is_away = is_away
        self.logged: dict[str, bytes] = {}

    def add_report(self, categories: list[str], page: Path, patience: float) -> None:
        if self.is_away:
            raise TrackingUnavailableError("MLflow does not answer")
        self.logged |= dict.fromkeys(categories, page.read_bytes())


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, mvtec_root: Path) -> Any:
    storage = str(tmp_path_factory.mktemp("search") / "results")
    settings = SearchSettings(
        data=str(mvtec_root), name="parts", storage=storage, trials=4, image_size=32, batch_size=4
    )
    return plan_search(settings, resolve_addresses(settings), mvtec_root)


@pytest.fixture(scope="module")
def results(plan: Any, detector_folder: Path) -> list[CategoryResult]:
    """A champion of the first category, with a study of four trials; the second has none."""
    storage = Storage(plan.addresses.home)
    champion = Champion("tile", "b", "champions/tile/b", FIGURES, "run-1", decision="tuning gained nothing")
    storage.write(f"{champion.folder}/{RECORD_FILE}", (detector_folder / RECORD_FILE).read_bytes())
    seen = ImageScore(file="test/good/000.png", defect="good", is_defective=False, score=1.5)
    write_inspected(storage, Inspected(category="tile", trial_id="b", threshold=1.0, test=(seen,)))
    study = optuna.create_study(study_name=plan.study_name("tile"), storage=plan.studies, direction="maximize")
    study.add_trials(trials(plan.spaces["tile"], 4))
    return [
        CategoryResult("tile", 4, 1, 0, champion, num_interrupted=2),
        CategoryResult("wood", 1, 0, 1, error="no trial reached its last epoch"),
    ]


def trials(space: Space, count: int) -> list[optuna.trial.FrozenTrial]:
    """The untuned preset, then others with another learning rate."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(space.starting_points()[0])
    for number in range(count):
        trial = study.ask()
        space.ask(trial)
        trial.report(0.8 + 0.01 * ((number * 7) % 5), 1)
        study.tell(trial, *((None, TrialState.PRUNED) if number == 1 else (0.8 + 0.01 * ((number * 7) % 5),)))
    return study.trials


def gathered(results: list[CategoryResult], plan: Any, *more: str, page: str = PAGE) -> Any:
    arguments = ["tune/search.py", "--data", "my images", "--tracking-uri", "http://me:secret@mlflow:5000", *more]
    return gather(results, plan, Run(0.0, arguments, "abc", page), {"tile": 90.0})


def test_figures_are_the_storage_s_and_trials_are_the_study_s(
    results: list[CategoryResult], plan: Any, detector_folder: Path
) -> None:
    report = gathered(results, plan)
    tile, wood = report.categories
    record = read_record(detector_folder)
    assert tile.figures == FIGURES and tile.normal_scores == record.normal_scores
    assert tile.limit.value == record.threshold(0.01).value and tile.inspected.test[0].score == 1.5
    assert [trial.state for trial in tile.trials] == ["finished", "pruned", "finished", "finished"]
    assert [trial.is_untuned for trial in tile.trials] == [True, False, False, False]
    assert tile.importance == {} and tile.importance_note.startswith("too few trials to tell")
    assert tile.sentence.endswith("misses 3 of 36 defects, flags 1 of 12 good images.")
    assert tile.link == "http://mlflow:5000/#/experiments/3/runs/run-1"
    assert (wood.light, wood.reason, wood.trials) == ("no", "no trial reached its last epoch", ())
    assert f"sha256 {record.data_sha256}" in [fact.value for fact in tile.trust]


def test_without_a_server_no_run_has_a_page(results: list[CategoryResult], plan: Any) -> None:
    """What the search says instead is a command."""
    found = gathered(results, plan, page=how_to_open("sqlite:////tmp/mlflow.db", "1"))
    assert [category.link for category in found.categories] == ["", ""]


def test_the_caveats_come_with_the_categories_that_they_are_about(results: list[CategoryResult], plan: Any) -> None:
    report = gathered(results, plan)
    assert report.caveats[0] == "wood has no detector."
    text = " ".join(report.caveats)
    for said in ("tile: fewer than 20", "tile: too few good images", "tile: tuning gained nothing", "interrupted 2"):
        assert said in text
    oracle = dataclasses.replace(plan, selection="oracle")
    assert "too good" in caveats_of(report.categories, results, oracle)[0]


def test_commands_can_be_repeated_and_hold_no_password(results: list[CategoryResult], plan: Any) -> None:
    report = gathered(results, plan)
    commands = {each.what: each.command for each in report.commands}
    assert commands["Repeat or continue the search"].startswith("python tune/search.py --data 'my images'")
    assert "secret" not in json.dumps(commands)
    for hook in (("--webhook", "https://host/secret"), ("--webhook=https://host/secret",)):
        told = gathered(results, plan, *hook, "--trials", "8")
        (again,) = (each.command for each in told.commands if each.what.startswith("Repeat"))
        assert again.endswith(" --trials 8") and "secret" not in again and "webhook" not in again
    assert "--name parts" in commands["Pull all champions"]
    assert "models:/dskd-tile@champion" in commands["Serve a champion (here the first)"]


def test_the_report_lies_in_the_storage_and_in_mlflow_and_is_written_again(
    results: list[CategoryResult], plan: Any
) -> None:
    home, tracker = Path(plan.addresses.home), FakeTracker()
    for number in range(2):
        written = write_report(results, plan, tracker, Run(0.0, [], str(number), ""), {})  # type: ignore[arg-type]
        assert (written.page, written.remark) == (str(home / REPORT_PAGE), "")
        assert f"commit {number}" in [fact.value for fact in read_report((home / REPORT_DOCUMENT).read_bytes()).trust]
    assert tracker.logged == {"tile": (home / REPORT_PAGE).read_bytes()}


def test_of_many_categories_the_run_of_each_gets_a_page_of_its_own(results: list[CategoryResult], plan: Any) -> None:
    """Else MLflow would hold as many pages of all of them as there are categories."""
    tile, wood = results
    names = ["wood", *(f"part-{number}" for number in range(10))]
    many = dataclasses.replace(plan, spaces=plan.spaces | dict.fromkeys(names, plan.spaces["tile"]))
    tracker = FakeTracker()
    write_report([tile, *(wood._replace(category=name) for name in names)], many, tracker, Run(0.0, [], "", ""), {})  # type: ignore[arg-type]
    whole = (Path(plan.addresses.home) / REPORT_PAGE).read_text()
    (page,) = (page.decode() for page in tracker.logged.values())
    assert "part-9" in whole and "part-9" not in page and "12, of which this page shows one" in page
    assert '"name":"tile"' in page and "tile: fewer than 20" in page and "has no detector" not in page


def test_no_failure_of_the_report_fails_the_search(results: list[CategoryResult], plan: Any) -> None:
    away: Any = FakeTracker(is_away=True)
    written = write_report(results, plan, away, Run(0.0, [], "", ""), {})
    assert written.page and written.remark == "the report is not in MLflow: MLflow does not answer"
    damaged = Champion("tile", "c", "champions/tile/b", FIGURES, "run-1")
    Storage(plan.addresses.home).write("inspected/tile/c.json", b"{}")
    written = write_report([results[0]._replace(champion=damaged)], plan, away, Run(0.0, [], "", ""), {})
    assert written.page == "" and written.remark.startswith("no report: ") and "is damaged" in written.remark


def test_importance_is_told_of_enough_finished_trials_alone(tiny: RunConfig) -> None:
    space = build_space({"dskd": tiny})
    study = optuna.create_study(direction="maximize")
    made = trials(space, FEWEST_TO_WEIGH + 1)
    study.add_trials([*made, create_trial(state=TrialState.FAIL), create_trial(state=TrialState.WAITING)])
    known = [trial.state for trial in trials_of(study, space)]
    assert known == ["finished", "pruned", *["finished"] * (FEWEST_TO_WEIGH - 1), "failed"]
    shares, note = importance_of(study)
    assert note == "" and sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    fewer = optuna.create_study(direction="maximize")
    fewer.add_trials(made[:-1])
    assert importance_of(fewer) == ({}, "too few trials to tell, 7 finished of at least 8 that differ")
