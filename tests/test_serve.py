"""Champions behind Ray Serve, over HTTP: single images, batches, 50 at once, harm, and a new champion under load."""

import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image
from services import free_port

from dskd.checkpoint import read_record
from dskd.detector import Detector
from dskd.jobs.feedback import Quarantine, accept, entries_of
from tune.settings.serve import ServeSettings
from tune.storage.champions import store_champion
from tune.storage.files import Storage

SECRET = "0123456789abcdef0123"


@pytest.fixture
def recalibrated(detector_folder: Path, mvtec_root: Path, tmp_path: Path) -> Path:
    """The same detector with other thresholds: what is served must change with it."""
    folder = Path(shutil.copytree(detector_folder, tmp_path / "recalibrated"))
    good = sorted((mvtec_root / "tile/test/good").glob("*.png"))
    accept(Detector.load(folder), folder, entries_of(good, "good"))
    return folder


@pytest.fixture
def registry(detector_folder: Path, recalibrated: Path, tmp_path: Path) -> tuple[str, MlflowClient]:
    """An MLflow with two versions of `tile`, of which the first is champion."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.create_experiment("spring", artifact_location=f"file://{tmp_path}/artifacts")
    client.create_registered_model("dskd-tile")
    for folder in (detector_folder, recalibrated):
        run = client.create_run(experiment)
        client.log_artifacts(run.info.run_id, str(folder), "detector")
        client.create_model_version("dskd-tile", f"{run.info.artifact_uri}/detector", run.info.run_id)
    client.set_registered_model_alias("dskd-tile", "champion", "1")
    return uri, client


def test_a_search_serves_its_champions_and_says_when_one_changes(
    detector_folder: Path, recalibrated: Path, tmp_path: Path
) -> None:
    from tune.jobs.serve import champions_of

    search = Storage(str(tmp_path / "results/parts"))
    store_champion(search, "tile", "t1", Path(shutil.copytree(detector_folder, tmp_path / "first")), {})
    settings = ServeSettings(name="parts", storage=str(tmp_path / "results"))
    ((name, (stamp, download)),) = champions_of(settings).items()
    download(tmp_path / "got")
    assert name == "tile" and read_record(tmp_path / "got") == read_record(tmp_path / "first")
    assert champions_of(settings)["tile"][0] == stamp
    store_champion(search, "tile", "t2", recalibrated, {})
    assert champions_of(settings)["tile"][0] != stamp
    with pytest.raises(ValueError, match="no champion of 'wood'; there are: tile"):
        champions_of(ServeSettings(name="parts", storage=str(tmp_path / "results"), categories=("wood",)))


def test_a_lower_precision_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--precision float16 needs --gpus-per-replica above 0"):
        ServeSettings(name="parts", storage=str(tmp_path), precision="float16")


def test_a_node_without_a_token_serves_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    from tune.jobs.serve import page_token_of_node

    with pytest.raises(ValueError, match=r"\$DSKD_PAGE_TOKEN is not set on this node"):
        page_token_of_node()
    monkeypatch.setenv("DSKD_PAGE_TOKEN", SECRET)
    assert page_token_of_node() == SECRET


@pytest.fixture
def client(local_ray: None, registry: tuple[str, MlflowClient], tmp_path: Path) -> Iterator[httpx2.Client]:
    """A client of the real servers: proxy, page and one replica of the champions."""
    from ray import serve

    from tune.jobs.serve import application

    settings = ServeSettings(
        alias="champion",
        tracking_uri=registry[0],
        feedback=str(tmp_path / "feedback"),
        poll_seconds=0.5,
        requests_per_minute=1_000_000,  # four threads without pause pass what one address may ask for by default
    )
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(application(settings, SECRET), name="dskd")
        bearer = {"Authorization": f"Bearer {SECRET}"}
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=bearer, timeout=60, trust_env=False) as made:
            yield made
    finally:
        serve.shutdown()


def said_to(address: tuple[str, int], request: str, *, is_cut_off: bool = False) -> str:
    """The first line that the server answers to these very bytes; nothing is waited for if the request is cut off."""
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(request.encode())
        return "" if is_cut_off else connection.recv(4096).decode().splitlines()[0]


def form(*files: tuple[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", each) for each in files]


@pytest.mark.cluster
def test_champions_are_served_and_a_new_one_takes_over_without_losing_a_request(
    client: httpx2.Client,
    registry: tuple[str, MlflowClient],
    detector_folder: Path,
    recalibrated: Path,
    mvtec_root: Path,
    tmp_path: Path,
) -> None:
    paths = sorted((mvtec_root / "tile/test").rglob("*.png"))
    contents = [path.read_bytes() for path in paths]
    expected = list(Detector.load(detector_folder).predict(paths))

    def versions_of(answer: Any) -> set[str]:
        assert answer.status_code == 200, answer.text
        return {row["detector_version"] for row in answer.json()["predictions"]}

    # single, batch, 50 at once
    assert client.get("/health").json() == {"status": "ok", "num_categories": 1}
    assert "<title>Inspection</title>" in client.get("/").text
    single = client.post("/inspect/tile", files=form(("one.png", contents[0]))).json()["predictions"]
    assert single[0]["score"] == pytest.approx(expected[0].score, rel=1e-5) and single[0]["image"] == "one.png"
    batch = client.post("/inspect/tile", files=form(*((path.name, path.read_bytes()) for path in paths)))
    assert [row["score"] for row in batch.json()["predictions"]] == pytest.approx([e.score for e in expected], rel=1e-5)
    with ThreadPoolExecutor(50) as pool:
        many = list(pool.map(lambda n: client.post("/inspect/tile", files=form((f"{n}", contents[n % 8]))), range(50)))
    assert [answer.json()["predictions"][0]["image"] for answer in many] == [str(number) for number in range(50)]

    # harm
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    refusals = [
        (client.post("/inspect/tile", files=form(("big.png", file.getvalue()))), 422, "decompression bomb"),
        (client.post("/inspect/wood", files=form(("a.png", contents[0]))), 404, "there are: tile"),
        (client.get("/categories", headers={"Authorization": "Bearer no"}), 401, "token"),
        (client.get("/categories", headers={"Host": "evil.example"}), 400, "not served here"),
        (client.post("/inspect/tile", headers={"Origin": "http://evil.example"}, files=form(("a", b""))), 403, "site"),
        (client.get("/nowhere"), 404, "no such page"),
    ]
    for answer, status, words in refusals:
        assert answer.status_code == status and words in answer.json()["error"]["message"], answer.text

    head = f"POST /inspect/tile HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {SECRET}\r\n"
    address = client.base_url.host, int(client.base_url.port or 80)
    assert " 413 " in said_to(address, f"{head}Content-Length: 999999999\r\n\r\n")
    assert said_to(address, f"{head}Content-Length: 999\r\n\r\n--x", is_cut_off=True) == ""
    assert client.get("/health").status_code == 200, "one that was cut off harms nobody"

    # what an inspector says lies in quarantine, in the form that `dskd feedback --quarantine` reads
    kept = client.post("/feedback/tile?judged=defect", files=form(("../a.png", contents[-1])))
    assert kept.status_code == 201
    (entry,) = Quarantine(tmp_path / "feedback/tile").entries()
    assert (entry.judged, entry.name, entry.path.read_bytes()) == ("defect", "a.png", contents[-1])

    # a new champion, while four threads ask without pause
    old, new = (read_record(folder).detector_version for folder in (detector_folder, recalibrated))
    answers: list[set[str]] = []
    is_over = threading.Event()

    def hammer() -> None:
        while not is_over.is_set():
            answers.append(
                versions_of(client.post("/inspect/tile", files=form(("a", contents[0]), ("b", contents[1]))))
            )

    with ThreadPoolExecutor(4) as pool:
        hammering = [pool.submit(hammer) for _ in range(4)]
        time.sleep(1)
        registry[1].set_registered_model_alias("dskd-tile", "champion", "2")
        deadline = time.monotonic() + 60
        while not (answers and answers[-1] == {new}) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        is_over.set()
        for each in hammering:
            each.result()  # raises where an answer was no 200
    assert answers[0] == {old} and answers[-1] == {new} and len(answers) > 10
    assert set().union(*answers) == {old, new}
    assert "dskd_images_total" in client.get("/metrics").text
    assert json.loads(client.get("/categories").text)["categories"][0]["detector_version"] == new
