"""What a trial reserves, as far as it can be seen without a cluster."""

import dataclasses

import pytest
import ray
import ray.train
import ray.train.torch
import ray.util
from ray.tune.experiment import Experiment

from dskd.config import RunConfig
from dskd.presets import PRESETS
from tune.settings.space import build_space
from tune.trial.spec import TrialSpec
from tune.trial.trainable import driver_resources, trainable, trial_resources

ALONE = TrialSpec(
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
