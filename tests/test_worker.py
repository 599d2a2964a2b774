import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dskd.checkpoint import read_record
from dskd.config import AmplificationConfig, RunConfig
from dskd.detector import Detector
from dskd.device import WorkerRank
from dskd.training import inputs as stage
from dskd.training.inputs import TrainingData
from dskd.training.run import STATE_FILE, TrainingRun
from dskd.training.stage_one import fit_amplifier
from tune.storage.uris import DETECTOR_FOLDER
from tune.trial import worker
from tune.trial.spec import EPOCH, OBJECTIVE, RUNG, TrialSpec, UnrecoverableTrialError
from tune.trial.worker import train

CPU = torch.device("cpu")


@pytest.fixture
def amplified(tiny: RunConfig) -> RunConfig:
    stage = AmplificationConfig(amplification=True, amplification_epochs=1, amplification_batch_size=4, memory_size=4)
    return dataclasses.replace(tiny, amplification=stage).with_values({"epochs": 1})


def spec(config: RunConfig, data: Path, **more: Any) -> TrialSpec:
    return TrialSpec(
        config=config.to_dict(), data=str(data), category="tile", teacher_weights="random", cache_gb=1.0,
        num_workers=1, cpus_per_worker=1.0, gpus_per_worker=0.0, workers_uri="", revision="", **more,
    )  # fmt: skip


def test_trials_that_differ_in_their_students_share_one_stage_one(
    amplified: RunConfig, mvtec_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = []
    monkeypatch.setattr(stage, "fit_amplifier", lambda *a, **k: (stages.append(1), fit_amplifier(*a, **k))[1])  # type: ignore[func-returns-value]
    for learning_rate in (0.005, 0.001):
        config = amplified.with_values({"learning_rate": learning_rate})
        for report in train(spec(config, mvtec_root), WorkerRank(), CPU, None):
            assert report.metrics[OBJECTIVE] > 0 and report.checkpoint is not None
            assert read_record(report.checkpoint / DETECTOR_FOLDER).config == config
    assert len(stages) == 1


def test_a_diverging_stage_one_ends_the_trial_with_its_reason(amplified: RunConfig, mvtec_root: Path) -> None:
    config = amplified.with_values({"amplification_learning_rate": 1e30, "amplification_epochs": 3})
    (report,) = train(spec(config, mvtec_root), WorkerRank(), CPU, None)
    assert report.metrics[OBJECTIVE] == 0 and "stage I" in report.metrics["error"] and report.checkpoint is None


def test_what_cannot_fit_in_memory_or_be_read_ends_the_trial_with_its_reason(
    tiny: RunConfig, mvtec_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: Any, **__: Any) -> None:
        torch.empty(10**15)

    mine = dataclasses.replace(spec(tiny, mvtec_root), cache_gb=0.0)
    with monkeypatch.context() as patch:
        patch.setattr("dskd.training.loop.distillation_loss", too_large)
        (report,) = train(mine, WorkerRank(), CPU, None)
        assert report.metrics[OBJECTIVE] == 0 and report.metrics["error"].startswith("out of memory: ")
        # Alone among several workers it must not go on to report: the others wait for it in the middle of a step.
        patch.setattr(
            "tune.trial.worker.shared_inputs",
            lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("GPU full")),
        )
        with pytest.raises(UnrecoverableTrialError, match="out of memory: GPU full"):
            list(train(mine, WorkerRank(1, 2), CPU, None))

    shutil.copytree(mvtec_root / "tile", tmp_path / "tile")
    (tmp_path / "tile/train/good/000.png").write_bytes(b"no image")
    broken = dataclasses.replace(mine, data=str(tmp_path))
    (report,) = train(broken, WorkerRank(), CPU, None)
    assert report.metrics[OBJECTIVE] == 0 and "000.png" in report.metrics["error"]


