"""Faults that a search must survive, with real processes: killed processes and nodes, draining nodes, and new ones."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import chaos
import pytest
import services
from faulty_link import FaultyLink
from local_cluster import Cluster, cluster, wait_for
from watched_search import Search, account, environment, study_of

from tune.storage.files import Storage
from tune.storage.uris import Addresses

ROOT = Path(__file__).resolve().parents[1]
SHORT_FAULTS = ("worker killed", "queue killed", "driver killed", "head killed", "disk full", "storage moved")
TINY = ["--teacher-weights", "random", "--image-size", "32", "--batch-size", "4", "--preset", "stfpm",
        "--folds", "0"]  # fmt: skip


@pytest.mark.cluster
def test_six_faults_cost_a_search_neither_a_trial_nor_a_bit_of_its_champions(
    cluster_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, str] = {}
    canaries = {name: secrets.token_hex(16) for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")}
    for name, canary in canaries.items():
        monkeypatch.setenv(name, canary)
    monkeypatch.setattr(chaos, "environment", lambda of: used.update(environment(of)) or used)
    options = chaos.Options(
        faults=6, only=SHORT_FAULTS, per_search=6, setups=(0,), categories=2, epochs=24, longest_pause=1.0
    )
    is_whole = chaos.run(options, cluster_folder)
    assert is_whole, capsys.readouterr().out

    canaries["RAY_AUTH_TOKEN"] = used["RAY_AUTH_TOKEN"]
    assert list(cluster_folder.glob("logs-*/runtime_env_agent.log")), "Ray's logs of every node are among them"
    for file in (path for path in cluster_folder.rglob("*") if path.is_file()):  # logs, databases, snapshots, detectors
        content = file.read_bytes()
        assert not [name for name, canary in canaries.items() if canary.encode() in content], file


@pytest.mark.cluster
@pytest.mark.parametrize("workers", [1, 2])
def test_a_search_outlives_a_node_that_was_announced_to_go_and_uses_those_that_join(
    workers: int, mvtec_root: Path, cluster_folder: Path
) -> None:
    """The only node of all, or one of the two on which a trial's two workers are."""
    env = environment(cluster_folder) | {"DSKD_CHECKPOINT_SECONDS": "3600"}
    trials, epochs = (4, 40) if workers == 1 else (1, 24)
    kind = "worker"
    with cluster(cluster_folder, env, workers, 1) as made:
        words = [
            "--data", str(mvtec_root), "--categories", "tile", "--address", made.address, "--trials", str(trials),
            "--epochs", str(epochs), "--storage", env["DSKD_STORAGE"], "--workers-per-trial", str(workers), "--json",
            *TINY,
        ]  # fmt: skip
        search = Search("shrinks", words, env, cluster_folder).start()
        try:
            states = cluster_folder / "results" / "shrinks"
            leaving = made.nodes[0]
            wait_for(lambda: made.find("relay") and len(made.find(kind)) == workers, "a trial")
            with _standing_still(made.find(kind)):
                again = subprocess.run(
                    search.driver.args, cwd=ROOT, env=env, capture_output=True, text=True, check=False
                )
                assert again.returncode == 2 and "a search 'shrinks' runs already" in again.stderr, again.stderr
                assert again.stderr.count("\n") == 1 and again.stdout == ""
                assert not list(states.rglob("training.pt")), "an hour has not passed"
                made.announce(leaving, 120)
            # One that is there may not be known yet; once the next one is there, it is.
            kept: set[Path] = set()
            wait_for(lambda: kept.update(states.rglob("training.pt")) or len(kept) > 1, "a second checkpoint")  # type: ignore[func-returns-value]
            made.kill_node(leaving)
            time.sleep(5)
            assert not search.has_ended, "a search waits for nodes"
            made.add(1)
            if workers == 1:
                # It leaves the other trials to the node that joins next.
                with _standing_still(wait_for(lambda: made.find(kind), "a trial on a node that joined")):
                    made.add(1)
                    _wait_for_work_everywhere(made, kind)
            else:
                _wait_for_work_everywhere(made, kind)
            outcome = search.outcome(300)
        finally:
            search.end()
        found = account(env, search.name, "tile", trials)
        assert outcome["num_trials"] == trials and found.doubled == 0 and found.redone <= 1, (outcome, found)
        assert found.statuses["finished"] + found.statuses["pruned"] == trials


