"""What the driver of a study does beside Tune: after kills, on a cluster that changes, and without a dashboard."""

import dataclasses
import math
import signal
import socket
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock, call

import optuna
import pytest
import ray
import services
import sqlalchemy
from faulty_link import FaultyLink

from dskd.config import RunConfig
from dskd.presets import PRESETS
from tune.runtime.ray_internals import study_of
from tune.settings.plan import plan_search, resolve_addresses
from tune.settings.search import SearchSettings
from tune.settings.space import Space, build_space
from tune.settings.workers import Workers
from tune.storage.files import Storage
from tune.storage.inputs import InputsChangedError, TrainedOn
from tune.storage.lease import LeaseLostError
from tune.study import database, hooks
from tune.study.budget import Share, Shares
from tune.study.category import make_sampler, monotonic_deadline, not_yet_asked_for
from tune.study.context import StudyContext, enter_study, study_context
from tune.study.database import StudyStorage
from tune.study.hooks import Deadline, Halving, Observe, Searcher, Suggestions, repeat_ended
from tune.study.records import TrialRecord, TrialRecords
from tune.tracking.events import CategoryContinued, EpochDone, Event, TrialEnded, TrialStarted
from tune.trial.spec import CATEGORY, DATA_SHA256, EPOCH, ERROR, LOST, OBJECTIVE, RUNG, build_spec

POINTS = [{"depth": 1}, {"depth": 2}]


class Fixed(Share):
    """A share that asks nobody."""

    def __init__(self, side_by_side: int) -> None:
        super().__init__(None)
        self._side_by_side, self._updated = side_by_side, math.inf


def ended(objective: float) -> dict[str, Any]:
    """The last report of a whole trial."""
    return {OBJECTIVE: objective, EPOCH: study_context().plan.num_reports}


def depth(trial: Any) -> None:
    trial.suggest_int("depth", 1, 100)


SPACE = build_space({"dskd": PRESETS["dskd"]})


def context(tmp_path: Path, space: Space = SPACE, **changes: Any) -> StudyContext:
    """What the process of category bolt knows; `changes` of the plan, and of the context itself."""
    (tmp_path / "outline" / "bolt" / "train" / "good").mkdir(parents=True, exist_ok=True)
    asked = SearchSettings(
        data="data", name="parts", storage=str(tmp_path), teacher_weights="random", max_concurrent=100
    )
    plan = plan_search(asked, resolve_addresses(asked), tmp_path / "outline").of_category("bolt", space)
    of_plan = {field.name for field in dataclasses.fields(plan)}
    plan = dataclasses.replace(plan, configs=space.bases, **{k: v for k, v in changes.items() if k in of_plan})
    spec = build_spec(
        plan.config, data=plan.data, category="bolt", teacher=plan.teacher, textures="", selection="val", cache_gb=0,
        workers=Workers(1, 1.0, 0.0), min_workers=None, workers_uri="", revision="",
    )  # fmt: skip
    records = TrialRecords(Storage(plan.addresses.home), "bolt")
    records.read()
    own: dict[str, Any] = {
        "share": Fixed(1), "events": None, "deadline": None, "dispatcher": Mock(), "records": records
    }  # fmt: skip
    own |= {k: v for k, v in changes.items() if k not in of_plan}
    found = StudyContext(plan=plan, spec=spec, **own)
    enter_study(found)
    return found


@pytest.fixture
def searcher(tmp_path: Path) -> Searcher:
    return search_algorithm(context(tmp_path).plan.studies)


def search_algorithm(url: str) -> Searcher:
    """As in a new process, with the records that are there."""
    known = study_context().records
    known.read()
    return Searcher(
        depth, metric=OBJECTIVE, mode="max", sampler_of=lambda number: optuna.samplers.RandomSampler(seed=number),
        study_name="parts/bolt", storage=StudyStorage(url),
        points_to_evaluate=not_yet_asked_for(POINTS, url, "parts/bolt", known),
    )  # fmt: skip


def trials_of(searcher: Searcher) -> list[optuna.trial.FrozenTrial]:
    return study_of(searcher).get_trials()