def test_a_fault_that_may_pass_is_raised_so_that_the_trial_is_tried_again(
    tiny: RunConfig, mvtec_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")

    monkeypatch.setattr("dskd.training.loop.distillation_loss", broken)
    with pytest.raises(RuntimeError, match="CUDNN_STATUS"):
        list(train(spec(tiny, mvtec_root), WorkerRank(), CPU, None))


def test_a_node_that_is_announced_to_go_leaves_its_state_behind_after_the_next_epoch(
    tiny: RunConfig, mvtec_root: Path
) -> None:
    config = tiny.with_values({"epochs": 4})
    announced = iter([False, True, True, False])
    kept = []
    for report in train(spec(config, mvtec_root), WorkerRank(), CPU, None, lambda: next(announced)):
        kept.append(report.checkpoint is not None and (report.checkpoint / STATE_FILE).is_file())
    assert kept == [False, True, True, False], "the last report carries the detector instead"


def test_trials_with_and_without_stage_one_take_turns_at_the_cost_of_one_preparation_each(
    tiny: RunConfig, amplified: RunConfig, mvtec_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = []
    monkeypatch.setattr(worker, "prepare", lambda *a, **k: (prepared.append(1), stage.prepare(*a, **k))[1])  # type: ignore[func-returns-value]
    worker.shared_inputs.cache_clear()
    for config in (tiny.with_values({"epochs": 1}), amplified) * 2:
        (report,) = train(spec(config, mvtec_root), WorkerRank(), CPU, None)
        assert report.metrics[OBJECTIVE] > 0
    assert len(prepared) == 2


def test_an_oracle_selects_by_the_test_images_and_its_detector_says_so(
    tiny: RunConfig, mvtec_root: Path, tmp_path: Path
) -> None:
    config = tiny.with_values({"epochs": 1})
    for report in train(spec(config, mvtec_root, selection="oracle"), WorkerRank(), CPU, None):
        assert report.checkpoint is not None  # it lives as long as the report is looked at
        record = read_record(report.checkpoint / DETECTOR_FOLDER)
        assert record.selection == "oracle" and record.validation_files == ()
        tested = Detector.load(report.checkpoint / DETECTOR_FOLDER).evaluate(mvtec_root, "tile")
        seen = {name: record.metrics[f"val/{name}"] for name in tested._fields}
        assert seen == pytest.approx(tested._asdict(), abs=1e-4)
    shutil.copytree(mvtec_root / "tile", tmp_path / "tile")
    shutil.rmtree(tmp_path / "tile" / "ground_truth")
    (report,) = train(spec(config, tmp_path, selection="oracle"), WorkerRank(), CPU, None)
    assert report.metrics[OBJECTIVE] == 0 and "no masks of its test defects" in report.metrics["error"]


def test_textures_reach_the_defects_of_a_trial(tiny: RunConfig, mvtec_root: Path) -> None:
    textures = mvtec_root / "wood/test/good"
    told = spec(tiny.with_values({"epochs": 1}), mvtec_root, textures=str(textures))
    for report in train(told, WorkerRank(), CPU, None):
        assert report.checkpoint is not None
        assert read_record(report.checkpoint / DETECTOR_FOLDER).num_textures == len(list(textures.iterdir()))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2)])
def test_a_training_goes_on_with_another_number_of_workers(
    before: int, after: int, tiny: RunConfig, inputs: TrainingData, tmp_path: Path
) -> None:
    """What a worker saved is the same whatever their number: in one process alone all of them train alike."""
    whole = TrainingRun.begin(tiny, inputs, CPU)
    expected = [progress.interval.loss for progress in whole.intervals()]
    begun = TrainingRun.begin(tiny, inputs, CPU, before)
    next(begun.intervals())
    begun.save(tmp_path)
    resumed = TrainingRun.begin(tiny, inputs, CPU, after)
    resumed.restore(tmp_path)
    (last,) = resumed.intervals()
    assert last.interval.loss == pytest.approx(expected[-1], rel=1e-6)
    assert resumed.detector()[1].keys() == whole.detector()[1].keys()


def test_a_trial_that_ends_by_its_patience_is_complete(
    tiny: RunConfig, mvtec_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dskd.training.run.objective", lambda scores: 0.5)
    config = tiny.with_values({"steps": 200, "patience": 2})
    reports = []
    for report in train(spec(config, mvtec_root), WorkerRank(), CPU, None):
        reports.append(report.metrics)
        has_detector = report.checkpoint is not None and (report.checkpoint / DETECTOR_FOLDER).is_dir()
    assert has_detector and [metrics["train/steps"] for metrics in reports] == [10, 20, 30]
    assert [metrics[EPOCH] for metrics in reports] == [1, 2, 20], "the search takes the last report for complete"
    assert {name: value for name, value in reports[-1].items() if name.startswith(RUNG)} == {
        f"{RUNG}3": 0.5, f"{RUNG}9": 0.5,
    }  # fmt: skip
