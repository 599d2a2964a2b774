import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from tune.progress import Progress
from tune.tracking import (
    CategoryEnded,
    EpochDone,
    Event,
    Registration,
    Tracker,
    TrackingAway,
    TrialEnded,
    TrialStarted,
    check_server,
    run_link,
    tracking_ui_command,
    without_password,
)


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
            EpochDone(category, trial, number, {"objective": value}, 1000 * number)
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
        "tile": "FINISHED", "wood": "FAILED", "tile-a": "FINISHED", "tile-b": "KILLED", "wood-a": "FAILED",
    }  # fmt: skip
    assert {name: found[name].data.tags["dskd.status"] for name in ("tile-a", "tile-b", "wood-a")} == {
        "tile-a": "finished", "tile-b": "pruned", "wood-a": "failed",
    }  # fmt: skip
    assert found["wood-a"].data.tags["dskd.error"].endswith("too hot")
    assert found["tile"].data.metrics == {"num_trials": 2} and found["tile"].data.tags["dskd.note"] == "done"
    history = MlflowClient(tracking_uri=uri).get_metric_history(found["tile-a"].info.run_id, "objective")
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
            writer.put(TrialEnded("tile", "a", "finished", ""))
        assert writer.close(60) == 0
        found = runs(uri, "summer")
        assert set(found) == {"tile", "tile-a"}
        assert found["tile-a"].data.metrics["objective"] == objectives[-1]
        assert found["tile-a"].info.status == status


def test_an_event_that_mlflow_refuses_does_not_stop_the_others(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = tracker(uri, "autumn", tmp_path)
    with caplog.at_level(logging.ERROR, "tune.tracking"):
        writer.put(TrialStarted("tile", "a", {"epochs": 3}))
        writer.put(TrialStarted("tile", "a", {"epochs": 4}))  # MLflow's parameters cannot change
        writer.put(EpochDone("tile", "a", 1, {"objective": 0.5}, 1))
        assert writer.close(60) == 0
    faults = [record.getMessage() for record in caplog.records if record.name == "tune.tracking"]
    assert faults == ["could not track TrialStarted of tile"]
    data = runs(uri, "autumn")["tile-a"].data
    assert data.params == {"epochs": "3"} and data.metrics == {"objective": 0.5}


def test_the_alias_champion_moves_only_to_a_better_detector_of_the_same_images(uri: str, tmp_path: Path) -> None:
    (tmp_path / "detector").mkdir()
    (tmp_path / "detector/detector.json").write_text("{}")
    writer = tracker(uri, "winter", tmp_path)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)

    def register(trial: str, objective: float, data: str = "images") -> Registration:
        figures = {"val/objective": objective, "test/aupro": 0.5}
        return writer.register_champion("tile", trial, tmp_path / "detector", figures, data, 60)

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
    elsewhere = register("d", 0.1, "other images")
    assert elsewhere.is_champion and champion() == elsewhere.run_id, "objectives on other images do not compare"
    assert len({each.version for each in (first, worse, better, elsewhere)}) == 4
    writer.close(60)

    found = runs(uri, "winter")
    assert found["tile"].data.tags["dskd.champion_run"] == elsewhere.run_id
    assert found["tile-c"].info.run_id == better.run_id and found["tile-c"].data.metrics["test/aupro"] == 0.5
    assert [each.path for each in client.list_artifacts(better.run_id, "detector")] == ["detector/detector.json"]


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
    assert found["tile-a"].data.metrics["objective"] == 0.7 and found["tile-a"].info.status == "KILLED"
    assert found["tile"].info.status == "FINISHED"


def test_registering_with_an_absent_server_ends_with_its_patience(away: str, tmp_path: Path) -> None:
    writer = tracker(away, "lost", tmp_path)
    with pytest.raises(TrackingAway):
        writer.register_champion("tile", "a", tmp_path, {"val/objective": 0.5}, "images", 0.0)
    assert writer.close(60) == 0


def test_an_absent_server_is_found_before_the_search_starts(away: str, uri: str) -> None:
    with pytest.raises(ConnectionError, match="does not answer: ") as raised:
        check_server(away.replace("//", "//user:secret@"))
    assert "\n" not in str(raised.value) and "user:secret@" not in str(raised.value).split(": ")[0]
    check_server(uri)


def test_addresses_are_shown_without_their_password() -> None:
    assert without_password("postgresql://user:p@ss@host:5432/db") == "postgresql://host:5432/db"
    assert without_password("sqlite:////tmp/mlflow.db") == "sqlite:////tmp/mlflow.db"
    assert tracking_ui_command("http://me:secret@host:5000") == "open http://host:5000"
    assert tracking_ui_command("sqlite:////tmp/m.db") == "mlflow ui --backend-store-uri sqlite:////tmp/m.db"
    assert run_link("sqlite:////tmp/m.db", "run1") == "run1" and run_link("http://host", "") == ""


def test_progress_counts_the_trials_of_each_category(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(trials=4)
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
        "tile: trial 1/4 finished after 2 epochs; best validation objective so far 0.7500",
        "wood: trial 1/4 failed after 1 epochs: ValueError: too hot; best validation objective so far 0.2500",
        "tile: trial 2/4 pruned after 0 epochs; best validation objective so far 0.7500",
    ]
