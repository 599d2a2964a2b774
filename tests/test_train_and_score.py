"""A training and a batch inspection for real: Ray on this machine; with a real S3 server where it runs."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import services
from mlflow.tracking import MlflowClient

from dskd.checkpoint import read_record
from dskd.cli.main import predict
from tune.storage.files import Storage

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--image-size", "32", "--batch-size", "4", "--epochs", "2", "--teacher-weights", "random"]


def environment(tmp: Path, **more: str) -> dict[str, str]:
    """A clean one: neither the user's cache nor the user's servers and clusters."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "MLFLOW_", "DSKD_", "AWS_", "XDG_"))
    }
    # Ray would otherwise write its token into the home folder.
    return kept | {"XDG_CACHE_HOME": str(tmp / "cache"), "RAY_AUTH_TOKEN": secrets.token_hex(16)} | more


def run(*words: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(str(word) for word in words)]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=420, check=False)


def verdicts(folder: Path) -> dict[str, dict[str, Any]]:
    rows = pyarrow.parquet.read_table(folder / "verdicts").to_pylist()
    return {row["image"]: row for row in rows}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A running head with two CPUs, protected by a token, and the environment of a user of it."""
    port = services.free_port()
    env = environment(tmp_path, RAY_AUTH_MODE="token", PYTHONPATH=str(ROOT))
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short:
        # Ray keeps sockets in its folder, whose paths may have 107 bytes; pytest's are longer.
        words = ["-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
                 f"--dashboard-port={services.free_port()}", f"--ray-client-server-port={services.free_port()}",
                 f"--temp-dir={short}", "--disable-usage-stats"]  # fmt: skip
        with (tmp_path / "head.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *words], env=env, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
            )
            try:
                yield env | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(60)


def wait_for(cluster: dict[str, str]) -> None:
    body = "import time, ray\nfor _ in range(60):\n    try:\n        ray.init(log_to_driver=False)\n        break\n" \
           "    except ConnectionError:\n        time.sleep(1)\nassert ray.is_initialized()\n"  # fmt: skip
    assert run("-c", body, env=cluster).returncode == 0, "the head did not start: see head.log"


@pytest.mark.cluster
def test_two_workers_train_a_detector_that_inspects_on_the_same_cluster(
    mvtec_root: Path, tmp_path: Path, cluster: dict[str, str]
) -> None:
    wait_for(cluster)
    storage, to = tmp_path / "results", tmp_path / "tile"
    words = ["tune/train.py", "--data", mvtec_root, "--category", "tile", "--workers", "2", *TINY, "--out", to,
             "--storage", storage, "--json"]  # fmt: skip
    trained = run(*words, env=cluster)
    assert trained.returncode == 0, trained.stderr
    assert "validation   2/2  step 4  loss" in trained.stderr and "UNTRAINED TEACHER" in trained.stderr
    document, record = json.loads(trained.stdout), read_record(to)
    assert document["metrics"] == record.metrics and "test/aupro" in record.metrics
    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("train")
    assert experiment is not None
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.run_id == document["run"] and tracked.info.status == "FINISHED"
    assert tracked.data.params == {
        **{name: str(value) for name, value in record.config.flat().items()},
        "teacher_weights": "random", "textures": "drawn", "num_workers": "2",
    }  # fmt: skip
    assert tracked.data.tags["dskd.data_sha256"] == record.data_sha256
    assert len(client.get_metric_history(document["run"], "train/loss")) == 2
    assert tracked.data.metrics["test/aupro"] == pytest.approx(record.metrics["test/aupro"])

    again = run(*words, env=cluster)
    assert again.returncode == 0 and "is trained already" in again.stderr
    assert json.loads(again.stdout) == document

    images = tmp_path / "images"
    (images / "bad").mkdir(parents=True)
    for file in (mvtec_root / "tile" / "test").rglob("*.png"):
        (images / f"{file.parent.name}-{file.name}").write_bytes(file.read_bytes())
    (images / "bad" / "cut.png").write_bytes(b"\x89PNG cut short")
    out = tmp_path / "verdicts"
    scored = run("tune/score.py", f"runs:/{document['run']}/detector", "--tracking-uri", f"sqlite:///{storage}/mlflow.db",
                 "--images", images, "--out", out, "--batch-size", "2", "--json", env=cluster)  # fmt: skip
    assert scored.returncode == 1, scored.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary == json.loads(scored.stdout)
    rows = verdicts(out)
    assert len(rows) == summary["num_images"] == 9 and summary["num_unreadable"] == 1
    assert "not a readable image" in rows[f"{images}/bad/cut.png"]["error"]
    (images / "bad" / "cut.png").unlink()
    predict(to, (images,), out=tmp_path / "predicted")
    for line in (tmp_path / "predicted" / "predictions.jsonl").read_text().splitlines():
        expected = json.loads(line)
        assert rows[expected["image"]]["score"] == pytest.approx(expected["score"], rel=1e-5)
    anomalous = [row for row in rows.values() if row["is_anomalous"]]
    assert len(anomalous) == summary["num_anomalous"] and all((out / row["overlay"]).is_file() for row in anomalous)


@pytest.mark.services
def test_data_images_and_verdicts_live_in_s3(
    mvtec_root: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := services.s3_unavailable():
        pytest.skip(reason)
    with services.s3(tmp_path_factory.mktemp("s")) as server:
        env = environment(tmp_path, **server.env)
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        bucket, results = f"s3://{server.bucket}", tmp_path / "results"
        Storage(bucket).upload(mvtec_root, "sets")
        found = run("tune/search.py", "--data", f"{bucket}/sets", "--categories", "wood", "--name", "far",
                    "--folds", "0", "--trials", "1", *TINY, "--storage", results, "--json", env=env)  # fmt: skip
        assert found.returncode == 0, found.stderr
        champion = json.loads(found.stdout)["categories"][0]["champion"]
        assert "test/aupro" in champion["metrics"]
        copies = tmp_path / "cache" / "dskd" / "data"
        assert [path.name.rpartition("-")[0] for path in copies.iterdir() if path.is_dir()] == ["wood"]

        Storage(bucket).upload(results / "far" / champion["folder"], "detectors/wood")
        Storage(f"{bucket}/sets/wood/test").write("good/cut.png", b"\x89PNG cut short")
        scored = run("tune/score.py", f"{bucket}/detectors/wood", "--images", f"{bucket}/sets/wood/test",
                     "--out", f"{bucket}/verdicts", "--json", env=env)  # fmt: skip
        assert scored.returncode == 1, scored.stderr
        Storage(bucket).download("verdicts", tmp_path / "verdicts")
        rows = verdicts(tmp_path / "verdicts")
        assert len(rows) == 9 and [path for path, row in rows.items() if row["error"]] == [
            f"{bucket}/sets/wood/test/good/cut.png"
        ]
        assert json.loads(scored.stdout)["num_images"] == 9
        overlays = {row["overlay"] for row in rows.values() if row["is_anomalous"]}
        assert {f"overlays/{path.relative_to(tmp_path / 'verdicts/overlays')}" for path in
                (tmp_path / "verdicts").rglob("*.webp")} == overlays  # fmt: skip
