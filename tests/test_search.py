"""The main job for real: Ray on this machine, real studies, real MLflow stores; with real servers where they run."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import services
from local_cluster import Process, titled
from mlflow.tracking import MlflowClient
from PIL import Image
from sklearn.datasets import load_digits

from dskd.checkpoint import DetectorRecord, read_record
from dskd.config import RunConfig
from dskd.report.document import read_report
from tune.storage.files import Storage
from tune.tracking.events import EpochDone, TrialEnded, TrialStarted
from tune.tracking.tracker import Tracker

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--image-size", "32", "--batch-size", "4", "--teacher-weights", "random", "--folds", "0"]
"""Without folds, as finalists would take most of the time; one test here has them."""


def environment(tmp: Path, **more: str) -> dict[str, str]:
    """A clean one: neither the user's cache nor the user's servers and clusters."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "MLFLOW_", "DSKD_", "AWS_", "XDG_"))
    }
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    # Ray would otherwise write its token into the home folder.
    private = {"XDG_CACHE_HOME": str(tmp / "cache"), "RAY_AUTH_TOKEN_PATH": str(tmp / "token"), "PATH": binaries}
    return kept | private | more


def run(
    *words: object, env: dict[str, str], cwd: Path = ROOT, timeout: float = 420
) -> subprocess.CompletedProcess[str]:
    command = [str(word) for word in words]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def search(data: Path, storage: Path, *more: object) -> list[object]:
    return [
        sys.executable, "tune/search.py", "--data", data, "--name", "try", "--storage", storage, *TINY, *more,
    ]  # fmt: skip


