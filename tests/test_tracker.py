import dataclasses
import json
import logging
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow.data
import pytest
import requests
import sqlalchemy
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from dskd.checkpoint import read_record
from tune.settings.search import Promote
from tune.storage.files import check_unlocked, created_by_one
from tune.storage.uris import Addresses
from tune.study.progress import SearchProgress
from tune.tracking import outbox
from tune.tracking import tracker as tracker_module
from tune.tracking.client import check_may_write, check_server, run_link, tracking_ui_command
from tune.tracking.events import CategoryEnded, DataUsed, EpochDone, Event, SearchBegan, TrialEnded, TrialStarted
from tune.tracking.journal import Journal
from tune.tracking.outbox import TrackingRefusedError, TrackingUnavailableError
from tune.tracking.registry import Registration, check_category, evaluation_key
from tune.tracking.tracker import PLACE, Tracker


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for all: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def away() -> Iterator[str]:
    """The address of a server that does not answer: the port is taken, and nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def tracker(uri: str, search: str, folder: Path) -> Tracker:
    return Tracker(
        uri, search, artifact_location=f"file://{folder}/artifacts", tags={"dskd.selection": "val"},
        unsent=folder / "unsent.jsonl",
    )  # fmt: skip


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers an empty model: packing a real one takes a second."""
    monkeypatch.setattr(tracker_module, "pack", lambda detector, folder: folder.mkdir())


def runs(uri: str, search: str) -> dict[str, Run]:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(search)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def one_trial(category: str, trial: str, *objectives: float) -> list[Event]:
    return [
        TrialStarted(category, trial, {"learning_rate": 0.1, "levels": (1, 2), "teacher_weights": "x" * 9000}),
        *(
            EpochDone(category, trial, number, {"val/best_objective": value}, 1000 * number)
            for number, value in enumerate(objectives, 1)
        ),
    ]


def test_a_search_becomes_an_experiment_with_a_parent_per_category_and_a_child_per_trial(
    uri: str, tmp_path: Path
) -> None:
    first = tracker(uri, "spring", tmp_path)
    events: list[Event] = [
        *one_trial("tile", "a", 0.5, 0.7),
        *one_trial("wood", "a", 0.4),
        *one_trial("tile", "b", 0.3),
        TrialEnded("tile", "a", "finished", ""),
        TrialEnded("tile", "b", "pruned", ""),
        TrialEnded("wood", "a", "failed", "Traceback\nValueError: too hot"),
        CategoryEnded("tile", "finished", {"num_trials": 2}, {"dskd.note": "done"}),
        CategoryEnded("wood", "failed", {}, {}),
    ]
    for event in events:
        first.put(event)
    assert first.close(60) == 0
    assert not (tmp_path / "unsent.jsonl").exists()

    found = runs(uri, "spring")
    assert set(found) == {"tile", "wood", "tile-a", "tile-b", "wood-a"}
    parents = {name: found[name].info.run_id for name in ("tile", "wood")}
    for name in ("tile-a", "tile-b", "wood-a"):
        run = found[name]
        assert run.data.tags["mlflow.parentRunId"] == parents[name.split("-")[0]]
        assert run.data.params["learning_rate"] == "0.1" and run.data.params["levels"] == "(1, 2)"
        assert run.data.tags["dskd.selection"] == "val"
    assert {name: run.info.status for name, run in found.items()} == {
        "tile": "FINISHED", "wood": "FAILED", "tile-a": "FINISHED", "tile-b": "FINISHED", "wood-a": "FAILED",
    }  # fmt: skip
    assert {name: found[name].data.tags["dskd.status"] for name in ("tile-a", "tile-b", "wood-a")} == {
        "tile-a": "finished", "tile-b": "pruned", "wood-a": "failed",
    }  # fmt: skip
    assert found["wood-a"].data.tags["dskd.error"].endswith("too hot")
    assert found["tile"].data.metrics == {"num_trials": 2} and found["tile"].data.tags["dskd.note"] == "done"
    history = MlflowClient(tracking_uri=uri).get_metric_history(found["tile-a"].info.run_id, "val/best_objective")
    assert [(each.step, each.value, each.timestamp) for each in history] == [(1, 0.5, 1000), (2, 0.7, 2000)]