@contextmanager
def _standing_still(processes: Iterable[Any]) -> Iterator[None]:
    """None of them gets on meanwhile, however fast this machine is."""
    stopped = [each.pid for each in processes]
    try:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _wait_for_work_everywhere(made: Any, kind: str) -> None:
    wait_for(
        lambda: {made.node_of(each) for each in made.find(kind)} >= set(made.nodes), "work on every node that joined"
    )


@pytest.mark.cluster
def test_a_category_of_which_every_trial_fails_is_reported_and_the_other_is_searched(
    mvtec_root: Path, cluster_folder: Path
) -> None:
    shutil.copytree(mvtec_root, cluster_folder / "data")
    # Sound at both ends, which is all that is looked at before a search begins.
    spoilt_file = cluster_folder / "data/tile/train/good/003.png"
    content = bytearray(spoilt_file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = b"x" * 64
    spoilt_file.write_bytes(content)
    env = environment(cluster_folder) | {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [
            sys.executable, "tune/search.py", "--data", str(cluster_folder / "data"), "--name", "spoilt",
            "--trials", "2", "--epochs", "2", "--storage", env["DSKD_STORAGE"], "--json", *TINY,
        ],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    spoilt, sound = json.loads(done.stdout)["categories"]
    assert spoilt["champion"] is None and spoilt["num_failed"] == 2 and "003.png" in spoilt["error"]
    assert sound["champion"] and sound["num_failed"] == 0, (sound, done.stderr)
    assert "tile: no champion: " in done.stderr
    study = study_of(env["DSKD_STUDY_STORAGE"], "spoilt", "tile")
    assert [(trial.state.name, trial.value) for trial in study.trials] == [("COMPLETE", 0.0)] * 2


@pytest.mark.cluster
def test_a_node_without_enough_memory_for_a_worker_ends_the_search_with_the_reason_and_costs_no_trial(
    mvtec_root: Path, cluster_folder: Path
) -> None:
    """What is lost before it takes a trial is charged to none; the same command goes on once there is memory."""
    env = environment(cluster_folder)
    made = Cluster(cluster_folder, env, ['--resources={"dskd_driver": 1}'])  # the study stays where memory suffices
    try:
        made.add(1, env={"RAY_memory_usage_threshold": "0.01"})  # the machine's use is always above that
        words = [
            "--data", str(mvtec_root), "--categories", "tile", "--address", made.address, "--trials", "2",
            "--epochs", "2", "--max-concurrent", "1", "--storage", env["DSKD_STORAGE"], "--json", *TINY,
        ]  # fmt: skip
        search = Search("starves", words, env, cluster_folder).start()
        log = cluster_folder / "starves.log"
        try:
            assert search.driver.wait(200) == 1, log.read_text()
            said = " ".join(log.read_text().split())
            assert "tile: no champion: no worker can start: out of memory: " in said and "--batch-size" in said
            assert "the same command continues the search" in said and " of 2 (" not in said
            made.add(1)
            made.kill_node(made.nodes[0])
            outcome = search.start().outcome(200)
        finally:
            search.end()
    finally:
        made.stop()
    assert (outcome["num_failed"], outcome["num_trials"]) == (0, 2) and outcome["champion"], log.read_text()
    found = account(env, "starves", "tile", 2)
    assert found.doubled == 0 and found.statuses["finished"] == 2, found


@pytest.mark.services
def test_an_s3_server_that_is_slow_overloaded_or_away_for_a_minute_costs_a_search_nothing(
    mvtec_root: Path, cluster_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := services.s3_unavailable():
        pytest.skip(reason)
    with services.s3(cluster_folder / "s") as store:
        address = urlsplit(store.endpoint)
        link = FaultyLink(str(address.hostname), int(address.port or 80))
        for name, value in store.env.items():  # several name the server
            monkeypatch.setenv(name, value.replace(store.endpoint, f"http://127.0.0.1:{link.port}"))
        uri = f"s3://{store.bucket}/searches"
        storage = Storage(uri)
        for state in ("slow", "503", "cut"):
            with link.faulty(state, 5):
                storage.write_json(f"{state}.json", {"state": state})
            assert storage.read_json(f"{state}.json") == {"state": state}
        assert link.num_refused > 0

        env = environment(cluster_folder) | {"DSKD_STORAGE": uri, "RAY_AUTH_MODE": "disabled"}
        words = [
            "--data", str(mvtec_root), "--categories", "tile", "--trials", "3", "--epochs", "30", "--storage", uri,
            "--json", *TINY,
        ]  # fmt: skip
        search = Search("away", words, env, cluster_folder).start()
        log = cluster_folder / "away.log"
        try:
            wait_for(lambda: " of 3 (" in log.read_text() or search.has_ended, "a trial's end")
            assert not search.has_ended, log.read_text()
            refused = link.num_refused
            with link.faulty("cut", 60):
                pass
            assert link.num_refused > refused, "the search needed the storage meanwhile, or the test shows nothing"
            outcome = search.outcome(400)
        finally:
            search.end()
            link.close()
        assert outcome["num_trials"] == 3 and outcome["num_failed"] == 0, log.read_text()
        assert account(env, "away", "tile", 3).doubled == 0


@pytest.mark.services
def test_a_driver_killed_while_mlflow_is_away_loses_neither_a_trial_nor_an_epoch(
    mvtec_root: Path, cluster_folder: Path
) -> None:
    if reason := services.mlflow_unavailable():
        pytest.skip(reason)
    database, artifacts = f"sqlite:///{cluster_folder}/tracked.db", str(cluster_folder / "artifacts")
    with services.mlflow_server(cluster_folder / "m", backend_uri=database, artifact_root=artifacts) as url:
        link = FaultyLink("127.0.0.1", int(url.rpartition(":")[2]))
        env = environment(cluster_folder) | {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{link.port}"}
        log = cluster_folder / "dark.log"
        unsent = Addresses.resolve(env["DSKD_STORAGE"], "dark", env["MLFLOW_TRACKING_URI"]).unsent_events("dark")
        with cluster(cluster_folder, env, 1, 1) as made:
            words = [
                "--data", str(mvtec_root), "--categories", "tile", "--address", made.address, "--trials", "3",
                "--epochs", "9", "--storage", env["DSKD_STORAGE"], "--json", *TINY,
            ]  # fmt: skip
            search = Search("dark", words, env, cluster_folder).start()
            try:
                wait_for(lambda: made.find("relay"), "a trial")
                with _standing_still(made.find("worker")):
                    link.state = "cut"

                def kept() -> list[str]:
                    return re.findall(r'"event": "(\w+)"', unsent.read_text()) if unsent.is_file() else []

                wait_for(lambda: kept().count("TrialEnded") >= 2 or search.has_ended, "a second trial's end")
                assert not search.has_ended, log.read_text()
                assert kept().count("EpochDone") >= 9
                search.kill()
                second = subprocess.run(
                    search.driver.args, cwd=ROOT, env=env, capture_output=True, text=True, check=False
                )
                assert second.returncode == 2 and "MLflow at " in second.stderr and "Traceback" not in second.stderr
                link.state = "sound"
                outcome = search.start().outcome(400)
            finally:
                search.end()
                link.close()
        found = account(env | {"MLFLOW_TRACKING_URI": url}, "dark", "tile", 3)
    assert outcome["num_trials"] == 3 and outcome["num_failed"] == 0 and not unsent.exists()
    assert found.doubled == 0 and found.untracked == 0 and found.redone <= 1, found
    assert found.statuses["finished"] + found.statuses["pruned"] == 3, found