def tracked(uri: str, name: str) -> tuple[list[Any], list[Any]]:
    """Parents and children of an experiment."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    children = [each for each in runs if "mlflow.parentRunId" in each.data.tags]
    return [each for each in runs if each not in children], children


def studied(url: str, name: str) -> list[optuna.trial.FrozenTrial]:
    (found,) = [known for known in optuna.get_all_study_names(url) if f"{known}/".startswith(f"{name}/")]
    return optuna.load_study(study_name=found, storage=url).trials


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text(secrets.token_hex(16))
    file.chmod(0o600)
    return file


def check_content(uri: str, parents: list[Any], children: list[Any], chosen: Any, category: str) -> None:
    """What a person finds in MLflow of one category."""
    client = MlflowClient(tracking_uri=uri)
    parent = next(each for each in parents if each.data.tags["dskd.category"] == category)
    assert chosen.data.tags["dskd.trial"] in parent.data.tags["mlflow.note.content"]
    pictures = {file.path for file in client.list_artifacts(parent.info.run_id, "study")}
    assert "study/history.png" in pictures
    assert chosen.info.run_name.endswith(" ★") and not any(name.startswith("test/") for name in parent.data.metrics)
    shown = {file.path for file in client.list_artifacts(chosen.info.run_id, "validation")}
    assert shown == {f"validation/{name}" for name in ("curves.png", "best.jpg", "worst.jpg", "scores.json")}
    digests = {
        used.dataset.digest
        for each in (parent, *children)
        if each.data.tags["dskd.category"] == category
        for used in each.inputs.dataset_inputs
    }
    assert len(digests) == 1
    for child in children:
        assert child.data.metrics["system/system_memory_usage_megabytes"] > 0


def check_report(storage: Path, outcomes: list[Any], parents: list[Any], said: str) -> None:
    """The report says what the storage, Optuna and MLflow know, and lies where the search says."""
    page = storage / "try" / "report.html"
    assert str(page) in said
    report = read_report((storage / "try/report.json").read_bytes())
    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")
    assert "untrained" in report.caveats[0]
    for category, outcome in zip(report.categories, outcomes, strict=True):
        champion = outcome["champion"]
        assert category.figures == champion["metrics"]
        logged = client.get_run(champion["run_id"]).data.metrics
        assert {name: logged[name] for name in category.figures if name.startswith("test/")} == {
            name: figure for name, figure in category.figures.items() if name.startswith("test/")
        }
        trials = studied(f"sqlite:///{storage}/optuna.db", f"try/{category.name}")
        assert [trial.objective for trial in category.trials] == [trial.value for trial in trials]
        assert category.trials[0].is_untuned
        inspected = category.inspected
        assert inspected is not None and len(inspected.test) == 8 and inspected.validation
        assert category.limit is not None and inspected.threshold == category.limit.value
        missed = [each for each in inspected.test if each.is_defective and each.score <= inspected.threshold]
        assert len(missed) == category.figures["test/num_missed"]
        assert len(inspected.suspects) == min(10, len(category.normal_scores))
    for parent in parents:
        assert [file.path for file in client.list_artifacts(parent.info.run_id, "report")] == ["report/report.html"]


@pytest.mark.cluster
def test_embedded_search_tracks_its_trials_and_its_champions_can_be_pulled(
    mvtec_root: Path, tmp_path: Path, token_file: Path
) -> None:
    env, storage = environment(tmp_path), tmp_path / "results"
    first = run(*search(mvtec_root, storage, "--trials", "3", "--epochs", "2", "--json"), env=env)
    assert first.returncode == 0, first.stderr
    outcomes = json.loads(first.stdout)["categories"]
    assert [outcome["num_trials"] for outcome in outcomes] == [3, 3]
    assert "UNTRAINED TEACHER" in first.stderr

    parents, children = tracked(f"sqlite:///{storage}/mlflow.db", "try")
    assert sorted(parent.data.tags["dskd.category"] for parent in parents) == [each["category"] for each in outcomes]
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {each.info.run_id for each in parents}
    assert len(children) == 6
    for child in children:
        assert child.data.tags["dskd.teacher"] == "random (untrained)"
        assert child.data.tags["dskd.selection"] == "val"
        assert float(child.data.params["learning_rate"]) > 0
        assert child.info.status in ("FINISHED", "KILLED")
    fingerprints = {child.data.tags["dskd.data_sha256"] for child in children}
    assert len(fingerprints) == 2, "each category trains on its own images"
    for outcome in outcomes:
        trials = studied(f"sqlite:///{storage}/optuna.db", f"try/{outcome['category']}")
        ends = Counter(child.data.tags["dskd.status"] for child in children
                       if child.data.tags["dskd.category"] == outcome["category"])  # fmt: skip
        assert Counter(trial.state.name for trial in trials) == Counter(
            COMPLETE=ends["finished"], PRUNED=ends["pruned"]
        )
        chosen = next(run for run in children if run.info.run_id == outcome["champion"]["run_id"])
        finished = [child for child in children if child.data.tags["dskd.category"] == outcome["category"]
                    and child.data.tags["dskd.status"] == "finished"]  # fmt: skip
        assert chosen.data.metrics["val/best_objective"] == max(
            child.data.metrics["val/best_objective"] for child in finished
        )
        stored = Storage(str(storage / "try")).read_json(f"{outcome['champion']['folder']}/detector.json")
        assert stored is not None
        values = RunConfig.from_dict(stored["config"]).flat()
        assert {name: chosen.data.params[f"delivered.{name}"] for name in values} == {
            name: str(value) for name, value in values.items()
        }
        mine = [child for child in children if child.data.tags["dskd.category"] == outcome["category"]]
        assert {child.data.tags["dskd.data_sha256"] for child in mine} == {stored["data_sha256"]}
        tested = [child for child in children if "test/image_auroc" in child.data.metrics]
        assert len(tested) == 2, "the test set is looked at once per category, for its champion"
        check_content(f"sqlite:///{storage}/mlflow.db", parents, children, chosen, outcome["category"])
        so_far = json.loads((storage / "try/best-so-far" / f"{outcome['category']}.json").read_text())
        kept = read_record(storage / "try" / so_far["folder"])
        assert kept.metrics["val/objective"] == outcome["champion"]["metrics"]["val/objective"]

    check_report(storage, outcomes, parents, first.stderr)
    pulled = run(
        sys.executable, "tune/pull.py", "all", "--name", "try", "--storage", storage, "--out", tmp_path / "detectors",
        "--json", env=env,
    )  # fmt: skip
    assert pulled.returncode == 0, pulled.stderr
    category = outcomes[0]["category"]
    record = read_record(tmp_path / "detectors" / category)
    assert record.metrics == outcomes[0]["champion"]["metrics"]
    images = mvtec_root / category / "test"
    verdicts = run(
        sys.executable, "-m", "dskd", "predict", tmp_path / "detectors" / category, images,
        "--out", tmp_path / "verdicts", env=env,
    )  # fmt: skip
    assert verdicts.returncode == 0, verdicts.stderr
    assert len((tmp_path / "verdicts" / "predictions.jsonl").read_text().splitlines()) == 8

    shutil.rmtree(storage / "try" / outcomes[0]["champion"]["folder"])  # it comes back from the trial's checkpoint
    again = run(*search(mvtec_root, storage, "--trials", "3", "--epochs", "2", "--json"), env=env)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("delivered again from its last checkpoint") == 1
    champion = json.loads(again.stdout)["categories"][0]["champion"]
    assert champion["folder"] == f"{outcomes[0]['champion']['folder']}-lease-000002", "in a folder of its own"
    restored = read_record(storage / "try" / champion["folder"])
    assert restored.metrics == outcomes[0]["champion"]["metrics"]
    assert [each["champion"]["trial_id"] for each in json.loads(again.stdout)["categories"]] == [
        each["champion"]["trial_id"] for each in outcomes
    ]
    assert len(tracked(f"sqlite:///{storage}/mlflow.db", "try")[1]) == 6, "a finished search has nothing to add"

    other = run(*search(mvtec_root, storage, "--trials", "3", "--epochs", "4"), env=env)
    assert other.returncode == 2 and other.stderr.count("\n") == 1 and "begun with epochs 2, got 4" in other.stderr
    # More trials, and too little time for them: interrupted, then continued where they stand.
    more = search(mvtec_root, storage, "--trials", "5", "--epochs", "2", "--categories", category, "--json")
    interrupted = run(*more, "--time-budget", "1s", env=env)
    assert "the time budget interrupted" in interrupted.stderr, interrupted.stderr
    done = run(*more, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["categories"][0]["num_trials"] == 5
    states = [trial.state.name for trial in studied(f"sqlite:///{storage}/optuna.db", f"try/{category}")]
    assert len(states) == 5 and {*states} <= {"COMPLETE", "PRUNED"}
    runs = [each for each in tracked(f"sqlite:///{storage}/mlflow.db", "try")[1]
            if each.data.tags["dskd.category"] == category]  # fmt: skip
    assert len(runs) == 5 and {each.data.tags["dskd.status"] for each in runs} <= {"finished", "pruned"}


@pytest.mark.cluster
def test_killed_search_goes_on_without_losing_or_doubling_a_trial(
    mvtec_root: Path, tmp_path: Path, token_file: Path
) -> None:
    """With two backbones, each with weights of its own, of which the champion names one."""
    env, storage = environment(tmp_path, DSKD_CHECKPOINT_SECONDS="0"), tmp_path / "results"
    category = sorted(folder.name for folder in mvtec_root.iterdir() if folder.is_dir())[0]
    teachers = ("test_resnet", "test_convnext")
    (tmp_path / "space.toml").write_text(f"backbone = {list(teachers)}\n")
    words = search(
        mvtec_root, storage, "--trials", "4", "--epochs", "6", "--categories", category, "--json", "--preset", "rd4ad",
        "--space", tmp_path / "space.toml", "--levels", "1", "2", "--image-size", "64",
        "--teacher-weights", ",".join(f"{each}=random" for each in teachers),
    )  # fmt: skip
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen([str(word) for word in words], env=env, cwd=ROOT, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 240
    while " of 4 (" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    resumed = run(*words, env=env)
    assert resumed.returncode == 0, resumed.stderr
    (outcome,) = json.loads(resumed.stdout)["categories"]
    assert outcome["num_trials"] == 4
    runs = tracked(f"sqlite:///{storage}/mlflow.db", "try")[1]
    statuses = [each.data.tags["dskd.status"] for each in runs]
    # A trial that started within Tune's last two seconds before the kill is unknown to its snapshot, and
    # another takes its place.
    assert len(statuses) - statuses.count("lost") == 4
    assert "RUNNING" not in {each.info.status for each in runs}
    states = [trial.state.name for trial in studied(f"sqlite:///{storage}/optuna.db", f"try/{category}")]
    assert states.count("COMPLETE") + states.count("PRUNED") == 4
    assert {(each.data.params["backbone"], each.data.params["teacher_weights"]) for each in runs} == {
        (backbone, "random") for backbone in teachers
    }
    record = read_record(storage / "try" / outcome["champion"]["folder"])
    assert f"rd4ad with backbone {record.config.model.backbone}" in resumed.stderr.replace("\n", " ")


@pytest.mark.cluster
def test_a_search_killed_while_it_compares_finalists_ends_with_the_same_champion(
    mvtec_root: Path, tmp_path: Path, token_file: Path
) -> None:
    env = environment(tmp_path, DSKD_CHECKPOINT_SECONDS="0")
    words = ("--trials", "3", "--epochs", "4", "--categories", "tile", "--preset", "stfpm", "--max-concurrent", "1",
             "--folds", "3", "--finalists", "1", "--min-gain-errors", "0", "--json")  # fmt: skip

    def champion(storage: Path, told: str) -> tuple[dict[str, Any], DetectorRecord]:
        (outcome,) = json.loads(told)["categories"]
        return outcome, read_record(storage / "try" / outcome["champion"]["folder"])

    calm, killed = tmp_path / "calm", tmp_path / "killed"
    first = run(*search(mvtec_root, calm, *words), env=env)
    assert first.returncode == 0, first.stderr
    expected, expected_record = champion(calm, first.stdout)

    log = (tmp_path / "log").open("w+")
    command = [str(word) for word in search(mvtec_root, killed, *words)]
    process = subprocess.Popen(command, env=env, cwd=ROOT, stderr=log, stdout=log, start_new_session=True)
    deadline = time.monotonic() + 240
    while "trainings on other folds ended" not in (said := (tmp_path / "log").read_text()):
        assert time.monotonic() < deadline and process.poll() is None, said
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed = run(*search(mvtec_root, killed, *words), env=env)
    assert resumed.returncode == 0, resumed.stderr
    found, record = champion(killed, resumed.stdout)
    assert (found["num_trials"], found["decision"]) == (3, expected["decision"])
    assert "gained" in found["decision"] or "untuned preset stays" in found["decision"]
    assert record.normal_scores == expected_record.normal_scores, "the same detectors scored the same images"
    assert record.metrics == expected_record.metrics
    assert record.calibration_folds == 3 and len({*record.calibration_files}) == len(record.calibration_files) == 12

    _, children = tracked(f"sqlite:///{killed}/mlflow.db", "try")
    roles = Counter(each.data.tags["dskd.role"] for each in children)
    assert roles["champion"] == 1 and roles["finalist"] in (2, 3, 4, 5) and roles["preset"] in (0, 1)
    assert roles["champion"] + roles["preset"] + roles["trial"] == 3
    ids = [each.data.tags["dskd.trial"] for each in children]
    assert len({*ids}) == len(ids), "none is there twice"
    assert {each.info.status for each in children} <= {"FINISHED", "KILLED"}
    assert len(studied(f"sqlite:///{killed}/optuna.db", "try/tile")) == 3, "a fold is no trial of the study"
    again = run(*search(mvtec_root, killed, *words), env=env)
    assert again.returncode == 0 and "is the champion already" in again.stderr, again.stderr


@pytest.mark.cluster
def test_trials_whose_shared_worker_is_killed_end_with_the_champion_that_they_have_one_by_one(
    mvtec_root: Path, tmp_path: Path, token_file: Path
) -> None:
    """Random suggestions, and no rung before the end: so the trials are the same in any order."""
    env = environment(tmp_path, DSKD_CHECKPOINT_SECONDS="0")
    words = ("--trials", "4", "--epochs", "2", "--categories", "tile", "--sampler", "random", "--score-candidates", "0",
             "--backbone", "test_resnet", "--levels", "1", "2", "--json")  # fmt: skip
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    alone = run(*search(mvtec_root, calm, *words, "--max-concurrent", "1"), env=env)
    assert alone.returncode == 0, alone.stderr

    shared = search(mvtec_root, killed, *words, "--max-concurrent", "2", "--trials-per-gpu", "2")
    with (tmp_path / "out").open("w+") as out, (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen([str(word) for word in shared], env=env, cwd=ROOT, stdout=out, stderr=log)
        deadline, workers = time.monotonic() + 240, list[Process]()
        while not workers or not list((killed / "try" / "workers" / "tile").glob("*/*/checkpoint.json")):
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()
            workers = workers or titled(process.pid, "ray::LoneWorker")
            time.sleep(0.005)
        (worker,) = workers
        os.kill(worker.pid, signal.SIGKILL)  # at a trial's first checkpoint, of which it makes two
        assert process.wait(240) == 0, (tmp_path / "log").read_text()

    (expected,), (found,) = (json.loads(told)["categories"] for told in (alone.stdout, (tmp_path / "out").read_text()))
    assert (found["num_trials"], found["num_failed"], found["num_pruned"]) == (4, 0, 0)
    records = [read_record(storage / "try" / outcome["champion"]["folder"])
               for storage, outcome in ((calm, expected), (killed, found))]  # fmt: skip
    assert records[0].config == records[1].config
    runs = tracked(f"sqlite:///{killed}/mlflow.db", "try")[1]
    assert [each.data.tags["dskd.status"] for each in runs] == ["finished"] * 4
    assert {trial.state.name for trial in studied(f"sqlite:///{killed}/optuna.db", "try/tile")} == {"COMPLETE"}
    losses = [
        sorted(each.data.metrics["train/loss"] for each in tracked(f"sqlite:///{storage}/mlflow.db", "try")[1])
        for storage in (calm, killed)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.cluster
def test_a_search_over_ten_classes_ends_with_a_champion_of_each(tmp_path: Path, token_file: Path) -> None:
    """The other benchmark of STFPM and RD4AD, on a few of scikit-learn's handwritten digits."""
    digits = load_digits()
    for digit in range(10):
        (tmp_path / "digits" / str(digit)).mkdir(parents=True)
        for index in np.flatnonzero(digits.target == digit)[:20]:
            pixels = (digits.images[index] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "digits" / str(digit) / f"{index}.png")
    words = ("--layout", "classes", "--preset", "stfpm", "--backbone", "test_resnet", "--levels", "1", "2")
    done = run(
        *search(tmp_path / "digits", tmp_path / "results", *words, "--trials", "2", "--epochs", "2", "--json"),
        env=environment(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)["categories"]
    assert [outcome["category"] for outcome in outcomes] == [str(digit) for digit in range(10)]
    for outcome in outcomes:
        metrics = outcome["champion"]["metrics"]
        assert outcome["num_trials"] == 2 and metrics["val/objective"] == metrics["val/image_auroc"]
        assert 0 <= metrics["test/image_auroc"] <= 1 and "test/aupro" not in metrics
    found = [outcome["champion"]["metrics"]["test/image_auroc"] for outcome in outcomes]
    assert sum(found) / 10 > 0.6, found


@pytest.fixture
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    for unavailable in (services.s3_unavailable, services.postgres_unavailable, services.mlflow_unavailable):
        if reason := unavailable():
            pytest.skip(reason)
    with services.all_services(tmp_path_factory.mktemp("s")) as env:
        yield env


@pytest.mark.services
def test_storage_studies_and_runs_live_on_real_servers(
    served: dict[str, str], detector_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in served.items():
        monkeypatch.setenv(name, value)
    storage = Storage(served["DSKD_STORAGE"])
    storage.probe()
    folder = tmp_path / "sent"
    folder.mkdir()
    (folder / "detector.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(secrets.token_bytes(100_000))
    storage.upload(folder, "champions/bolt/one")
    storage.download("champions/bolt/one", tmp_path / "received")
    for file in folder.iterdir():
        assert (tmp_path / "received" / file.name).read_bytes() == file.read_bytes()
    storage.write_json("champions/bolt.json", {"trial_id": "one"})
    assert storage.read_json("champions/bolt.json") == {"trial_id": "one"}
    assert storage.read_json("champions/none.json") is None

    study = optuna.create_study(storage=served["DSKD_STUDY_STORAGE"], study_name="parts/bolt", direction="maximize")
    study.optimize(lambda trial: trial.suggest_float("learning_rate", 0, 1), n_trials=2)
    assert len(studied(served["DSKD_STUDY_STORAGE"], "parts/bolt")) == 2

    uri = served["MLFLOW_TRACKING_URI"]
    tracker = Tracker(uri, "parts", artifact_location=None, tags={}, unsent=tmp_path / "unsent.jsonl")
    tracker.put(TrialStarted("bolt", "one", {"learning_rate": 0.1}))
    tracker.put(EpochDone("bolt", "one", 1, {"val/best_objective": 0.5}, 1))
    tracker.put(TrialEnded("bolt", "one", "finished", ""))
    done = tracker.register_champion("bolt", "one", detector_folder, {"val/objective": 0.5}, "data", patience=60)
    assert tracker.close(60) == 0 and done.is_champion
    parents, children = tracked(uri, "parts")
    assert len(parents) == len(children) == 1 and children[0].data.metrics["val/best_objective"] == 0.5
    client = MlflowClient(tracking_uri=uri)
    assert {file.path for file in client.list_artifacts(done.run_id, "model/artifacts/detector")} == {
        "model/artifacts/detector/detector.json",
        "model/artifacts/detector/model.safetensors",
    }


WHAT_IS_HELD = """
import json, ray
from ray.util.state import list_actors
ray.init(log_to_driver=False)
groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
kinds = ("RayTrainWorker", "TrainController", "ImplicitFunc", "LoneWorker", "DispatcherActor")
workers = [actor for actor in list_actors(limit=1000) if actor.state != "DEAD" and actor.class_name in kinds]
cpus = ray.available_resources()["CPU"]
print(json.dumps({"cpus": cpus, "groups": len(groups), "workers": len(workers)}))
"""


@pytest.fixture
def short_folder() -> Iterator[str]:
    """Ray keeps sockets in its folder, whose paths may have 107 bytes; pytest's are longer."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.fixture
def head(tmp_path: Path, short_folder: str, served: dict[str, str]) -> Iterator[dict[str, str]]:
    """A token-protected Ray head with two CPUs, and the environment of a user of it."""
    port, dashboard = services.free_port(), services.free_port()
    env = environment(tmp_path, **served, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16))
    process = subprocess.Popen(
        [
            "ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2",
            "--disable-usage-stats", f"--ray-client-server-port={services.free_port()}", f"--temp-dir={short_folder}",
            # Its usual port may be another cluster's, and then no job is ever taken.
            f"--dashboard-agent-listen-port={services.free_port()}",
        ],
        env=env, cwd=tmp_path, stdout=(tmp_path / "head.log").open("w"), stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield env | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}", "RAY_GCS": f"127.0.0.1:{port}"}
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.mark.services
def test_job_on_a_cluster_with_servers_trains_in_pairs_and_frees_what_it_prunes(
    mvtec_root: Path, tmp_path: Path, head: dict[str, str]
) -> None:
    checkout = tmp_path / "checkout"
    for part in ("tune", "dskd"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    submit = ["ray", "job", "submit", "--working-dir", checkout, "--"]
    for _ in range(30):
        answer = run("ray", "job", "list", env=head)
        if answer.returncode == 0:
            break
        time.sleep(1)
    else:
        pytest.fail(f"no answer from the head: {answer.stderr[-500:]} {(tmp_path / 'head.log').read_text()[-2000:]}")

    for _ in range(60):  # the head answers before its agent takes jobs
        origin = run(*submit, "python", "-c", "import dskd, tune; print(dskd.__file__, tune.__file__)", env=head)
        if "No available agent" not in origin.stderr + origin.stdout:
            break
        time.sleep(1)
    assert origin.stdout.count("working_dir_files") >= 2, "code comes with the job, wherever else it is installed"

    refused = run(*submit, "true", env=head | {"RAY_AUTH_TOKEN": "0" * 32})
    assert refused.returncode != 0 and "authentication" in (refused.stderr + refused.stdout).lower()
    assert run("ray", "job", "list", env=head).stdout.count("submission_id=") == 1, "a wrong token starts no job"

    category = sorted(folder.name for folder in mvtec_root.iterdir() if folder.is_dir())[0]
    done = run(
        *submit, "python", "tune/search.py", "--data", mvtec_root, "--categories", category, "--name", "pairs", *TINY,
        "--trials", "5", "--epochs", "4", "--workers-per-trial", "2", "--max-concurrent", "2",
        "--storage", head["DSKD_STORAGE"], env=head, timeout=590,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    assert "pruned" in output, "this seed is expected to prune, or the test shows nothing"
    password = head["DSKD_STUDY_STORAGE"].split(":")[2].split("@")[0]
    assert password not in output and head["AWS_SECRET_ACCESS_KEY"] not in output

    held = run(sys.executable, "-c", WHAT_IS_HELD, env=head | {"RAY_ADDRESS": head["RAY_GCS"]})
    assert json.loads(held.stdout.splitlines()[-1]) == {"cpus": 2.0, "groups": 0, "workers": 0}, held.stdout

    parents, children = tracked(head["MLFLOW_TRACKING_URI"], "pairs")
    assert len(parents) == 1 and len(children) == 5
    assert {child.data.tags["dskd.status"] for child in children} == {"finished", "pruned"}
    assert len(studied(head["DSKD_STUDY_STORAGE"], f"pairs/{category}")) == 5
    client = MlflowClient(tracking_uri=head["MLFLOW_TRACKING_URI"])
    (version,) = client.search_model_versions(f"name = 'dskd-{category}'")
    assert version.run_id in {child.info.run_id for child in children}
    assert client.get_registered_model(f"dskd-{category}").aliases == {} and "its teacher is untrained" in output
    client.set_registered_model_alias(f"dskd-{category}", "champion", version.version)

    for number, source in enumerate((["--name", "pairs", "--storage", head["DSKD_STORAGE"]], ["--alias", "champion"])):
        pulled = run(
            sys.executable, "tune/pull.py", category, *source, "--out", tmp_path / f"detectors{number}", env=head
        )
        assert pulled.returncode == 0, pulled.stderr
        assert read_record(tmp_path / f"detectors{number}" / category).category == category