def states(searcher: Searcher) -> list[str]:
    return [trial.state.name for trial in trials_of(searcher)]


def test_a_killed_search_goes_on_with_the_trials_that_it_had_begun_and_repeats_none(searcher: Searcher) -> None:
    begun = {name: searcher.suggest(name) for name in "abc"}
    assert [begun["a"], begun["b"]] == POINTS
    searcher.on_trial_complete("a", ended(0.5))
    study_context().records.end("a", "finished", ended(0.5))
    again = search_algorithm(study_context().plan.studies)
    assert states(again) == ["COMPLETE", "RUNNING", "RUNNING"]
    assert {name: again.suggest(name) for name in "cb"} == {name: begun[name] for name in "cb"}
    undisturbed = searcher.suggest("d")
    study_of(again).tell(3, state=optuna.trial.TrialState.FAIL)  # it was only to be seen
    assert undisturbed not in begun.values()
    for name in "cb":
        again.on_trial_complete(name, ended(0.6))
    assert states(again) == ["COMPLETE"] * 3 + ["FAIL"]


def test_what_is_suggested_next_depends_on_the_study_and_not_on_the_process(tmp_path: Path) -> None:
    drawn = []
    for is_killed in (False, True):
        known = context(tmp_path / str(is_killed))
        made = search_algorithm(known.plan.studies)
        for name in "abcde":
            if is_killed:
                made = search_algorithm(known.plan.studies)
            made.suggest(name)
            made.on_trial_complete(name, ended(0.5))
            known.records.end(name, "finished", ended(0.5))
        drawn.append([trial.params for trial in trials_of(made)])
    assert drawn[0] == drawn[1] and len({str(params) for params in drawn[0]}) == 5


def test_a_trial_that_was_killed_before_it_was_recorded_is_closed_and_its_point_is_tried_by_another(
    searcher: Searcher, tmp_path: Path
) -> None:
    searcher.suggest("a")
    (tmp_path / "parts/trials/bolt/a.json").unlink()
    again = search_algorithm(study_context().plan.studies)
    assert states(again) == ["FAIL", "WAITING", "WAITING"]
    assert sorted([again.suggest("b"), again.suggest("c")], key=str) == POINTS


def test_a_search_whose_database_is_gone_makes_its_study_anew_from_its_records(
    searcher: Searcher, tmp_path: Path
) -> None:
    begun = {name: searcher.suggest(name) for name in "abcde"}
    ends: dict[str, Any] = {
        "a": ("finished", ended(0.5)), "b": ("failed", {OBJECTIVE: 0.0, LOST: True}),
        "e": ("pruned", {OBJECTIVE: 0.4, EPOCH: 3}),
    }  # fmt: skip
    searcher.on_trial_result("e", {OBJECTIVE: 0.4, "training_iteration": 3})
    for name, (status, last) in ends.items():
        searcher.on_trial_complete(name, last)
        study_context().records.end(name, status, last, is_lost=LOST in last)
    before = [(trial.params, trial.value, trial.state) for trial in trials_of(searcher)]
    again = search_algorithm(f"sqlite:///{tmp_path}/other.db")
    assert [(trial.params, trial.value, trial.state) for trial in trials_of(again)] == before
    assert [again.suggest(name) for name in "cd"] == [begun["c"], begun["d"]]
    assert again.suggest("f") not in POINTS, "what was enqueued is not enqueued again"


def test_trials_that_go_on_come_first_and_keep_their_ids(searcher: Searcher) -> None:
    """A trial's checkpoints are found by its id."""
    for name in "ab":
        searcher.suggest(name)
    again = search_algorithm(study_context().plan.studies)
    study_context().waiting = ["a", "b"]
    asked: list[str] = []
    again.suggest = lambda trial_id: asked.append(trial_id)  # type: ignore[method-assign]
    suggestions = Suggestions(again)
    assert suggestions.create_trial_if_possible({}) is None and study_context().waiting == ["a", "b"]
    study_context().waiting = []
    suggestions.create_trial_if_possible({})
    assert asked[0] == "a" and asked[1] not in "ab"


