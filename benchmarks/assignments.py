"""Memory of a worker over many trials: `python benchmarks/assignments.py --data DIR --category C`.

One worker, as a search has them but without Ray, trains one small trial after the other in its process. Prints the
process's own memory (without what it shares, such as mapped files) and the seconds of a trial as they go on.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import psutil
import ray
import tyro

from dskd.presets import PRESETS
from tune.trial import member
from tune.trial.assignment import Assignment, Order, Training
from tune.trial.spec import TrialSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    data: Path
    category: str
    teacher_weights: str = "random"
    preset: str = "dskd"
    trials: int = 100
    epochs: int = 2
    image_size: int = 32
    every: int = 10
    """Trials between two lines."""


class Post:
    """A dispatcher in the same process: one trial after the other, each with another learning rate and depth."""

    def __init__(self, options: Options, trials: Path, say: Callable[[int], None]) -> None:
        self._options, self._trials, self._say = options, trials, say
        self._number = 0
        self.ask, self.report = SimpleNamespace(remote=self._ask), SimpleNamespace(remote=self._report)
        self.alive, self.now = SimpleNamespace(remote=lambda *_: None), SimpleNamespace(remote=time.time)

    def _ask(self, slot: str, generation: float) -> Order:
        if self._number % self._options.every == 0:
            self._say(self._number)
        if self._number == self._options.trials:
            return Order(must_leave=True)
        self._number += 1
        return Order(self._assignment())

    def _assignment(self) -> Assignment:
        options = self._options
        config = PRESETS[options.preset].with_values({
            "epochs": options.epochs, "image_size": options.image_size, "batch_size": 8,
            "learning_rate": 0.001 * self._number, "embedding_depth": 1 + self._number % 3,
        })  # fmt: skip
        spec = TrialSpec(
            config=config.to_dict(), data=str(options.data), category=options.category,
            teacher_weights=options.teacher_weights, cache_gb=1.0, num_workers=1, cpus_per_worker=1.0,
            gpus_per_worker=0.0, workers_uri=str(self._trials), revision="",
        )  # fmt: skip
        return Training(trial_id=f"{self._number:04d}", spec=spec)

    def _report(self, slot: str, generation: float, assignment: Assignment, metrics: Any, *, is_over: bool) -> bool:
        if error := metrics.get("error"):
            raise SystemExit(f"trial {assignment.trial_id}: {error}")
        return True


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    started = time.monotonic()

    def say(number: int) -> None:
        memory = psutil.Process().memory_info()
        own = (memory.rss - getattr(memory, "shared", 0)) / 2**20
        print(f"{number:4d} trials: {own:7.1f} MiB of its own, {time.monotonic() - started:6.1f} s", flush=True)

    with TemporaryDirectory() as trials, ExitStack() as replaced:
        post = Post(options, Path(trials), say)
        in_this_process = {"get_actor": lambda name: post, "get": lambda answer: answer}
        for name, instead in in_this_process.items():
            replaced.enter_context(patch.object(ray, name, instead))
        replaced.enter_context(patch.object(member, "node_is_leaving", lambda: False))
        member.serve_alone("dispatcher", "group-1", None, "cpu")


if __name__ == "__main__":
    main()
