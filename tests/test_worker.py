import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dskd import materials
from dskd.checkpoint import read_record
from dskd.config import AmplificationConfig, RunConfig
from dskd.distillation import STATE_FILE
from dskd.train import Shard
from tune.worker import DETECTOR_FOLDER, Assignment, HopelessTrial, train

CPU = torch.device("cpu")


@pytest.fixture
def amplified(tiny: RunConfig) -> RunConfig:
    stage = AmplificationConfig(amplification=True, amplification_epochs=1, amplification_batch_size=4, memory_size=4)
    return dataclasses.replace(tiny, amplification=stage).with_values({"epochs": 1})


def assignment(config: RunConfig, data: Path) -> Assignment:
    return Assignment(
        config=config.to_dict(), data=str(data), category="tile", teacher_weights="random", cache_gb=1.0,
        num_workers=1, cpus_per_worker=1.0, gpus_per_worker=0.0, workers_uri="", revision="",
    )  # fmt: skip


def test_trials_that_differ_in_their_students_share_one_stage_one(
    amplified: RunConfig, mvtec_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = []
    original = materials.fit_amplifier
    monkeypatch.setattr(materials, "fit_amplifier", lambda *a, **k: (stages.append(1), original(*a, **k))[1])
    for learning_rate in (0.005, 0.001):
        config = amplified.with_values({"learning_rate": learning_rate})
        for report in train(assignment(config, mvtec_root), Shard(), CPU, None):
            assert report.metrics["objective"] > 0 and report.checkpoint is not None
            assert read_record(report.checkpoint / DETECTOR_FOLDER).config == config
    assert len(stages) == 1


def test_a_diverging_stage_one_ends_the_trial_with_its_reason(amplified: RunConfig, mvtec_root: Path) -> None:
    config = amplified.with_values({"amplification_learning_rate": 1e30, "amplification_epochs": 3})
    (report,) = train(assignment(config, mvtec_root), Shard(), CPU, None)
    assert report.metrics["objective"] == 0 and "stage I" in report.metrics["error"] and report.checkpoint is None


def test_what_cannot_fit_in_memory_or_be_read_ends_the_trial_with_its_reason(
    tiny: RunConfig, mvtec_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: Any, **__: Any) -> None:
        torch.empty(10**15)

    mine = dataclasses.replace(assignment(tiny, mvtec_root), cache_gb=0.0)
    with monkeypatch.context() as patch:
        patch.setattr("dskd.train.distillation_loss", too_large)
        (report,) = train(mine, Shard(), CPU, None)
        assert report.metrics["objective"] == 0 and report.metrics["error"].startswith("out of memory: ")
        # Alone among several workers it must not go on to report: the others wait for it in the middle of a step.
        patch.setattr("tune.worker._materials", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("GPU full")))
        with pytest.raises(HopelessTrial, match="out of memory: GPU full"):
            list(train(mine, Shard(1, 2), CPU, None))

    shutil.copytree(mvtec_root / "tile", tmp_path / "tile")
    (tmp_path / "tile/train/good/000.png").write_bytes(b"no image")
    broken = dataclasses.replace(mine, data=str(tmp_path))
    (report,) = train(broken, Shard(), CPU, None)
    assert report.metrics["objective"] == 0 and "000.png" in report.metrics["error"]


def test_a_fault_that_may_pass_is_raised_so_that_the_trial_is_tried_again(
    tiny: RunConfig, mvtec_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")

    monkeypatch.setattr("dskd.train.distillation_loss", broken)
    with pytest.raises(RuntimeError, match="CUDNN_STATUS"):
        list(train(assignment(tiny, mvtec_root), Shard(), CPU, None))


def test_a_node_that_is_announced_to_go_leaves_its_state_behind_after_the_next_epoch(
    tiny: RunConfig, mvtec_root: Path
) -> None:
    config = tiny.with_values({"epochs": 4})
    announced = iter([False, True, True, False])
    kept = []
    for report in train(assignment(config, mvtec_root), Shard(), CPU, None, lambda: next(announced)):
        kept.append(report.checkpoint is not None and (report.checkpoint / STATE_FILE).is_file())
    assert kept == [False, True, True, False], "the last report carries the detector instead"