def test_the_study_is_told_which_trials_were_pruned(searcher: Searcher) -> None:
    """Three epochs' objective is no result: told as one it would stand in the history and in the importances."""
    searcher.suggest("a")
    searcher.on_trial_result("a", {OBJECTIVE: 0.9, "training_iteration": 3})
    searcher.on_trial_complete("a", {OBJECTIVE: 0.9, EPOCH: 3})
    first = trials_of(searcher)[0]
    assert (first.state.name, first.value) == ("PRUNED", 0.9)


def test_a_trial_that_its_own_values_spoilt_counts_as_bad_and_one_whose_machines_failed_as_nothing(
    searcher: Searcher,
) -> None:
    """As its relay reports it, or where the relay itself was lost too often."""
    for name in "abc":
        searcher.suggest(name)
    searcher.on_trial_complete("a", {OBJECTIVE: 0.0, ERROR: "out of memory: GPU full"})
    searcher.on_trial_complete("b", {OBJECTIVE: 0.0, ERROR: "its node was lost", LOST: True})
    searcher.on_trial_complete("c", error=True)
    ended = [trial for trial in trials_of(searcher) if trial.state.is_finished()]
    assert [(trial.state.name, trial.value) for trial in ended] == [("COMPLETE", 0.0), ("FAIL", None), ("FAIL", None)]


def test_a_lost_trial_leaves_no_objective_for_others_to_be_compared_with(tmp_path: Path) -> None:
    space = build_space({"stfpm": PRESETS["stfpm"]})
    context(tmp_path, space)
    _, hard, *_ = space.starting_points()
    halving = Halving(time_attr="epoch", metric=OBJECTIVE, mode="max", max_t=10, grace_period=1, reduction_factor=3)
    for name, result in (
        ("lost", {"epoch": 1, OBJECTIVE: 0.9, LOST: True}),
        ("bad", {"epoch": 1, OBJECTIVE: 0.1}),
    ):
        trial = cast(Any, SimpleNamespace(trial_id=name, config=hard, last_result=None))
        halving.on_trial_add(cast(Any, None), trial)
        assert halving.on_trial_result(None, trial, result) == "CONTINUE"


def test_a_relay_that_is_lost_is_charged_as_ray_tells_why(tmp_path: Path) -> None:
    tune_file = tmp_path / "error.txt"
    counted = SimpleNamespace(num_failures=0)
    trial = cast(Any, SimpleNamespace(trial_id="a", error_file=str(tune_file), run_metadata=counted))
    halving = Halving(time_attr="epoch", metric=OBJECTIVE, mode="max", max_t=10, grace_period=1, reduction_factor=3)
    failures = ["ValueError", "its node has died", "ValueError"]
    for number in range(len(failures)):  # Tune adds each failure to the file, and then tells of it
        heads = (f"Failure # {n + 1} (occurred at today)\n{text}\n" for n, text in enumerate(failures[: number + 1]))
        tune_file.write_text("".join(heads))
        counted.num_failures += 1
        halving.on_trial_error(cast(Any, None), trial)
    assert counted.num_failures == 33 + 1 + 33


def test_the_last_categories_share_what_the_others_leave() -> None:
    shares = Shares(num_categories=5, side_by_side=3)
    for expected in (3, 3, 3, 2, 1, 1):
        assert shares.side_by_side() == expected
        shares.end_category()
    assert [Fixed(3).of(slots) for slots in (1, 3, 8)] == [1, 1, 3], "rounded up, so that no slot idles"
    assert [Fixed(3).of(slots, is_limit=True) for slots in (1, 5, 8)] == [1, 1, 2]


