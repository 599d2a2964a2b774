"""What the driver of a study does beside Tune, without the dashboard that Ray Train's own cleaner needs."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
import ray.util
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tune.study import _free_workers
from tune.worker import PLACEMENT_GROUP


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
