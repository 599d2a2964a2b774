"""The same trainings as a search's, as Ray's documentation has them: the other side of search_share.py, which runs it.

`python benchmarks/plain_search.py REQUEST.json`: one trial at a time, a function trainable; with several workers a
TorchTrainer in each trial. No cache, no process that is used again. Writes when the steps before each validation began,
and when the validation ended.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.train
import ray.train.torch
import ray.tune
import torch
from ray.tune.integration.ray_train import TuneReportCallback

from dskd.config import DataSpec, RunConfig, TeacherSource
from dskd.device import WorkerRank
from dskd.training.inputs import prepare
from dskd.training.run import TrainingRun


def train(asked: Mapping[str, Any], worker: WorkerRank, report: Callable[..., None]) -> None:
    """One training, with a report after each validation and a checkpoint at its end."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    config = RunConfig.from_dict(asked["config"])
    data = DataSpec(data=Path(asked["data"]), category=asked["category"], teacher=TeacherSource(asked["teacher"]))
    inputs = prepare(config, data, device=device, cache=None)
    run = TrainingRun.begin(config, inputs, device, worker.world_size)
    students = ray.train.torch.prepare_model(run.students) if worker.world_size > 1 else run.students
    began = time.time()
    for result in run.intervals(students, worker):
        told = {"began": began, "ended": time.time(), "objective": result.best_objective}
        with TemporaryDirectory() as folder:
            is_kept = worker.rank == 0 and run.is_finished
            if is_kept:
                run.save(Path(folder))
            report(told, checkpoint=folder if is_kept else None)
        began = time.time()


def train_alone(asked: Mapping[str, Any]) -> None:
    """The trainable of trials with one worker."""

    def report(told: Mapping[str, Any], checkpoint: str | None) -> None:
        ray.tune.report(dict(told), checkpoint=ray.tune.Checkpoint.from_directory(checkpoint) if checkpoint else None)

    train(asked["trial"], WorkerRank(), report)


def train_with_others(asked: Mapping[str, Any]) -> None:
    """What each worker of a TorchTrainer runs."""
    context = ray.train.get_context()

    def report(told: Mapping[str, Any], checkpoint: str | None) -> None:
        ray.train.report(dict(told), checkpoint=ray.train.Checkpoint.from_directory(checkpoint) if checkpoint else None)

    train(asked, WorkerRank(context.get_world_rank(), context.get_world_size()), report)


def train_with_workers(asked: Mapping[str, Any]) -> None:
    """The trainable of trials with several workers."""
    trial = asked["trial"]
    ray.train.torch.TorchTrainer(
        train_with_others,
        train_loop_config=trial,
        scaling_config=ray.train.ScalingConfig(num_workers=trial["workers"]),
        run_config=ray.train.RunConfig(
            name=f"train-{ray.tune.get_context().get_trial_id()}",
            storage_path=trial["storage"],
            callbacks=[TuneReportCallback()],  # type: ignore[list-item]
        ),
    ).fit()


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    ray.init(log_to_driver=False)
    trials = [{**request["shared"], "config": config} for config in request["configs"]]
    is_alone = request["shared"]["workers"] == 1
    trainable = train_alone if is_alone else ray.tune.with_resources(train_with_workers, {"CPU": 0, "memory": 1})
    ended: list[list[float]] = []

    class Times(ray.tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            ended.append([result["began"], result["ended"], trials.index(trial)])

    tuner = ray.tune.Tuner(
        trainable,
        param_space={"trial": ray.tune.grid_search(trials)},
        tune_config=ray.tune.TuneConfig(metric="objective", mode="max", max_concurrent_trials=1),
        run_config=ray.tune.RunConfig(storage_path=request["shared"]["storage"], callbacks=[Times()], verbose=0),
    )
    results = tuner.fit()
    assert results.num_errors == 0, results.errors
    Path(request["out"]).write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