def test_a_search_follows_the_size_of_the_cluster(
    searcher: Searcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context(tmp_path, max_concurrent=None, share=Fixed(2))
    for slots, expected in ((1, [True, False]), (6, [True, True, False]), (0, [False])):
        monkeypatch.setattr(hooks, "cluster_nodes", lambda slots=slots: [{"CPU": float(slots)}])
        taken = [searcher.suggest(f"{slots}-{number}") is not None for number in range(len(expected))]
        assert taken == expected
    searcher.on_trial_complete("1-0", {OBJECTIVE: 0.5})
    monkeypatch.setattr(hooks, "cluster_nodes", lambda: [{"CPU": 6.0}])
    assert searcher.suggest("next") is not None


def recorded(name: str, order: int, **more: Any) -> TrialRecord:
    return TrialRecord(
        trial_id=name, order=order, number=order - 1, suggested={}, distributions={}, is_enqueued=False, **more
    )  # fmt: skip


def test_what_a_killed_driver_may_not_have_handed_on_is_said_once_more(tmp_path: Path) -> None:
    said: list[Event | CategoryContinued] = []
    space = build_space({"dskd": RunConfig().with_values({"epochs": 4})})
    dispatcher = Mock()
    known = context(tmp_path, space, events=SimpleNamespace(put=said.append), dispatcher=dispatcher).records
    for order, name in enumerate("abc", 1):
        known.put(recorded(name, order))

    def trial(name: str, epoch: int) -> Any:
        return SimpleNamespace(
            trial_id=name, config={}, get_error=lambda: "gone", error_file=None,
            run_metadata=SimpleNamespace(num_failures=2),
            last_result={"epoch": epoch, OBJECTIVE: 0.5, "timestamp": 1000 + epoch},
        )  # fmt: skip

    trials = [trial("a", 4), trial("b", 2), trial("c", 1)]
    observe = Observe()
    observe.on_trial_complete(1, trials, trials[0])
    observe.on_trial_error(1, trials, trials[1])
    assert dispatcher.drop.remote.mock_calls == [call("bolt/a"), call("bolt/b")]
    at_once = list(said)
    said.clear()
    known.read()  # in another process
    repeat_ended()
    assert said.pop(0) == CategoryContinued("bolt", {"a": "finished", "b": "failed"}, 1, 0.5)
    assert [event.number for event in said if isinstance(event, TrialStarted)] == [1, 2]
    assert {event.tried for event in said if isinstance(event, TrialStarted)} == {"dskd untuned"}
    assert [(type(event), getattr(event, "trial_id", "")) for event in said] == [
        (kind, name) for name in "ab" for kind in (TrialStarted, EpochDone, TrialEnded)
    ]
    assert [event for event in said if isinstance(event, TrialEnded)] == at_once
    assert [event.status for event in at_once if isinstance(event, TrialEnded)] == ["finished", "failed"]
    # Groups work only on what goes on.
    assert dispatcher.keep_only.remote.mock_calls == [call("bolt", ["bolt/c"])]
    assert [event.time_ms for event in said if isinstance(event, EpochDone)] == [1004000, 1002000]

    for epoch, forgiven in ((1, True), (1, False), (2, True)):
        trials[2].run_metadata.num_failures = 2
        observe.on_trial_result(0, trials, trials[2], {"epoch": epoch, "timestamp": 1})
        assert (trials[2].run_metadata.num_failures == 0) is forgiven
    with pytest.raises(RuntimeError, match="a trial of bolt trained on nut"):
        observe.on_trial_result(0, trials, trials[2], {"epoch": 3, "timestamp": 1, CATEGORY: "nut"})


def test_the_untuned_presets_are_never_pruned_and_others_are(tmp_path: Path) -> None:
    space = build_space({"dskd": PRESETS["dskd"], "stfpm": PRESETS["stfpm"]})
    context(tmp_path, space)
    untuned, _, hard, *_ = space.starting_points()
    halving = Halving(time_attr="epoch", metric=OBJECTIVE, mode="max", max_t=10, grace_period=1, reduction_factor=3)
    decisions = {}
    for name, objective, point in (
        ("good", 0.9, hard), ("better", 0.95, hard), ("bad", 0.1, hard), ("untuned and worse", 0.05, untuned)
    ):  # fmt: skip
        trial = cast(Any, SimpleNamespace(trial_id=name, config=point, last_result=None))
        halving.on_trial_add(cast(Any, None), trial)
        decisions[name] = halving.on_trial_result(None, trial, {"epoch": 1, OBJECTIVE: objective})
    assert decisions["bad"] == "STOP"
    assert decisions["untuned and worse"] == decisions["better"] == "CONTINUE"


def test_a_continued_search_compares_trials_at_the_epochs_that_the_undisturbed_one_does(
    tmp_path: Path,
) -> None:
    space = build_space({"stfpm": PRESETS["stfpm"]})
    _, hard, *_ = space.starting_points()

    def decide(killed: bool) -> list[str]:
        known = context(tmp_path / str(killed), space).records
        known.put(recorded("good", 1))
        halving = Halving(time_attr="epoch", metric=OBJECTIVE, mode="max", max_t=10, grace_period=1, reduction_factor=3)
        good = cast(Any, SimpleNamespace(trial_id="good", config=hard, last_result={}))
        halving.on_trial_add(cast(Any, None), good)
        halving.on_trial_result(None, good, {"epoch": 1, OBJECTIVE: 0.4, f"{RUNG}1": 0.4})
        if killed:  # at epoch 5: there is a new scheduler, and the trial goes on
            halving.on_trial_result(None, good, {"epoch": 3, OBJECTIVE: 0.7, f"{RUNG}1": 0.4, f"{RUNG}3": 0.7})
            known.read()
            halving = Halving(
                time_attr="epoch", metric=OBJECTIVE, mode="max", max_t=10, grace_period=1, reduction_factor=3
            )
            halving.on_trial_add(cast(Any, None), good)
        else:
            halving.on_trial_result(None, good, {"epoch": 3, OBJECTIVE: 0.7})
        for epoch in (6, 7):
            halving.on_trial_result(None, good, {"epoch": epoch, OBJECTIVE: 0.9})
        decisions = []
        for name, objectives in (("slow", {1: 0.5, 3: 0.6}), ("late", {1: 0.48, 3: 0.8}), ("bad", {1: 0.3})):
            other = cast(Any, SimpleNamespace(trial_id=name, config=hard, last_result=None))
            halving.on_trial_add(cast(Any, None), other)
            decisions += [
                halving.on_trial_result(None, other, {"epoch": epoch, OBJECTIVE: objective})
                for epoch, objective in objectives.items()
            ]
        return decisions

    assert decide(killed=True) == decide(killed=False) == ["CONTINUE", "STOP", "CONTINUE", "CONTINUE", "STOP"]


def test_a_database_that_does_not_answer_is_given_up_in_one_line_that_is_why_the_study_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_PATIENCE_SECONDS", 0.0)
    known = context(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(
        ConnectionError, match=rf"127\.0\.0\.1:{port}/studies, does not answer: .*same command"
    ) as error:
        StudyStorage(f"postgresql+psycopg2://user:secret-7@127.0.0.1:{port}/studies")
    assert known.fault is error.value and "\n" not in str(error.value) and "secret-7" not in str(error.value)


@pytest.mark.services
def test_a_study_waits_for_a_database_that_is_away(tmp_path: Path) -> None:
    if reason := services.postgres_unavailable():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="pg-") as short, services.postgres(Path(short)) as url:
        address = sqlalchemy.make_url(url)
        link = FaultyLink(str(address.host), int(address.port or 5432))
        storage = StudyStorage(address.set(port=link.port, database="postgres").render_as_string(hide_password=False))
        study = optuna.create_study(study_name="parts/bolt", storage=storage)
        for number in range(2):
            trial = study.ask()
            with link.faulty("cut", 3.0):
                refused = link.num_refused
                trial.report(0.5, 1)
                assert link.num_refused > refused, "it was away"
            study.tell(trial, number)
        link.close()
        assert [each.value for each in study.trials] == [0, 1]


def test_a_deadline_counts_by_the_clock_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock of the study's node shows."""
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    driver = 1000.0
    post = SimpleNamespace(now=SimpleNamespace(remote=lambda: driver))
    begun = time.monotonic()
    assert begun + 30 <= monotonic_deadline(driver + 30, post) <= time.monotonic() + 30


def test_the_deadline_interrupts_tune_once_it_is_over(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        for deadline, expected in ((None, 0), (time.monotonic() + 600, 0), (time.monotonic() - 1, 1)):
            known = context(tmp_path, deadline=deadline)
            assert not Deadline().stop_all(), "to stop the trials would end them for good"
            assert len(seen) == expected == known.is_over
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "qmc", "random"])
def test_every_sampler_draws_from_the_space_and_each_category_its_own(sampler: Any) -> None:
    space = build_space({"dskd": PRESETS["dskd"]})
    drawn = []
    for category in ("bolt", "bolt", "screw"):
        asked = optuna.create_study(direction="maximize", sampler=make_sampler(sampler, 0, category, 1))
        for value in (0.3, 0.5, 0.4):
            trial = asked.ask()
            space.ask(trial)
            asked.tell(trial, value)
        drawn.append([space.configuration(trial.params) for trial in asked.trials])
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_search_that_has_lost_its_lease_records_no_report(tmp_path: Path) -> None:
    space = build_space({"stfpm": PRESETS["stfpm"]})
    known = context(tmp_path, space, owner="me")
    home = Storage(known.plan.addresses.home)
    home.write_json("lease.json", {"owner": "me"})
    known.records.put(recorded("a", 1))
    halving = Halving(time_attr="epoch", metric=OBJECTIVE, mode="max", max_t=10, grace_period=1, reduction_factor=3)
    trial = cast(Any, SimpleNamespace(trial_id="a", config=space.starting_points()[1], last_result={}))
    halving.on_trial_add(cast(Any, None), trial)
    first, second = {"epoch": 1, OBJECTIVE: 0.4, f"{RUNG}1": 0.4}, {"epoch": 3, OBJECTIVE: 0.7, f"{RUNG}3": 0.7}
    halving.on_trial_result(None, trial, first)
    home.write_json("lease.json", {"owner": "another"})
    before = home.read_json("trials/bolt/a.json")
    assert before is not None and before["rungs"] == {"1": 0.4}
    halving.on_trial_result(None, trial, {"epoch": 2, OBJECTIVE: 0.5})  # within a second nobody asks again
    with pytest.raises(LeaseLostError):
        halving.on_trial_result(None, trial, second)
    assert home.read_json("trials/bolt/a.json") == before and isinstance(known.fault, LeaseLostError)
    known.looked -= hooks._LOOK_SECONDS
    with pytest.raises(LeaseLostError):
        halving.on_trial_result(None, trial, {"epoch": 4, OBJECTIVE: 0.5})


