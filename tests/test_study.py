"""What the driver of a study does beside Tune, without the dashboard that Ray Train's own cleaner needs."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import optuna
import pytest
import ray
import ray.util
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dskd.presets import PRESETS
from tune import study
from tune.settings import SearchSettings
from tune.space import build_space
from tune.study import _Deadline, _free_workers, _Halving, _sampler
from tune.worker import PLACEMENT_GROUP


def test_the_untuned_presets_are_never_pruned_and_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    space = build_space({"dskd": PRESETS["dskd"], "stfpm": PRESETS["stfpm"]})
    monkeypatch.setitem(study._revived, "space", space)
    untuned, _, hard, *_ = space.starting_points()
    halving = _Halving(time_attr="epoch", metric="objective", mode="max", max_t=10, grace_period=1, reduction_factor=3)
    decisions = {}
    for name, objective, point in (
        ("good", 0.9, hard), ("better", 0.95, hard), ("bad", 0.1, hard), ("untuned and worse", 0.05, untuned)
    ):  # fmt: skip
        trial = cast(Any, SimpleNamespace(trial_id=name, config=point))
        halving.on_trial_add(cast(Any, None), trial)
        decisions[name] = halving.on_trial_result(None, trial, {"epoch": 1, "objective": objective})
    assert decisions["bad"] == "STOP"
    assert decisions["untuned and worse"] == decisions["better"] == "CONTINUE"


def test_the_deadline_interrupts_tune_once_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setitem(study._revived, "is_cut", False)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        for deadline, expected in ((None, 0), (time.time() + 600, 0), (time.time() - 1, 1)):
            monkeypatch.setitem(study._revived, "deadline", deadline)
            assert not _Deadline().stop_all(), "to stop the trials would end them for good"
            assert len(seen) == expected == study._revived.get("is_cut", False)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "qmc", "random"])
def test_every_sampler_draws_from_the_space_and_each_category_its_own(sampler: Any) -> None:
    space = build_space({"dskd": PRESETS["dskd"]})
    settings = SearchSettings(data="data", sampler=sampler)
    drawn = []
    for category in ("bolt", "bolt", "screw"):
        asked = optuna.create_study(direction="maximize", sampler=_sampler(settings, category, 1))
        for value in (0.3, 0.5, 0.4):
            trial = asked.ask()
            space.ask(trial)
            asked.tell(trial, value)
        drawn.append([space.configuration(trial.params) for trial in asked.trials])
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.cluster
def test_an_ended_trial_gives_its_workers_back_where_no_dashboard_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Worker:  # in here, or Ray's processes would look for this file by its name
        def pid(self) -> int:
            return os.getpid()

    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("0" * 32)
    (tmp_path / "token").chmod(0o600)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        group = ray.util.placement_group([{"CPU": 1}] * 2)
        placed = PlacementGroupSchedulingStrategy(placement_group=group)
        workers = [ray.remote(Worker).options(num_cpus=1, scheduling_strategy=placed).remote() for _ in range(2)]
        pids = ray.get([worker.pid.remote() for worker in workers])
        assert ray.available_resources().get("CPU", 0) == 0 and all(Path(f"/proc/{pid}").exists() for pid in pids)

        trial = cast(Any, SimpleNamespace(last_result={PLACEMENT_GROUP: group.id.hex()}))
        for _ in range(2):  # a trial that ended by itself has given its workers back already
            _free_workers(trial)
        deadline = time.monotonic() + 60
        while ray.available_resources().get("CPU", 0) < 2 or any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.monotonic() < deadline, ray.util.placement_group_table(group)
            time.sleep(0.1)
        _free_workers(cast(Any, SimpleNamespace(last_result=None)))  # died before its first report
    finally:
        ray.shutdown()
