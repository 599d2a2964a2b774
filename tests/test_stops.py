"""A search that is stopped: it ends at once, leaves everything in order, and the same command continues it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from dskd.checkpoint import WEIGHTS_FILE, sha256_of
from tune.storage.files import Storage

ROOT = Path(__file__).resolve().parents[1]


class Driver:
    """A search as its own process, with what it said."""

    def __init__(self, data: Path, folder: Path, *more: str) -> None:
        self.storage, self._log = folder / "results", folder / "log"
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        folder.mkdir(exist_ok=True)
        env = os.environ | {
            "PATH": binaries,
            "RAY_AUTH_TOKEN_PATH": str(folder.parent / "token"),
            "PYTHONPATH": str(ROOT),
        }
        words = [
            "tune/search.py", "--data", str(data), "--name", "try", "--storage", str(self.storage), "--trials", "3",
            "--epochs", "60", "--image-size", "32", "--batch-size", "4", "--teacher-weights", "random", "--folds", "0",
            "--preset", "stfpm", "--categories", "tile", "--max-concurrent", "1", "--json", *more,
        ]  # fmt: skip
        # A shell without job control lets what runs in its background ignore SIGINT.
        wrapped = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        wrapped += "sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", wrapped, *words],
                env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240
        while not is_so():
            assert time.monotonic() < deadline and self.process.poll() is None, self.said
            time.sleep(0.1)

    def end(self, number: signal.Signals) -> tuple[int, list[str]]:
        """Send a signal, Ctrl-C to all processes as a terminal does; returns exit code, and the lines said since."""
        before = len(self.said.splitlines())
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        code = self.process.wait(60)
        return code, self.said.splitlines()[before:]

    def result(self) -> Any:
        out, _ = self.process.communicate(timeout=420)
        assert self.process.returncode == 0, self.said
        (category,) = json.loads(out)["categories"]
        return category


def runs_of(storage: Path) -> list[Any]:
    if not (storage / "mlflow.db").exists():
        return []
    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")
    experiments = [each.experiment_id for each in client.search_experiments() if each.name == "try"]
    return list(client.search_runs(experiments)) if experiments else []


def is_training(storage: Path) -> bool:
    """Whether MLflow has heard of a validation of a trial that runs."""
    return any(each.info.status == "RUNNING" and "val/objective" in each.data.metrics for each in runs_of(storage))


def epochs_stored(storage: Path) -> list[int]:
    return [
        json.loads(path.read_text())["epoch"] for path in storage.glob("try/workers/tile/*/lease-*/checkpoint.json")
    ]


def weights(driver: Driver, outcome: Any) -> str:
    return sha256_of(driver.storage / "try" / outcome["champion"]["folder"] / WEIGHTS_FILE)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """Starts drivers, and kills what is left of them at the end."""
    (tmp_path / "token").write_text("0" * 32)
    (tmp_path / "token").chmod(0o600)
    drivers: list[Driver] = []

    def start(*words: Any) -> Driver:
        drivers.append(Driver(*words))
        return drivers[-1]

    yield start
    for driver in drivers:
        with suppress(ProcessLookupError):
            os.killpg(driver.process.pid, signal.SIGKILL)
        driver.process.wait()
        if driver.process.stdout is not None:
            driver.process.stdout.close()


@pytest.mark.cluster
def test_a_search_that_is_stopped_twice_and_moved_ends_with_the_champion_of_an_undisturbed_one(
    mvtec_root: Path, tmp_path: Path, started: Callable[..., Driver]
) -> None:
    """Every stop leaves everything in order, and the same command goes on; first of all while Ray and MLflow start."""
    place = tmp_path / "first"
    early = started(mvtec_root, place)
    early.wait_until(lambda: bool(list(early.storage.glob("*mlflow.db"))))
    code, lines = early.end(signal.SIGTERM)
    assert code == 143 and [line.partition("] ")[2] for line in lines] == [
        "SIGTERM: stopping, and storing what is running", "stopped; the same command continues",
    ], early.said  # fmt: skip
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        driver = started(mvtec_root, place)
        driver.wait_until(partial(is_training, driver.storage))
        found, lines = driver.end(number)
        assert found == code, driver.said
        assert [line.partition("] ")[2] for line in lines] == [
            f"{number.name}: stopping, and storing what is running", "stopped; the same command continues",
        ]  # fmt: skip
        runs = runs_of(driver.storage)
        assert {each.info.status for each in runs} <= {"KILLED", "FINISHED"}
        stopped = [each for each in runs if each.data.tags.get("dskd.error") == "stopped; the same command continues"]
        assert len(stopped) == 2, "the category and its trial"
        lease = Storage(str(driver.storage / "try")).read_json("lease.json")
        assert lease is not None and lease["owner"] == ""
        assert max(epochs_stored(driver.storage)) > 0
    assert not [path for path in place.rglob("*") if path.suffix in (".pkl", ".pickle")]
    moved = tmp_path / "second"
    place.rename(moved)
    continued, whole = started(mvtec_root, moved), tmp_path / "whole"
    outcome = continued.result()
    assert "tile: continues: " in continued.said
    assert outcome["num_trials"] == 3
    runs = runs_of(continued.storage)
    assert len(runs) == 4 and not [each for each in runs if "dskd.error" in each.data.tags]
    assert {each.info.status for each in runs} <= {"KILLED", "FINISHED"}
    undisturbed = started(mvtec_root, whole)
    expected = undisturbed.result()
    assert outcome["champion"]["metrics"] == expected["champion"]["metrics"]
    assert weights(continued, outcome) == weights(undisturbed, expected)
