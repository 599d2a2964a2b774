import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import ray.train.torch
import ray.tune
import ray.util
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tune.runtime.ray_internals import Reservation, autoscaler_can_help, free_abandoned, lost_relays_replaced


def wait_until_free(cpus: float, pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < cpus or any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, ray.util.placement_group_table()
        time.sleep(0.1)


@pytest.mark.cluster
def test_what_a_killed_controller_reserved_is_freed(local_ray: None) -> None:
    class Worker:  # in here, or Ray's processes would look for this file by its name
        def pid(self) -> int:
            return os.getpid()

    class Controller:
        def reserve(self) -> tuple[str, int]:
            self.group = ray.util.placement_group([{"CPU": 1}])
            placed = PlacementGroupSchedulingStrategy(placement_group=self.group)
            worker: Any = ray.remote(Worker).options(num_cpus=1, scheduling_strategy=placed).remote()
            self.worker = worker  # a handle that nobody holds ends its actor
            return self.group.id.hex(), ray.get(worker.pid.remote())

    killed: Any
    living: Any
    killed, living = (ray.remote(Controller).options(num_cpus=0).remote() for _ in range(2))
    lost, pid = ray.get(killed.reserve.remote())
    ray.get(living.reserve.remote())
    assert ray.available_resources().get("CPU", 0) == 1
    assert free_abandoned() == []
    ray.kill(killed)
    deadline = time.monotonic() + 60
    while not (taken := free_abandoned()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert taken == [lost]
    wait_until_free(2, [pid])
    own = ray.util.placement_group([{"CPU": 1}])
    assert ray.get(own.ready(), timeout=60) is not None and free_abandoned() == [], "the driver's own is no actor's"
    assert ray.available_resources().get("CPU", 0) == 1, "a controller that lives keeps its own"


@pytest.mark.cluster
def test_workers_that_are_lost_as_they_begin_to_train_hold_no_place_afterwards(local_ray: None, tmp_path: Path) -> None:
    class Lost(WorkerGroupCallback):  # a kill at this moment cannot be timed
        def after_worker_group_training_start(self, worker_group: Any) -> None:
            raise RuntimeError("a worker is gone")

    def train() -> None: ...

    callbacks: list[Any] = [Reservation(), Lost()]
    trainer = ray.train.torch.TorchTrainer(
        train,
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path), callbacks=callbacks),
    )
    with pytest.raises(ray.train.ControllerError, match="a worker is gone"):
        trainer.fit()
    assert {group["state"] for group in ray.util.placement_group_table().values()} == {"REMOVED"}


@pytest.mark.cluster
def test_a_cluster_without_the_second_autoscaler_says_nothing_about_its_growth(local_ray: None) -> None:
    assert autoscaler_can_help() is None


@pytest.mark.cluster
def test_a_trial_is_started_again_whose_process_died_after_the_trial_before(local_ray: None, tmp_path: Path) -> None:
    def train(config: dict[str, Any]) -> None:
        ray.tune.report({"pid": os.getpid()})

    class Killing(Searcher):
        """Kills the process of each trial when the next one is asked for, which would use it."""

        def __init__(self) -> None:
            super().__init__(metric="pid", mode="max")
            self.pids: list[int] = []

        def suggest(self, trial_id: str) -> dict[str, Any]:
            if self.pids and self.pids[-1]:
                os.kill(self.pids[-1], signal.SIGKILL)
            return {}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            self.pids.append(0 if error or result is None else int(result["pid"]))  # 0: it failed

    searcher = Killing()
    tuner = ray.tune.Tuner(
        train,
        tune_config=ray.tune.TuneConfig(
            num_samples=3, reuse_actors=True, search_alg=ConcurrencyLimiter(searcher, max_concurrent=1)
        ),
        run_config=ray.tune.RunConfig(
            storage_path=str(tmp_path), failure_config=ray.tune.FailureConfig(max_failures=9), verbose=0
        ),
    )
    with lost_relays_replaced():
        found = tuner.fit()
    assert found.num_errors == 0 and len(set(searcher.pids)) == 3 and 0 not in searcher.pids
