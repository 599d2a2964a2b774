"""A search that is stopped, or that another takes over: it ends at once, leaves everything in order, and goes on."""

import json
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import services
import timm
from mlflow.tracking import MlflowClient
from safetensors.torch import save_file

from dskd.checkpoint import WEIGHTS_FILE, sha256_of
from tune.storage.files import Storage

ROOT = Path(__file__).resolve().parents[1]


def search_words(data: Path, storage: Path, *more: str, epochs: int = 60, teacher: str = "random") -> list[str]:
    return [
        "tune/search.py", "--data", str(data), "--name", "try", "--storage", str(storage), "--trials", "3",
        "--epochs", str(epochs), "--image-size", "32", "--batch-size", "4", "--teacher-weights", teacher,
        "--folds", "0", "--preset", "stfpm", "--categories", "tile", "--max-concurrent", "1", "--json", *more,
    ]  # fmt: skip


class Driver:
    """A search as its own process, with what it said; its lease may say that it runs on another `machine`."""

    def __init__(self, data: Path, folder: Path, *more: str, machine: str = "", **of_words: Any) -> None:
        self.storage, self._log = folder / "results", folder / f"log{len(list(folder.glob('log*')))}"
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        folder.mkdir(exist_ok=True)
        env = os.environ | {
            "PATH": binaries,
            "RAY_AUTH_TOKEN_PATH": str(folder.parent / "token"),
            "PYTHONPATH": str(ROOT),
        }
        words = search_words(data, self.storage, *more, **of_words)
        # A shell without job control lets what runs in its background ignore SIGINT.
        wrapped = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        if machine:
            env |= {"DSKD_LEASE_SECONDS": "1", "DSKD_CHECKPOINT_SECONDS": "0"}
            wrapped += f"from tune.storage import lease; lease._machine = lambda: {machine!r};"
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

    def start(*words: Any, **more: Any) -> Driver:
        drivers.append(Driver(*words, **more))
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


def validations(run: Any, storage: Path) -> list[int]:
    """The numbers of a run's validations, as MLflow has them."""
    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")
    return [each.step for each in client.get_metric_history(run.info.run_id, "val/objective")]


def check_nothing_is_lost_or_doubled(storage: Path) -> None:
    """Of a search's three trials, in storage, study and MLflow."""
    runs = runs_of(storage)
    trials = [each for each in runs if "mlflow.parentRunId" in each.data.tags]
    assert (len(runs), len({each.data.tags["dskd.trial"] for each in trials})) == (4, 3)
    assert {each.data.tags["dskd.status"] for each in trials} <= {"finished", "pruned"}
    assert {each.info.status for each in runs} <= {"FINISHED", "KILLED"}
    assert not [each for each in runs if "dskd.error" in each.data.tags]
    for each in trials:
        found = validations(each, storage)
        assert len({*found}) == len(found), "each validation at most once"
    studied = optuna.load_study(study_name="try/tile", storage=f"sqlite:///{storage}/optuna.db").trials
    assert [each.number for each in studied] == [0, 1, 2]
    assert {each.state.name for each in studied} <= {"COMPLETE", "PRUNED"}
    records = [json.loads(path.read_text()) for path in storage.glob("try/trials/tile/*.json")]
    assert sorted(each["status"] for each in records) == sorted(each.data.tags["dskd.status"] for each in trials)


def suspend(driver: Driver) -> None:
    """Stop the driver's own process, when it holds no lock on MLflow's file: nobody could use that then."""
    while True:
        os.kill(driver.process.pid, signal.SIGSTOP)
        try:
            with closing(sqlite3.connect(driver.storage / "mlflow.db", timeout=0.5, isolation_level=None)) as file:
                file.execute("BEGIN IMMEDIATE")
                file.execute("ROLLBACK")
            return
        except sqlite3.OperationalError:
            os.kill(driver.process.pid, signal.SIGCONT)
            time.sleep(0.1)


