"""The relay of a trial: what it reserves, what it imports, what it reports; without a cluster."""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.tune
from ray.tune.experiment import Experiment

from dskd.config import RunConfig
from dskd.presets import PRESETS
from tune.settings.space import build_space
from tune.trial.assignment import Failure, News, Training
from tune.trial.spec import EPOCH, ERROR, LOST, OBJECTIVE, TrialSpec
from tune.trial.trainable import driver_resources, relay_resources, run_trial, trainable

ALONE = TrialSpec(
    config=RunConfig().to_dict(), data="", category="", teacher_weights="random", cache_gb=0, num_workers=1,
    cpus_per_worker=2, gpus_per_worker=0.5, workers_uri="", revision="",
)  # fmt: skip


@pytest.mark.parametrize(("offered", "asked"), [({"CPU": 8.0}, {}), ({"dskd_driver": 1.0}, {"dskd_driver": 0.001})])
def test_only_what_waits_asks_for_a_node_that_stays(
    offered: dict[str, float], asked: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: offered)
    assert driver_resources() == asked
    (waiting,) = relay_resources().bundles
    assert {name: share for name, share in waiting.items() if name != "memory"} == asked


def test_trainables_of_different_categories_never_share_a_name_in_the_table_of_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", dict)
    space = build_space({"dskd": PRESETS["dskd"]})
    names = [
        Experiment.get_trainable_name(
            trainable(
                dataclasses.replace(ALONE, category=category, workers_uri=f"s3://b/parts/workers/{category}"),
                space,
                "dispatcher",
            )
        )
        for category in ("bolt", "screw", "Mutter Ø 8", "bolt")
    ]
    assert len(set(names)) == 3 and names[0] == names[3], "a continued search finds its own"
    assert all(name.isascii() for name in names)


class Script:
    """A dispatcher that tells a story: each item is the answer to one question."""

    def __init__(self, *story: News) -> None:
        self.story = list(story)
        self.asked: list[int] = []
        self.submitted: list[Training] = []
        self.follow = SimpleNamespace(remote=self._follow)
        self.submit = SimpleNamespace(remote=self.submitted.append)

    def _follow(self, key: str, after: int) -> News:
        assert key == "bolt/t1"
        self.asked.append(after)
        return self.story.pop(0)


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches Tune."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(ray.tune, "get_context", lambda: SimpleNamespace(get_trial_id=lambda: "t1"))
    monkeypatch.setattr(ray.tune, "report", found.append)
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    return found


def relay(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_actor", lambda name: script)
    space = build_space({"dskd": PRESETS["dskd"]})
    run_trial(space.starting_points()[0], dataclasses.replace(ALONE, category="bolt"), space, "dispatcher")


def test_a_relay_reports_what_its_group_does_and_submits_again_what_a_new_dispatcher_does_not_know(
    reported: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown, nothing = News(is_known=False), News()
    script = Script(
        unknown,
        nothing,
        News(reports=({EPOCH: 1}, {EPOCH: 2})),
        unknown,
        nothing,
        News(reports=({EPOCH: 3},), is_over=True),
    )
    relay(script, monkeypatch)
    assert [each[EPOCH] for each in reported] == [1, 2, 3]
    assert [each.trial_id for each in script.submitted] == ["t1", "t1"]
    assert script.asked == [-1, -1, -1, 2, 2, 2]


@pytest.mark.parametrize("is_own", [True, False])
def test_a_relay_says_whether_the_trial_or_its_machines_failed(
    is_own: bool, reported: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    relay(Script(News(reports=({EPOCH: 4},)), News(failure=Failure("no memory", is_own))), monkeypatch)
    assert reported == [
        {EPOCH: 4},
        {EPOCH: 5, OBJECTIVE: 0.0, ERROR: "no memory"} | ({} if is_own else {LOST: True}),
    ]


@pytest.mark.parametrize("module", ["tune.trial.trainable", "tune.trial.groups", "tune.study.category"])
def test_what_does_not_compute_imports_no_torch(module: str) -> None:
    """Relays, the driver's groups and the categories' processes start in a second, not in eight."""
    slow = {"torch", "torchvision", "timm", "mlflow", "matplotlib"}
    body = f"import sys, {module}\nprint(*{slow} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
