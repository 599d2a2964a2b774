"""Worker groups for real, on a Ray of this machine: killed in the middle, between trials, and unable to start."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from local_cluster import Process, titled, wait_for

from dskd.config import RunConfig
from tune.settings.workers import Workers
from tune.trial import groups as module
from tune.trial.assignment import Training
from tune.trial.follower import AssignmentFailedError
from tune.trial.groups import Groups, worker_groups
from tune.trial.spec import EPOCH, TrialSpec

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def ray_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Two CPUs; `request.param`: a folder from which processes import first."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("0" * 32)
    (tmp_path / "token").chmod(0o600)
    first = [str(tmp_path / name) for name in [getattr(request, "param", "")] if name]
    path = os.pathsep.join([*first, str(ROOT)])
    env = {"PYTHONPATH": path, "DSKD_CHECKPOINT_SECONDS": "0", "OMP_NUM_THREADS": "1"}
    ray.init(address="local", num_cpus=2, log_to_driver=False, runtime_env={"env_vars": env})
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture
def trial(tiny: RunConfig, mvtec_root: Path, tmp_path: Path) -> Any:
    """Makes a training of so many epochs."""

    def make(name: str, epochs: int, workers: int) -> Training:
        spec = TrialSpec(
            config=tiny.with_values({"epochs": epochs}).to_dict(), data=str(mvtec_root), category="tile",
            teacher_weights="random", cache_gb=1.0, num_workers=workers, cpus_per_worker=1.0, gpus_per_worker=0.0,
            workers_uri=str(tmp_path / "trials"), revision="",
        )  # fmt: skip
        return Training(trial_id=name, spec=spec)

    return make


def processes(title: str) -> list[Process]:
    """Processes of this Ray, by the beginning of their title."""
    return titled(os.getpid(), title)


def kill(title: str, number: signal.Signals = signal.SIGKILL) -> int:
    """Kill one; returns its pid."""
    (first, *_) = wait_for(lambda: processes(title), title, 60)
    os.kill(first.pid, number)
    return int(first.pid)


def trained(groups: Groups, assignment: Training, kills: dict[int, str]) -> list[int]:
    """The epochs that are reported; kills a process of that title as soon as an epoch is."""
    told = []
    for report in groups.follow(assignment):
        told.append(int(report[EPOCH]))
        if title := kills.pop(told[-1], ""):
            kill(title)
    groups.forget(assignment)
    return told


@pytest.mark.cluster
def test_a_lone_worker_and_the_dispatcher_are_killed_in_a_trial_and_between_two(
    ray_here: None, trial: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One dispatcher is told to end (SIGTERM), which it never does: it is replaced."""
    monkeypatch.setattr(module, "_HANG_SECONDS", 12.0)  # it answers within 10
    with worker_groups(
        Workers(1, 1.0, 0.0), min_workers=None, home=str(tmp_path), max_trials=2, first=trial("first", 1, 1).spec
    ) as groups:
        told = trained(
            groups, trial("one", 40, 1), {5: "ray::DispatcherActor", 15: "ray::LoneWorker", 25: "ray::DispatcherActor"}
        )
        assert sorted(set(told)) == list(range(1, 41)), "every epoch is told"
        assert len(told) <= 41, "and the one that was lost again"
        before = kill("ray::LoneWorker")  # idle
        assert trained(groups, trial("two", 3, 1), {}) == [1, 2, 3]
        (worker,) = processes("ray::LoneWorker")
        assert worker.pid != before
        assert trained(groups, trial("three", 3, 1), {}) == [1, 2, 3]
        assert [each.pid for each in processes("ray::LoneWorker")] == [worker.pid], "no process is started for a trial"

        before = kill("ray::DispatcherActor", signal.SIGTERM)
        assert trained(groups, trial("after", 3, 1), {}) == [1, 2, 3]
        assert [each.pid for each in processes("ray::DispatcherActor")] != [before]

        with ThreadPoolExecutor(2) as pool:  # two at once: a second group is started, and one is lost
            both = [pool.submit(trained, groups, trial(name, 60, 1), {}) for name in ("four", "five")]
            while len(processes("ray::LoneWorker")) < 2:
                assert not all(each.done() for each in both)
                time.sleep(0.1)
            kill("ray::LoneWorker")
            assert all(sorted(set(each.result())) == list(range(1, 61)) for each in both)
    deadline = time.monotonic() + 30
    while processes("ray::LoneWorker") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes("ray::LoneWorker") and ray.available_resources()["CPU"] == 2


@pytest.mark.cluster
def test_ddp_workers_are_killed_between_two_trials_and_in_one(ray_here: None, trial: Any, tmp_path: Path) -> None:
    """Either rank: the group is begun anew, and no new job or placement group is made for a trial."""
    with worker_groups(
        Workers(2, 1.0, 0.0), min_workers=None, home=str(tmp_path), max_trials=1, first=trial("first", 1, 2).spec
    ) as groups:
        assert trained(groups, trial("one", 3, 2), {}) == [1, 2, 3]
        for number in range(2):
            os.kill(processes("ray::RayTrainWorker")[number].pid, signal.SIGKILL)
            assert trained(groups, trial(f"after {number}", 3, 2), {}) == [1, 2, 3]
        told = trained(groups, trial("two", 12, 2), {4: "ray::RayTrainWorker", 8: "ray::TrainController"})
        assert sorted(set(told)) == list(range(1, 13)) and len(told) <= 14
        reserved = [each for each in ray.util.placement_group_table().values() if each["state"] != "REMOVED"]
        assert len(reserved) == 1
    assert not (tmp_path / "groups").exists()


@pytest.mark.cluster
@pytest.mark.parametrize("ray_here", ["broken"], indirect=True)
def test_workers_that_die_at_their_import_end_with_the_reason(ray_here: None, trial: Any, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "timm.py").write_text("raise ImportError('this node has no timm')")
    with worker_groups(Workers(1, 1.0, 0.0), min_workers=None, home=str(tmp_path), max_trials=1, first=None) as groups:
        post: Any = ray.get_actor(groups.dispatcher)
        ray.get(post.submit.remote(trial("one", 3, 1)))
        assert "this node has no timm" in ray.get(groups.fault(), timeout=150)


def test_a_failure_names_the_last_epoch_that_was_reported() -> None:
    from tune.trial.assignment import Failure

    error = AssignmentFailedError(Failure("no memory", is_own=True), 4)
    assert (str(error), error.epoch) == ("no memory", 4)
