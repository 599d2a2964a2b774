"""A worker group of several DDP workers: one Ray Train job, which Ray restarts where workers are lost."""

import os
import time
from typing import Any

import ray
import ray.train
import ray.train.torch

from tune.runtime.ray_internals import Reservation, causes_of, free_abandoned
from tune.settings.workers import Workers
from tune.trial.spec import TrialSpec, UnrecoverableTrialError

_FREE_SECONDS = 10.0
"""Longest time in seconds until Ray notices that a controller is dead."""


def run_job(
    dispatcher: str, slot: str, first: TrialSpec | None, workers: Workers, min_workers: int | None, folder: str
) -> None:
    """Run a group until the dispatcher sends it home; raises Ray Train's error if its controller is lost.

    The group has `workers`, or down to `min_workers` of them if that is given. `folder`: folder or address that all
    nodes see, for Ray Train's notes.
    """
    # A cluster may have to grow or to finish other work first; by default Ray fails after one minute of waiting.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "86400")
    number: Any = workers.number if min_workers is None else (min_workers, workers.number)
    job = ray.train.torch.TorchTrainer(
        _serve,
        train_loop_config={"dispatcher": dispatcher, "slot": slot, "first": first},
        scaling_config=ray.train.ScalingConfig(
            num_workers=number,
            use_gpu=workers.gpus > 0,
            resources_per_worker={name: share for name, share in workers.needs.items() if share > 0},
        ),
        run_config=ray.train.RunConfig(
            name=f"{dispatcher}-{slot}",
            storage_path=folder,
            callbacks=[_Failures(dispatcher, slot), Reservation()],  # type: ignore[list-item]
            # Ray counts the failures of the group's whole life; the dispatcher counts those of each assignment.
            failure_config=ray.train.FailureConfig(
                max_failures=-1,
                controller_failure_limit=-1,  # type: ignore[call-arg]
            ),
        ),
    )
    try:
        job.fit()
    except Exception:  # whatever it died of; it is raised again
        _free_lost()
        raise


def _free_lost() -> None:
    """Take back what a killed controller has reserved, as soon as Ray knows that it is dead."""
    deadline = time.monotonic() + _FREE_SECONDS
    while not free_abandoned() and time.monotonic() < deadline:
        time.sleep(0.5)


def _serve(parts: dict[str, Any]) -> None:
    """Each worker of the job."""
    from tune.trial.member import serve_with_others

    serve_with_others(**parts)


class _Failures(ray.train.UserCallback):
    """Tells the dispatcher of failed workers; runs in Ray Train's controller."""

    def __init__(self, dispatcher: str, slot: str) -> None:
        self._dispatcher, self._slot = dispatcher, slot

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        causes = causes_of(worker_exceptions.values())
        reasons = [str(cause) for cause in causes if isinstance(cause, UnrecoverableTrialError)]
        text = "\n".join(f"[Rank {rank}]\n{error}" for rank, error in sorted(worker_exceptions.items()))
        post: Any = ray.get_actor(self._dispatcher)
        ray.get(post.failed.remote(self._slot, text, reasons[0] if reasons else ""))
