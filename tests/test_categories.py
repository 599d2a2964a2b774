"""What `tune.study` decides without Ray: shares of a time budget, and where a search starts from."""

import dataclasses
import logging
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dskd.checkpoint import read_record, rewrite_record
from tune.settings.plan import SearchPlan, plan_search, resolve_addresses
from tune.settings.search import SearchSettings
from tune.settings.space import build_space
from tune.settings.workers import Workers
from tune.storage.champions import Champion, find_champion, save_champion
from tune.storage.files import Storage
from tune.study import categories
from tune.study.budget import BudgetSpentError, TimeBudget
from tune.study.categories import (
    CategoryResult,
    SharedSearch,
    conclude_one,
    study_one,
    with_earlier,
    with_winners,
)
from tune.study.progress import SearchProgress
from tune.trial.spec import REMARK, spec_of


def test_categories_that_wait_keep_their_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    budget = TimeBudget(600.0, num_categories=4, side_by_side=2)
    assert budget.begin_category() == budget.begin_category() == 1300.0
    now[0] = 1100.0  # one has ended early: what it left over goes to those behind it
    assert budget.begin_category() == 1600.0
    now[0] = 1600.0
    with pytest.raises(BudgetSpentError, match="ended before it could start; the same command starts it"):
        budget.begin_category()


def test_without_a_budget_nothing_ends() -> None:
    assert TimeBudget(None, 1, 1).begin_category() is None


@pytest.fixture
def earlier(detector_folder: Path, tmp_path: Path) -> Storage:
    """A finished search called spring, whose champion of tile is the tiny detector."""
    storage = Storage(str(tmp_path / "results" / "spring"))
    storage.upload(detector_folder, "tune/tile/one/detector")
    save_champion(storage, "tile", "one", f"{storage.uri}/tune/tile/one/detector", {}, tmp_path / "local")
    return storage


def test_the_champion_of_an_earlier_search_is_tried_or_the_reason_is_told(
    earlier: Storage, detector_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = read_record(detector_folder).config
    asked = SearchSettings(data="data", storage=str(tmp_path / "results"), start_from="spring")
    for name in ("tile", "wood"):
        (tmp_path / "outline" / name / "train" / "good").mkdir(parents=True)
    plan = plan_search(asked, resolve_addresses(asked), tmp_path / "outline")
    near = build_space({"dskd": config.with_values({"hkd_weight": 0.0, "epochs": 50})})

    def found(space: Any, category: str) -> tuple[Any, str]:
        winners = with_winners(plan.of_category(category, space), category, SearchProgress(1)).winners
        return winners, capsys.readouterr().err

    (winner,), said = found(near, "tile")
    assert near.configuration(winner) == config.with_values({"epochs": 50}) and said == ""
    winners, said = found(build_space({"dskd": config.with_values({"schedule": "cosine"})}), "tile")
    assert winners == () and "the champion of spring is not tried: schedule is 'constant' there" in said
    winners, said = found(near, "wood")
    assert winners == () and "wood: search spring has no champion of this category" in said


def test_a_champion_says_what_chose_it_and_older_records_mean_validation(earlier: Storage) -> None:
    document = earlier.read_json("champions/tile.json")
    assert document is not None and document.pop("selection") == "val"
    earlier.write_json("champions/tile.json", document)
    assert champion(earlier).selection == "val"


def champion(storage: Storage) -> Champion:
    found = find_champion(storage, "tile")
    assert found is not None
    return found


def test_an_oracles_champion_is_marked_in_its_record_and_in_the_storage(detector_folder: Path, tmp_path: Path) -> None:
    marked = shutil.copytree(detector_folder, tmp_path / "marked")
    rewrite_record(marked, dataclasses.replace(read_record(detector_folder), selection="oracle"))
    assert read_record(marked).selection == "oracle"
    storage = Storage(str(tmp_path / "search"))
    storage.upload(marked, "detector")
    save_champion(storage, "tile", "one", f"{storage.uri}/detector", {}, tmp_path / "local")
    assert champion(storage).selection == "oracle"


def test_an_unexpected_error_ends_its_category_alone_and_leaves_its_traceback_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line is for the person; where it came from is for whoever mends it."""
    errors: dict[str, Exception] = {
        "bolt": KeyError("learning_rate of postgresql://user:secret@host/db"),
        "screw": ValueError("no image in /data/screw"),
    }
    for name in errors:
        (tmp_path / "outline" / name / "train" / "good").mkdir(parents=True)
    asked = SearchSettings(data="data", storage=str(tmp_path / "results"), teacher_weights="random")
    plan = plan_search(asked, resolve_addresses(asked), tmp_path / "outline")

    def fail(plan: SearchPlan, *_: object) -> None:
        raise errors[plan.categories[0]]

    task = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=fail))
    shares = SimpleNamespace(end_category=SimpleNamespace(remote=lambda: None))
    events: Any = SimpleNamespace(put=lambda event: None)
    monkeypatch.setattr(categories, "search_task", task)
    monkeypatch.setattr(categories, "driver_resources", dict)
    groups = cast(Any, SimpleNamespace(dispatcher="", end_if_lost=lambda: None))
    search = SharedSearch(plan, groups, Workers(1, 1.0, 0.0), "", cast(Any, None), SearchProgress(1))
    budget = TimeBudget(None, 2, 1)
    with caplog.at_level(logging.ERROR):
        studied = [study_one(search, name, budget, shares, events) for name in errors]
    results = [conclude_one(search, each, None, budget, events) for each in studied]
    reasons = [result.error for result in results if result.champion is None]
    assert reasons == ["'learning_rate of postgresql://host/db'", "no image in /data/screw"]
    (record,) = caplog.records
    assert "Traceback" in record.getMessage() and "in fail" in record.getMessage()
    assert record.getMessage().startswith("bolt: ") and "secret" not in record.getMessage()


def test_the_earlier_champion_is_measured_on_the_test_images_of_today(
    earlier: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tile", "wood"):
        (tmp_path / "outline" / name / "train" / "good").mkdir(parents=True)
    asked = SearchSettings(
        data="data", storage=str(tmp_path / "results"), start_from="spring", teacher_weights="random"
    )
    plan = plan_search(asked, resolve_addresses(asked), tmp_path / "outline")
    taken: list[Any] = []
    answers: list[dict[str, Any]] = [{"test/image_auroc": 0.5, "test/aupro": float("nan")}, {REMARK: "no test figures"}]

    def follow(assignment: Any) -> list[dict[str, Any]]:
        taken.append(assignment)
        return [answers.pop(0)]

    workers = Workers(1, 1.0, 0.0)
    groups = cast(Any, SimpleNamespace(follow=follow, forget=lambda assignment: None))
    search = SharedSearch(plan, groups, workers, "", cast(Any, None), SearchProgress(1))

    def compared(category: str) -> CategoryResult:
        return with_earlier(search, spec_of(plan, category, workers, ""), CategoryResult(category))

    found = compared("tile")
    assert (found.earlier_search, found.earlier_figures) == ("spring", {"test/image_auroc": 0.5})
    assert taken[0].detector_uri == f"{earlier.uri}/champions/tile/one" and taken[0].data == plan.data
    assert compared("tile").earlier_search == ""
    assert "tile: the champion of spring is not compared: no test figures" in capsys.readouterr().err
    assert compared("wood").earlier_search == "" and len(taken) == 2, "a category that is new has none"