def test_a_trial_that_a_killed_search_left_ends_with_its_category(uri: str, tmp_path: Path) -> None:
    killed = tracker(uri, "recovery", tmp_path)
    for event in (*one_trial("tile", "a", 0.5), *one_trial("wood", "a", 0.5)):
        killed.put(event)
    assert killed.close(60) == 0
    continued = tracker(uri, "recovery", tmp_path)
    for event in (
        *one_trial("tile", "b", 0.5),
        TrialEnded("tile", "b", "finished", ""),
        CategoryEnded("tile", "finished", {}, {}),
    ):
        continued.put(event)
    assert continued.close(60) == 0
    found = runs(uri, "recovery")
    assert {name: run.info.status for name, run in found.items()} == {
        "tile": "FINISHED", "tile-a": "KILLED", "tile-b": "FINISHED", "wood": "RUNNING", "wood-a": "RUNNING",
    }  # fmt: skip
    assert found["tile-a"].data.tags["dskd.status"] == "lost"


def test_a_continued_search_writes_to_the_same_runs(uri: str, tmp_path: Path) -> None:
    for objectives, end, status in (((0.5,), ["finished"], "FINISHED"), ((0.6, 0.8), [], "RUNNING")):
        writer = tracker(uri, "summer", tmp_path)
        for event in one_trial("tile", "a", *objectives):
            writer.put(event)
        for _ in end:
            writer.put(TrialEnded("tile", "a", "failed", "its node is gone"))
            writer.put(TrialEnded("tile", "a", "finished", ""))
        assert writer.close(60) == 0
        found = runs(uri, "summer")
        assert set(found) == {"tile", "tile-a"}
        assert found["tile-a"].data.metrics["val/best_objective"] == objectives[-1]
        assert found["tile-a"].info.status == status and "dskd.error" not in found["tile-a"].data.tags