def test_a_search_that_has_lost_its_lease_changes_nothing_in_the_study(searcher: Searcher, tmp_path: Path) -> None:
    searcher.suggest("a")
    study_context().plan = dataclasses.replace(study_context().plan, owner="me")
    Storage(study_context().plan.addresses.home).write_json("lease.json", {"owner": "another"})
    with pytest.raises(LeaseLostError):
        searcher.suggest("b")
    with pytest.raises(LeaseLostError):
        searcher.on_trial_complete("a", {OBJECTIVE: 0.5})
    assert states(searcher) == ["RUNNING", "WAITING"]


def test_a_trial_that_was_trained_on_other_images_ends_the_study_and_leaves_no_result(tmp_path: Path) -> None:
    space = build_space({"stfpm": PRESETS["stfpm"]})
    known = context(tmp_path, space)
    known.trained_on = TrainedOn(Storage(known.plan.addresses.home), "bolt")
    known.records.put(recorded("a", 1))
    known.records.put(recorded("b", 2))
    halving = Halving(time_attr="epoch", metric=OBJECTIVE, mode="max", max_t=10, grace_period=1, reduction_factor=3)
    for name, digest in (("a", "one"), ("b", "two")):
        trial = cast(Any, SimpleNamespace(trial_id=name, config=space.starting_points()[0]))
        halving.on_trial_add(cast(Any, None), trial)
        result = {"epoch": 1, OBJECTIVE: 0.9, f"{RUNG}1": 0.9, DATA_SHA256: digest}
        if name == "a":
            halving.on_trial_result(None, trial, result)
            continue
        with pytest.raises(
            InputsChangedError, match="bolt: what trials read has changed since the search began: images"
        ):
            halving.on_trial_result(None, trial, result)
    assert isinstance(known.fault, InputsChangedError)
    assert known.records["a"].status is None and known.records["b"].status == "failed"
    assert known.records["b"].is_lost and not known.records["b"].rungs
