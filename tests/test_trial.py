"""What a trial reserves and gives back, mostly as far as it can be seen without a cluster."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import ray.train.torch
import ray.util
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.tune.experiment import Experiment

from dskd.config import RunConfig
from dskd.presets import PRESETS
from tune.space import build_space
from tune.trial import _Reservation, driver_resources, trainable, trial_resources
from tune.worker import Assignment

ALONE = Assignment(
    config=RunConfig().to_dict(), data="", category="", teacher_weights="random", cache_gb=0, num_workers=1,
    cpus_per_worker=2, gpus_per_worker=0.5, workers_uri="", revision="",
)  # fmt: skip
NESTED = dataclasses.replace(ALONE, num_workers=2)


@pytest.mark.parametrize(("offered", "asked"), [({"CPU": 8.0}, {}), ({"dskd_driver": 1.0}, {"dskd_driver": 0.001})])
def test_only_what_waits_asks_for_a_node_that_stays(
    offered: dict[str, float], asked: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: offered)
    assert driver_resources() == asked
    (waiting,) = trial_resources(NESTED).bundles
    assert {name: share for name, share in waiting.items() if name != "memory"} == asked
    assert trial_resources(ALONE).bundles == [{"CPU": 2.0, "GPU": 0.5}], "a trial that computes goes where it can"


def test_trainables_of_different_categories_never_share_a_name_in_the_table_of_the_job() -> None:
    space = build_space({"dskd": PRESETS["dskd"]})
    names = [
        Experiment.get_trainable_name(
            trainable(
                dataclasses.replace(ALONE, category=category, workers_uri=f"s3://b/parts/workers/{category}"), space
            )
        )
        for category in ("bolt", "screw", "Mutter Ø 8", "bolt")
    ]
    assert len(set(names)) == 3 and names[0] == names[3], "a continued search finds its own"
    assert all(name.isascii() for name in names)


@pytest.mark.cluster
def test_workers_that_are_lost_as_they_begin_to_train_hold_no_place_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lost(WorkerGroupCallback):  # a kill at this moment cannot be timed
        def after_worker_group_training_start(self, worker_group: Any) -> None:
            raise RuntimeError("a worker is gone")

    def train() -> None: ...

    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("0" * 32)
    (tmp_path / "token").chmod(0o600)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        trainer = ray.train.torch.TorchTrainer(
            train,
            scaling_config=ray.train.ScalingConfig(num_workers=2),
            run_config=ray.train.RunConfig(storage_path=str(tmp_path), callbacks=[_Reservation(), Lost()]),
        )
        with pytest.raises(ray.train.ControllerError, match="a worker is gone"):
            trainer.fit()
        assert {group["state"] for group in ray.util.placement_group_table().values()} == {"REMOVED"}
    finally:
        ray.shutdown()