def test_a_new_search_looks_for_no_runs_but_for_those_whose_answer_was_lost(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow looks at all runs of the experiment for that, so that each trial would cost more than the one before."""
    looked: list[str] = []
    search_runs, create_run = MlflowClient.search_runs, MlflowClient.create_run

    def look(self: MlflowClient, ids: list[str], wanted: str = "", **more: Any) -> object:
        looked.append(wanted)
        return search_runs(self, ids, wanted, **more)

    def create_and_lose(self: MlflowClient, *args: Any, **more: Any) -> Run:
        made = create_run(self, *args, **more)
        if more["run_name"] == "tile-b" and "lost" not in looked:
            looked.append("lost")
            raise ConnectionError("the answer")
        return made

    monkeypatch.setattr(MlflowClient, "search_runs", look)
    monkeypatch.setattr(MlflowClient, "create_run", create_and_lose)
    monkeypatch.setattr(outbox, "FIRST_PAUSE", 0.01)
    writer = tracker(uri, "many", tmp_path)
    for trial in "abc":
        for event in one_trial("tile", trial, 0.5):
            writer.put(event)
    assert writer.close(60) == 0
    assert looked[0] == "lost" and len(looked) == 2 and "'b'" in looked[1]
    assert set(runs(uri, "many")) == {"tile", "tile-a", "tile-b", "tile-c"}


def test_an_event_that_mlflow_refuses_does_not_stop_the_others(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = tracker(uri, "autumn", tmp_path)
    with caplog.at_level(logging.ERROR, "tune.tracking.outbox"):
        writer.put(TrialStarted("tile", "a", {"epochs": 3}))
        writer.put(TrialStarted("tile", "a", {"epochs": 4}))  # MLflow's parameters cannot change
        writer.put(EpochDone("tile", "a", 1, {"val/best_objective": 0.5}, 1))
        assert writer.close(60) == 0
    faults = [record.getMessage() for record in caplog.records if record.name == "tune.tracking.outbox"]
    (fault,) = faults
    assert fault.startswith("could not track TrialStarted of tile: MlflowException: ") and "\n" not in fault
    data = runs(uri, "autumn")["tile-a"].data
    assert data.params == {"epochs": "3"} and data.metrics == {"val/best_objective": 0.5}


def test_the_alias_champion_moves_only_to_a_better_detector_of_the_same_images(
    uri: str, detector_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(detector_folder, tmp_path / "detector")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/curves.png").write_text("")
    writer = tracker(uri, "winter", tmp_path)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)

    def register(trial: str, objective: float, data: str = "images", promote: Promote = "auto") -> Registration:
        figures = {"val/objective": objective, "test/aupro": 0.5}
        return writer.register_champion(
            "tile", trial, tmp_path / "detector", figures, data, 60, figures=tmp_path / "figures", promote=promote
        )

    def champion() -> str:
        return str(client.get_model_version_by_alias("dskd-tile", "champion").run_id)

    first = register("a", 0.8)
    assert first.is_champion and first.model == "dskd-tile" and champion() == first.run_id
    worse = register("b", 0.7)
    assert not worse.is_champion and champion() == first.run_id
    again = register("a", 0.8)
    assert again == first and champion() == first.run_id
    better = register("c", 0.9)
    assert better.is_champion and champion() == better.run_id
    elsewhere = register("d", 0.99, "other images")
    assert elsewhere.alias == "candidate" and champion() == better.run_id, "objectives on other images do not compare"
    assert elsewhere.reason.startswith("version 3, the champion, was evaluated on other data; --promote always")
    asked_for = register("d", 0.99, "other images", "always")
    assert asked_for.is_champion and champion() == elsewhere.run_id == asked_for.run_id
    assert register("c", 0.9).alias == "candidate" and register("c", 0.9, promote="always").is_champion
    assert register("d", 0.99, "other images", "never").alias == "" and champion() == better.run_id
    assert client.get_registered_model("dskd-tile").aliases.keys() == {"champion", "candidate"}
    assert len({each.version for each in (first, worse, better, elsewhere)}) == 4
    writer.close(60)

    found = runs(uri, "winter")
    assert found["tile"].data.tags["dskd.champion_run"] == elsewhere.run_id  # the last that was registered
    assert found["tile-c"].info.run_id == better.run_id and found["tile-c"].data.metrics["test/aupro"] == 0.5
    assert {each.path for each in client.list_artifacts(better.run_id)} == {"model", "validation"}
    packed = client.list_artifacts(better.run_id, "model/artifacts/detector")
    assert {"model/artifacts/detector/detector.json"} <= {each.path for each in packed}


@pytest.mark.parametrize("name", ["it's", 'a"b', "100 % of %_", "a b", "übung", "a;b--c", "a\\b", "& # x"])
def test_categories_of_any_name_keep_runs_of_their_own(uri: str, tmp_path: Path, name: str) -> None:
    check_category(name)
    for _ in range(2):
        writer = tracker(uri, "names", tmp_path)
        for event in (*one_trial(name, "a", 0.5), TrialEnded(name, "a", "finished", "")):
            writer.put(event)
        assert writer.close(60) == 0
    assert [run.info.status for known, run in runs(uri, "names").items() if known == f"{name}-a"] == ["FINISHED"]


@pytest.mark.parametrize("name", ['it\'s "so"', "a:b", "a/b", "a\nb"])
def test_categories_that_mlflow_cannot_name_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match="rename its folder") as raised:
        check_category(name)
    assert "\n" not in str(raised.value)


def test_the_images_of_a_trial_are_an_input_of_its_run_and_its_parent(uri: str, tmp_path: Path) -> None:
    for trial in ("a", "b"):
        writer = tracker(uri, "inputs", tmp_path)
        for event in (*one_trial("tile", trial, 0.5), DataUsed("tile", trial, "/data/tile", "ab" * 32)):
            writer.put(event)
        assert writer.close(60) == 0
    found = runs(uri, "inputs")
    for name in ("tile", "tile-a", "tile-b"):
        inputs = found[name].inputs
        assert inputs is not None
        (used,) = inputs.dataset_inputs
        assert (used.dataset.name, used.dataset.digest) == ("tile", "ab" * 18)
        assert [tag.value for tag in used.tags] == ["training"]
        assert found[name].data.tags.get("dskd.data_sha256") == (None if name == "tile" else "ab" * 32)
        source = mlflow.data.get_source(used.dataset)
        assert str(getattr(source, "uri", "")) == "/data/tile"


def test_a_search_that_selects_on_the_test_set_never_becomes_champion(uri: str, tmp_path: Path, light: None) -> None:
    (tmp_path / "detector").mkdir()
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    for selection, objective in (("val", 0.5), ("oracle", 0.9), ("oracle", 0.95), ("oracle", 0.92)):
        writer = Tracker(
            uri, "cheat", artifact_location=f"file://{tmp_path}/artifacts", tags={"dskd.selection": selection},
            unsent=tmp_path / "unsent.jsonl",
        )  # fmt: skip
        done = writer.register_champion(
            "cheated", f"{objective}", tmp_path / "detector", {"val/objective": objective}, "images", 60
        )
        writer.close(60)
        expected = {0.5: "champion", 0.9: "oracle", 0.95: "oracle", 0.92: ""}[objective]
        assert done.alias == expected
    aliases = client.get_registered_model("dskd-cheated").aliases
    assert {name: str(version) for name, version in aliases.items()} == {"champion": "1", "oracle": "3"}


def test_a_detector_of_an_untrained_teacher_never_gets_an_alias_and_holds_none(
    uri: str, tmp_path: Path, light: None
) -> None:
    """Also one that an earlier version gave it to: the first detector of a trained teacher takes it."""
    (tmp_path / "detector").mkdir()
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)

    def register(teacher: str, trial: str, promote: Promote) -> Registration:
        tags = {"dskd.selection": "val", "dskd.teacher": teacher}
        unsent = tmp_path / "unsent.jsonl"
        writer = Tracker(uri, "wiring", artifact_location=f"file://{tmp_path}/a", tags=tags, unsent=unsent)
        done = writer.register_champion(
            "wired", trial, tmp_path / "detector", {"val/objective": 0.9}, trial, 60, promote=promote
        )
        writer.close(60)
        return done

    choices: tuple[Promote, ...] = ("auto", "always", "never")
    for promote in choices:
        wiring = register("random (untrained)", "one", promote)
        assert wiring.alias == "" and wiring.reason == "its teacher is untrained"
    assert client.get_registered_model("dskd-wired").aliases == {}
    client.set_registered_model_alias("dskd-wired", "champion", wiring.version)
    assert register("pretrained", "two", "auto").is_champion


def test_detectors_compare_where_what_evaluated_them_is_the_same(
    uri: str, tmp_path: Path, light: None, detector_folder: Path
) -> None:
    (tmp_path / "detector").mkdir()
    record = read_record(detector_folder)
    others = [
        dataclasses.replace(record, validation_files=record.validation_files[:1]),
        dataclasses.replace(record, textures_sha256="dtd", num_textures=3),
        dataclasses.replace(record, data_sha256="0" * 64),
        dataclasses.replace(record, selection="oracle"),
    ]
    assert len({evaluation_key(each) for each in (record, *others)}) == 5
    assert evaluation_key(dataclasses.replace(record, step=1, metrics={})) == evaluation_key(record)
    writer = tracker(uri, "compared", tmp_path)
    for trial, asked, alias in (("a", record, "champion"), ("b", others[0], "candidate"), ("c", record, "champion")):
        done = writer.register_champion(
            "compared", trial, tmp_path / "detector", {"val/objective": 0.9}, record.data_sha256, 60,
            evaluation_sha256=evaluation_key(asked),
        )  # fmt: skip
        assert done.alias == alias
    writer.close(60)


def test_a_category_has_one_parent_run_whether_it_could_not_begin_was_interrupted_or_continued(
    uri: str, tmp_path: Path
) -> None:
    ends = [
        (CategoryEnded("tile", "interrupted", {}, {"dskd.error": "the time budget ended"}), "KILLED"),
        (CategoryEnded("tile", "failed", {}, {"dskd.error": "no trial finished"}), "FAILED"),
        (CategoryEnded("tile", "finished", {}, {}), "FINISHED"),
    ]
    for end, status in ends:
        writer = tracker(uri, "budget", tmp_path)
        writer.put(end)
        assert writer.close(60) == 0
        found = runs(uri, "budget")
        assert {name: run.info.status for name, run in found.items()} == {"tile": status}
        assert found["tile"].data.tags.get("dskd.error") == end.tags.get("dskd.error")


def test_runs_that_a_lost_driver_left_are_closed_by_the_next_start_and_those_of_another_search_are_not(
    uri: str, tmp_path: Path
) -> None:
    def begun(place: str, category: str) -> Tracker:
        return Tracker(
            uri, "lost", artifact_location=f"file://{tmp_path}/artifacts", tags={PLACE: place},
            unsent=tmp_path / f"{category}.jsonl",
        )  # fmt: skip

    for place, category in (("here", "tile"), ("elsewhere", "wood")):
        lost = begun(place, category)
        for event in one_trial(category, "a", 0.5):
            lost.put(event)
        lost.close(60)
    after = begun("here", "tile")
    after.put(SearchBegan())
    assert after.close(60) == 0
    found = runs(uri, "lost")
    assert {name: run.info.status for name, run in found.items()} == {
        "tile": "KILLED", "tile-a": "KILLED", "wood": "RUNNING", "wood-a": "RUNNING",
    }  # fmt: skip
    assert found["tile-a"].data.tags["dskd.error"] == "its driver was lost; the same command continues"
    again = begun("here", "tile")
    for event in (*one_trial("tile", "a", 0.6), TrialEnded("tile", "a", "finished", "")):
        again.put(event)
    again.put(CategoryEnded("tile", "finished", {}, {}))
    again.close(60)
    found = runs(uri, "lost")
    assert {found[name].info.status for name in ("tile", "tile-a")} == {"FINISHED"}
    assert not [name for name in ("tile", "tile-a") if "dskd.error" in found[name].data.tags]


def test_a_stop_closes_the_runs_and_what_mlflow_does_not_take_is_kept(uri: str, away: str, tmp_path: Path) -> None:
    for place, num_unsent in ((uri, 0), (away, 7)):
        writer = tracker(place, "stopped", tmp_path)
        for event in (*one_trial("tile", "a", 0.5), *one_trial("tile", "b", 0.5)):
            writer.put(event)
        left = writer.stop({"tile": ["a", "b"]}, "stopped; the same command continues", 30.0 if place == uri else 0.1)
        writer.put(TrialEnded("tile", "a", "failed", "a thread that does not know"))
        assert left == num_unsent == len(Journal(tmp_path / "unsent.jsonl").read())
        if place == uri:
            found = runs(uri, "stopped")
            assert {run.info.status for run in found.values()} == {"KILLED"}
            assert {run.data.tags["dskd.error"] for run in found.values()} == {"stopped; the same command continues"}


def test_nothing_is_written_while_the_lease_is_not_sure_and_nothing_after_it_is_lost(uri: str, tmp_path: Path) -> None:
    is_sure = threading.Event()
    writer = Tracker(
        uri, "unsure", artifact_location=f"file://{tmp_path}/artifacts", tags={}, unsent=tmp_path / "unsent.jsonl",
        may_write=is_sure.is_set,
    )  # fmt: skip
    for event in one_trial("tile", "a", 0.5):
        writer.put(event)
    with pytest.raises(TrackingUnavailableError):
        writer.add_study("tile", tmp_path, 0.1)
    assert MlflowClient(tracking_uri=uri).get_experiment_by_name("unsure") is None
    is_sure.set()
    assert writer.close(60) == 0 and set(runs(uri, "unsure")) == {"tile", "tile-a"}
    lost = tracker(uri, "abandoned", tmp_path)
    lost.abandon()
    lost.put(TrialStarted("tile", "a", {}))
    assert lost.close(60) == 0
    assert MlflowClient(tracking_uri=uri).get_experiment_by_name("abandoned") is None
    assert not (tmp_path / "unsent.jsonl").exists()


def test_two_searches_of_one_name_keep_unsent_events_of_their_own(tmp_path: Path) -> None:
    places = [("s3://b/one", "http://m"), ("s3://b/two", "http://m"), ("s3://b/one", "http://n")]
    files = [Addresses.resolve(storage, "parts", uri).unsent_events("parts") for storage, uri in places]
    assert len(set(files)) == 3 and len({file.parent for file in files}) == 1
    secret = Addresses.resolve("s3://b/one", "parts", "http://ann:changed@m").unsent_events("parts")
    assert secret == files[0], "another password is the same server"


def test_a_version_can_be_registered_without_promoting_it(uri: str, tmp_path: Path, light: None) -> None:
    (tmp_path / "detector").mkdir()
    writer = tracker(uri, "shy", tmp_path)
    done = writer.register_champion(
        "shy", "a", tmp_path / "detector", {"val/objective": 0.5}, "images", 60, promote="never"
    )
    writer.close(60)
    assert done.alias == "" and not done.is_champion and done.version == "1"
    assert MlflowClient(tracking_uri=uri, registry_uri=uri).get_registered_model("dskd-shy").aliases == {}


def test_uploads_are_tried_again_while_artifacts_have_no_home(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, light: None
) -> None:
    (tmp_path / "detector").mkdir()
    unwell = requests.Response()
    unwell.status_code = 503
    outages = [requests.HTTPError(response=unwell), requests.ConnectionError("reset"), ConnectionResetError()]
    send = MlflowClient.log_artifacts

    def unsteady(*words: object) -> None:
        if outages:
            raise outages.pop()
        send(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(MlflowClient, "log_artifacts", unsteady)
    monkeypatch.setattr(outbox, "FIRST_PAUSE", 0.01)
    writer = tracker(uri, "outage", tmp_path)
    assert writer.register_champion("home", "a", tmp_path / "detector", {"val/objective": 1.0}, "i", 60).is_champion
    assert outages == []
    refused = requests.Response()
    refused.status_code = 403
    outages.append(requests.HTTPError(response=refused))
    with pytest.raises(TrackingRefusedError, match="MLflow refused"):
        writer.register_champion("home", "b", tmp_path / "detector", {"val/objective": 1.0}, "i", 60)
    assert writer.close(60) == 0


def test_events_that_an_absent_server_never_took_are_kept_and_written_by_the_next_search(
    away: str, uri: str, tmp_path: Path
) -> None:
    events = [*one_trial("tile", "a", 0.5, 0.7), TrialEnded("tile", "a", "pruned", "")]
    writer = tracker(away, "lost", tmp_path)
    for event in events:
        writer.put(event)
    assert writer.close(1) == len(events)
    kept = [json.loads(line) for line in (tmp_path / "unsent.jsonl").read_text().splitlines()]
    assert kept == [json.loads(json.dumps({"event": type(event).__name__, **event._asdict()})) for event in events]

    still_away = tracker(away, "lost", tmp_path)
    still_away.put(CategoryEnded("tile", "finished", {}, {}))
    assert still_away.close(0) == len(events) + 1

    assert tracker(uri, "lost", tmp_path).close(60) == 0
    assert not (tmp_path / "unsent.jsonl").exists()
    found = runs(uri, "lost")
    assert found["tile-a"].data.params["learning_rate"] == "0.1"
    assert (
        found["tile-a"].data.metrics["val/best_objective"] == 0.7
        and found["tile-a"].data.tags["dskd.status"] == "pruned"
    )
    assert found["tile"].info.status == "FINISHED"


def test_events_of_an_outage_are_on_disk_before_the_search_is_killed(
    away: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox, "FIRST_PAUSE", 0.01)
    killed = tracker(away, "night", tmp_path)
    events = [*one_trial("tile", "a", 0.5, 0.7), TrialEnded("tile", "a", "finished", "")]
    unsent = tmp_path / "unsent.jsonl"
    killed.put(events[0])
    deadline = time.monotonic() + 60
    while not unsent.is_file():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for event in events[1:]:
        killed.put(event)
        assert type(event).__name__ in unsent.read_text().splitlines()[-1]
    left = tmp_path / "left"
    left.mkdir()
    shutil.copy(unsent, left)  # as the kill leaves it: this one's thread cannot be killed
    with (left / "unsent.jsonl").open("a") as file:
        file.write('{"event": "EpochDone", "categ')

    continued = tracker(uri, "night", left)
    continued.put(CategoryEnded("tile", "finished", {}, {}))
    assert continued.close(60) == 0 and not (left / "unsent.jsonl").exists()
    assert "holds a line that is no event" in caplog.text
    found = runs(uri, "night")
    assert {name: run.info.status for name, run in found.items()} == {"tile": "FINISHED", "tile-a": "FINISHED"}
    history = MlflowClient(tracking_uri=uri).get_metric_history(found["tile-a"].info.run_id, "val/best_objective")
    assert [(each.step, each.value) for each in history] == [(1, 0.5), (2, 0.7)]
    killed.close(0)


def test_an_outage_on_a_full_disk_keeps_its_events_in_memory(caplog: pytest.LogCaptureFixture) -> None:
    Journal(Path("/dev/full")).add(one_trial("tile", "a", 0.5))
    assert "2 events for MLflow are kept only in memory: [Errno 28]" in caplog.text


def test_registering_with_an_absent_server_ends_with_its_patience(away: str, tmp_path: Path) -> None:
    writer = tracker(away, "lost", tmp_path)
    with pytest.raises(TrackingUnavailableError):
        writer.register_champion("tile", "a", tmp_path, {"val/objective": 0.5}, "images", 0.0)
    assert writer.close(60) == 0


def test_an_absent_server_is_found_before_the_search_starts(away: str, uri: str) -> None:
    with pytest.raises(ConnectionError, match="does not answer: ") as raised:
        check_server(away.replace("//", "//user:secret@"))
    assert "\n" not in str(raised.value) and "user:secret@" not in str(raised.value).split(": ")[0]
    check_server(uri)


def test_addresses_are_shown_without_their_password() -> None:
    assert tracking_ui_command("http://me:secret@host:5000") == "open http://host:5000"
    assert tracking_ui_command("sqlite:////tmp/m.db") == "mlflow ui --backend-store-uri sqlite:////tmp/m.db"
    assert run_link("sqlite:////tmp/m.db", "run1") == "run1" and run_link("http://host", "") == ""


def test_progress_counts_the_trials_of_each_category(capsys: pytest.CaptureFixture[str]) -> None:
    progress = SearchProgress(trials=4)
    events: list[Event] = [
        *one_trial("tile", "a", 0.5, 0.75),
        *one_trial("wood", "b", 0.25),
        TrialEnded("tile", "a", "finished", ""),
        TrialEnded("wood", "b", "failed", "Traceback\nValueError: too hot\n"),
        TrialEnded("tile", "c", "pruned", ""),
    ]
    for event in events:
        progress.show(event)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.split("] ")[1] for line in shown.err.splitlines()] == [
        "tile: trial 1 of 4 (a) finished at 0.7500, the first to end",
        "wood: trial 1 of 4 (b) failed after 1 of ? validations: ValueError: too hot",
        "tile: trial 2 of 4 (c) pruned after 0 of ? validations",
    ]


def test_a_deleted_experiment_is_found_before_the_search_and_its_events_are_kept_later(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "FIRST_PAUSE", 0.01)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("gone", f"file://{tmp_path}/artifacts")
    check_may_write(uri, "gone", ["dskd-gone"])
    client.delete_experiment(experiment)
    with pytest.raises(
        ConnectionError, match=r"was deleted; restore it .mlflow experiments restore .* or give"
    ) as found:
        check_may_write(uri, "gone", [])
    assert "\n" not in str(found.value)

    writer = tracker(uri, "gone", tmp_path)
    with caplog.at_level(logging.WARNING, "tune.tracking.outbox"):
        for event in one_trial("tile", "a", 0.5, 0.7):
            writer.put(event)
        with pytest.raises(TrackingRefusedError, match="active"):
            writer.register_champion("tile", "a", tmp_path, {"val/objective": 0.5}, "images", 600)
        assert writer.close(600) == 3, "nobody waits for ten minutes for what only a person can change"
    assert "active" in writer.trouble
    said = [record.getMessage() for record in caplog.records if record.name == "tune.tracking.outbox"]
    assert len(said) == 1 and "kept" in said[0] and "\n" not in said[0]
    client.restore_experiment(experiment)
    again = tracker(uri, "gone", tmp_path)
    assert again.close(60) == 0 and not (tmp_path / "unsent.jsonl").exists()
    assert runs(uri, "gone")["tile-a"].data.metrics["val/best_objective"] == 0.7


def test_a_database_file_that_another_locks_during_the_search_costs_a_line_and_no_event(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_WARNING_PAUSE", 0.0)
    check_server(uri)
    hurried = SimpleNamespace(text=lambda said: sqlalchemy.text(said.replace("= 20000", "= 100")))
    monkeypatch.setattr("mlflow.store.db.utils.sql", hurried)  # MLflow lets SQLite wait for a lock for 20 s
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        writer = tracker(uri, "locked", tmp_path)
        with caplog.at_level(logging.WARNING, "tune.tracking.outbox"):
            for event in one_trial("tile", "a", 0.5, 0.7):
                writer.put(event)
            while not caplog.records:
                time.sleep(0.05)
            assert writer.close(0.1) == 3
        (said,) = [record.getMessage() for record in caplog.records]
        assert "database is locked" in said and "\n" not in said
        holder.execute("ROLLBACK")
    assert tracker(uri, "locked", tmp_path).close(60) == 0 and not (tmp_path / "unsent.jsonl").exists()
    assert runs(uri, "locked")["tile-a"].data.metrics["val/best_objective"] == 0.7


@pytest.mark.parametrize("flag", ["--tracking-uri", "--study-storage"])
def test_a_locked_or_unwritable_database_file_is_found_before_the_search(flag: str, tmp_path: Path) -> None:
    file = tmp_path / "held.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as holder:
        holder.execute("CREATE TABLE held (x)")
        check_unlocked(f"sqlite:///{file}", flag)
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tune.storage.files._SQLITE_SECONDS", 0.05)
            with pytest.raises(
                ConnectionError, match=f"{flag} sqlite:.*held.db cannot be written to: database is locked"
            ):
                check_unlocked(f"sqlite:///{file}", flag)
        holder.execute("ROLLBACK")
    file.write_bytes(b"no database at all" * 100)
    with pytest.raises(ConnectionError, match="not a database"):
        check_unlocked(f"sqlite:///{file}", flag)


def test_one_at_a_time_opens_a_database_file_first(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def enter() -> None:
        with created_by_one(f"sqlite:///{tmp_path}/a.db"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            inside[0] -= 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and list(tmp_path.iterdir()) == []
    with created_by_one("postgresql+psycopg2://db/x"), created_by_one("postgresql+psycopg2://db/x"):
        pass


@pytest.mark.services
def test_two_processes_that_make_one_database_at_once_both_succeed(tmp_path: Path) -> None:
    """Each imports first and then waits for the other, so that both reach the file within milliseconds."""
    script = (
        "import sys, time, pathlib, optuna\n"
        "from tune.tracking.client import check_server, prepare_client\n"
        "from tune.preflight.checks import _check_studies\n"
        "home = pathlib.Path(sys.argv[1]); (home / sys.argv[2]).touch()\n"
        "while len(list(home.glob('ready-*'))) < 2: time.sleep(0.001)\n"
        "_check_studies(f'sqlite:///{home}/both.db'); check_server(f'sqlite:///{home}/mlflow.db')\n"
    )
    root = Path(__file__).resolve().parents[1]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script, tmp_path, f"ready-{name}"], cwd=root, stderr=subprocess.PIPE, text=True
        )
        for name in "ab"
    ]
    ends = [(each.communicate()[1], each.returncode) for each in both]
    assert [code for _, code in ends] == [0, 0], ends