@pytest.mark.cluster
def test_a_suspended_driver_whose_search_another_goes_on_with_ends_and_writes_nothing(
    mvtec_root: Path, tmp_path: Path, started: Callable[..., Driver]
) -> None:
    """Its processes on the cluster went on meanwhile. At the end, the search refuses images and a teacher of others."""
    data = Path(shutil.copytree(mvtec_root, tmp_path / "data"))
    teacher = tmp_path / "teacher.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), teacher)
    start = partial(
        started, data, tmp_path / "both", "--backbone", "test_resnet", "--levels", "1", "2", epochs=100,
        teacher=str(teacher),
    )  # fmt: skip
    first = start(machine="one boot")
    first.wait_until(partial(is_training, first.storage))
    suspend(first)
    home = Storage(str(first.storage / "try"))
    second = start(machine="two boot")
    second.wait_until(lambda: "tile: continues: " in second.said)
    os.kill(first.process.pid, signal.SIGCONT)
    assert first.process.wait(60) == 1
    assert [line.partition("] ")[2] for line in first.said.splitlines()[-2:]] == [
        "another search has taken 'try' over; this one ends", "ended; the other search goes on with its trials",
    ]  # fmt: skip
    lease = home.read_json("lease.json")
    assert lease is not None and (lease["generation"], lease["machine"]) == (2, "two boot")
    outcome = second.result()
    assert outcome["num_trials"] == 3
    record = home.read_json("champions/tile.json")
    assert record is not None and outcome["champion"] == {name: record[name] for name in outcome["champion"]}
    assert record["generation"] == 2
    check_nothing_is_lost_or_doubled(second.storage)

    shutil.copy(data / "tile/train/good/004.png", data / "tile/train/good/003.png")
    save_file(timm.create_model("test_resnet").state_dict(), teacher)
    again = start()
    assert again.process.wait(240) == 2
    for kind, name in (("images", "tile/train/good/003.png"), ("teacher", "teacher.safetensors")):
        refusals = [
            line for line in again.said.splitlines() if f"was begun with other {kind}: 1 changed ({name})" in line
        ]
        assert len(refusals) == 1 and "search: error: " in refusals[0] and "--name try-2" in refusals[0], again.said
    assert home.read_json("champions/tile.json") == record


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Ray head with a token, and the environment of who submits to it."""
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    port, dashboard = services.free_port(), services.free_port()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | token | {"PATH": binaries}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short:  # its sockets' paths are long
        words = [
            "ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2",
            "--disable-usage-stats", f"--ray-client-server-port={services.free_port()}", f"--temp-dir={short}",
            f"--dashboard-agent-listen-port={services.free_port()}",
        ]  # fmt: skip
        with (tmp_path / "head.log").open("w") as log:
            process = subprocess.Popen(words, env=env, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
        try:
            yield env | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def ray_job(head: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    command = ["ray", "job", *(str(word) for word in words)]
    return subprocess.run(command, env=head, cwd=ROOT, capture_output=True, text=True, timeout=420, check=False)


@pytest.mark.cluster
def test_ray_job_stop_leaves_a_search_in_order_within_the_seconds_that_it_gives(
    mvtec_root: Path, tmp_path: Path, head: dict[str, str]
) -> None:
    """By default three, after which it kills: then neither the lease would be given back nor a last line be said."""
    storage = tmp_path / "results"
    submit = ["submit", "--working-dir", ROOT]
    command = ["--", "python", *search_words(mvtec_root, storage)]
    deadline = time.monotonic() + 120
    # The head answers before its agent takes jobs.
    while (begun := ray_job(head, *submit, "--no-wait", "--submission-id", "one", *command)).returncode != 0:
        assert time.monotonic() < deadline, begun.stdout + begun.stderr
        time.sleep(1)
    while not is_training(storage):
        assert time.monotonic() < deadline + 120, ray_job(head, "logs", "one").stdout
        time.sleep(0.2)
    stopped = ray_job(head, "stop", "one")
    assert stopped.returncode == 0 and "was stopped" in stopped.stdout, stopped.stdout
    said = ray_job(head, "logs", "one").stdout
    assert "SIGTERM: stopping, and storing what is running" in said
    assert "stopped; the same command continues" in said and "Traceback" not in said and "C++" not in said
    lease = Storage(str(storage / "try")).read_json("lease.json")
    assert lease is not None and lease["owner"] == ""
    runs = runs_of(storage)
    assert len(runs) == 2 and {each.info.status for each in runs} == {"KILLED"}
    assert max(epochs_stored(storage)) > 0

    done = ray_job(head, *submit, "--submission-id", "two", *command)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "tile: continues: " in done.stdout and '"num_trials": 3' in done.stdout
    check_nothing_is_lost_or_doubled(storage)
