"""The page's application in process: verdicts, feedback and thresholds, and requests that mean harm."""

import asyncio
import base64
import io
import json
import pickle
import re
import shutil
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from dskd.calibration import Threshold
from dskd.detector import Detector
from dskd.draw.verdict import heat_colours
from dskd.jobs.feedback import Quarantine, accept
from dskd.page import bench as bench_module
from dskd.page.app import FILES, make_app, shown_name
from dskd.page.bench import Bench, answer_each
from dskd.page.guard import Guard, Limits
from dskd.page.inspector import Category, Photo, Question, Refusal
from dskd.page.judging import judge_photos
from dskd.page.metrics import Metrics
from dskd.page.panel import map_picture, palette
from dskd.page.server import MEGAPIXELS, TOKEN, page_token, serve_page

SECRET = "0123456789abcdef0123"
HOST = "http://127.0.0.1:8700"


@pytest.fixture(scope="module")
def served(detector_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A detector folder of its own, and the environment of a server."""
    folder = tmp_path_factory.mktemp("served") / "tile"
    shutil.copytree(detector_folder, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSKD_MAX_MEGAPIXELS", str(MEGAPIXELS))
        yield folder


@pytest.fixture(scope="module")
def bench(served: Path) -> Iterator[Bench]:
    made = Bench([served])
    with made.working():
        yield made


@pytest.fixture(scope="module")
def client(bench: Bench) -> Iterator[TestClient]:
    with TestClient(make_app(bench, token=SECRET), HOST, headers={"Authorization": f"Bearer {SECRET}"}) as made:
        yield made


@pytest.fixture(scope="module")
def photos(mvtec_root: Path) -> list[Path]:
    return sorted((mvtec_root / "tile/test").rglob("*.png"))


def form(*files: tuple[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", each) for each in files]


def png(width: int = 64, height: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (120, 90, 60)).save(file, "PNG")
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of some bytes whose header promises side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def refused(answer: Any, status: int) -> str:
    """The sentence of a refusal, which has the one form of all."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"status", "message", "details"} and error["status"] == status
    assert re.match(r"^\S.* .*[.…]$", error["message"]), "a sentence"
    return str(error["message"])


def test_the_page_says_what_the_detector_says(client: TestClient, served: Path, photos: list[Path]) -> None:
    expected = list(Detector.load(served).predict(photos, false_alarm_rate=0.4))
    answer = client.post("/inspect/tile?false_alarm_rate=0.4", files=form(*((p.name, p.read_bytes()) for p in photos)))
    assert answer.status_code == 200
    for row, prediction, path in zip(answer.json()["predictions"], expected, photos, strict=True):
        told = prediction.to_dict() | {"image": path.name, "map": None, "picture": None}
        floats = {name: pytest.approx(told[name], rel=1e-5) for name in ("score", "relative_score", "p_value")}
        # in a batch of another size the last digits differ, and with them a region's edge may
        assert row == told | floats | {"regions": row["regions"]}
        assert bool(row["regions"]) == prediction.is_anomalous


def test_a_map_is_the_detectors_own_in_grey_and_colours_are_those_of_all_pictures(
    client: TestClient, served: Path, photos: list[Path]
) -> None:
    row = client.post("/inspect/tile?maps=true", files=form(("a.png", photos[-1].read_bytes()))).json()["predictions"][
        0
    ]
    prediction = Detector.load(served).predict(photos[-1])
    assert row["map"].keys() == {"png", "highest", "floor"} and row["picture"] is None, "browsers read PNG"
    assert row["map"]["highest"] == pytest.approx(float(prediction.map.max()), rel=1e-4)
    grey = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["map"]["png"].partition(",")[2]))))
    assert grey.shape == prediction.map.shape == (64, 64)
    assert np.abs(grey / 255 * row["map"]["highest"] - prediction.map).max() <= row["map"]["highest"] / 254
    assert row["map"]["floor"] == prediction.floor
    assert palette()[85] == heat_colours(np.ones(1))[0].tolist(), "of the threshold"
    assert map_picture(prediction)["highest"] == pytest.approx(row["map"]["highest"], rel=1e-4)


def test_what_a_browser_cannot_show_comes_back_as_a_picture(client: TestClient, photos: list[Path]) -> None:
    file = io.BytesIO()
    Image.open(photos[0]).save(file, "TIFF")
    row = client.post("/inspect/tile?maps=true", files=form(("a.tif", file.getvalue()))).json()["predictions"][0]
    assert row["picture"].startswith("data:image/jpeg;base64,")


def test_categories_tell_thresholds_and_the_good_scores(client: TestClient, served: Path) -> None:
    found = client.get("/categories").json()
    record = Detector.load(served).record
    (category,) = found["categories"]
    assert category["normal_scores"] == sorted(record.normal_scores)
    assert category["threshold"]["value"] == record.threshold(0.01).value
    assert "UNTRAINED TEACHER" in category["note"] and len(found["palette"]) == 256


def test_50_at_once_are_answered_and_share_batches(
    client: TestClient, bench: Bench, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []

    def counted(detector: Detector, questions: Sequence[Question]) -> list[dict[str, Any]]:
        batches.append(len(questions))
        return judge_photos(detector, questions)

    monkeypatch.setattr(bench_module, "judge_photos", counted)
    content = photos[0].read_bytes()
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda n: client.post("/inspect/tile", files=form((f"{n}.png", content))), range(50)))
    assert [answer.status_code for answer in answers] == [200] * 50
    assert [answer.json()["predictions"][0]["image"] for answer in answers] == [f"{n}.png" for n in range(50)]
    assert sum(batches) == 50 and len(batches) < 50


def test_one_image_that_breaks_the_computation_costs_no_other_its_verdict(
    served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(detector: Detector, questions: Sequence[Question]) -> list[dict[str, Any]]:
        if any(question.photo.name == "evil" for question in questions):
            raise MemoryError("evil")
        return [{"image": question.photo.name} for question in questions]

    monkeypatch.setattr(bench_module, "judge_photos", judge)
    items = [(Question("tile", Photo(name, b""), 0.01), Future[dict[str, Any]]()) for name in ("a", "evil", "b")]
    answer_each(Detector.load(served), items)
    assert items[0][1].result() == {"image": "a"} and items[2][1].result() == {"image": "b"}
    assert isinstance(items[1][1].exception(), MemoryError)


def test_more_than_the_queue_holds_is_asked_to_come_again(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "MAX_WAITING", 1)
    answer = client.post("/inspect/tile", files=form(("a.png", png()), ("b.png", png())))
    assert "wait already" in refused(answer, 503) and answer.headers["retry-after"] == "5"


@pytest.mark.parametrize("side", [20_000, 40_000])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(client: TestClient, side: int) -> None:
    files = form(("big.png", bomb(side)))
    said = refused(client.post("/inspect/tile", files=files), 422)
    assert said.startswith(f"big.png is refused as a decompression bomb: {side} x {side} pixels are more than")
    assert "decompression bomb" in refused(client.post("/feedback/tile?judged=good", files=files), 422)


def test_what_is_no_image_is_a_row_beside_others_and_alone_a_refusal(client: TestClient) -> None:
    both = client.post("/inspect/tile", files=form(("a.png", png()), ("b.png", b"garbage"))).json()["predictions"]
    assert [row["verdict"] == "unreadable" for row in both] == [False, True]
    assert both[1]["error"].startswith("b.png is not a readable image") and "dskd-" not in json.dumps(both)
    alone = client.post("/inspect/tile", files=form(("a", b"x"), ("b", b"y")))
    assert refused(alone, 422) == "None of these images can be judged."
    assert len(alone.json()["error"]["details"]) == 2


FORM = "multipart/form-data"
HOSTILE: list[tuple[str, dict[str, Any], int]] = [
    ("GET /nowhere", {}, 404),
    ("GET /static/../app.py", {}, 404),
    ("GET /static/%2e%2e/app.py", {}, 404),
    ("GET /static/page.html", {}, 404),
    ("DELETE /categories", {}, 405),
    ("GET /inspect/tile", {}, 405),
    ("POST /inspect/none", {"files": form(("a.png", png()))}, 404),
    ("POST /inspect/..%2F..%2Fetc", {"files": form(("a.png", png()))}, 404),
    ("POST /feedback/none?judged=good", {"files": form(("a.png", png()))}, 404),
    ("POST /inspect/tile", {}, 415),
    ("POST /inspect/tile", {"json": {"path": "/etc/passwd"}}, 415),
    ("POST /inspect/tile", {"content": b"junk", "headers": {"content-type": FORM}}, 400),
    (
        "POST /inspect/tile",
        {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        422,
    ),
    ("POST /inspect/tile", {"files": [("path", ("a.png", png()))]}, 422),
    ("POST /inspect/tile", {"files": [("images", (None, "/etc/passwd"))]}, 422),
    ("POST /inspect/tile", {"files": form(("a.png", b""))}, 422),
    ("POST /inspect/tile", {"files": form(*[("a.png", b"x")] * 65)}, 400),
    ("POST /inspect/tile?false_alarm_rate=7", {"files": form(("a.png", png()))}, 422),
    ("POST /inspect/tile?false_alarm_rate=0", {"files": form(("a.png", png()))}, 422),
    ("POST /inspect/tile?false_alarm_rate=nan", {"files": form(("a.png", png()))}, 422),
    ("POST /inspect/tile?threshold=inf", {"files": form(("a.png", png()))}, 422),
    ("POST /inspect/tile?rate=0.1", {"files": form(("a.png", png()))}, 422),
    ("POST /feedback/tile?judged=maybe", {"files": form(("a.png", png()))}, 422),
    ("POST /feedback/tile", {"files": form(("a.png", png()))}, 422),
    ("POST /feedback/tile?judged=good", {"files": form(("a.png", b"no image"))}, 422),
    ("POST /feedback/tile?judged=good", {"files": form(("a.png", png()), ("b.png", png()))}, 422),
    ("GET /categories", {"headers": {"authorization": "Bearer wrong"}}, 401),
    ("GET /categories", {"headers": {"authorization": f"Basic {SECRET}"}}, 401),
    ("GET /metrics", {"headers": {"authorization": "Bearer \xff".encode("latin-1")}}, 401),
    ("GET /nowhere", {"headers": {"authorization": ""}}, 401),
    ("GET /categories", {"headers": {"host": "evil.example"}}, 400),
    ("GET /categories", {"headers": {"host": "127.0.0.1.evil.example:8700"}}, 400),
    ("GET /", {"headers": {"host": "evil.example"}}, 400),
    ("GET /categories", {"headers": {"host": "[::1"}}, 400),
    ("POST /inspect/tile", {"headers": {"origin": "https://evil.example"}, "files": form(("a.png", png()))}, 403),
    ("POST /inspect/tile", {"headers": {"origin": "null"}, "files": form(("a.png", png()))}, 403),
    ("POST /feedback/tile?judged=good", {"headers": {"origin": "http://127.0.0.1:9999"}}, 403),
    ("POST /inspect/tile", {"headers": {"content-length": "999999999999"}, "content": b""}, 413),
    ("POST /inspect/tile", {"headers": {"content-length": "-1"}, "content": b""}, 400),
]


@pytest.mark.parametrize(
    ("line", "options", "status"), HOSTILE, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_hostile_request_is_refused_in_a_sentence(
    client: TestClient, line: str, options: dict[str, Any], status: int
) -> None:
    method, _, path = line.partition(" ")
    refused(client.request(method, path, **options), status)


def test_a_proxys_name_is_served_where_it_is_allowed(bench: Bench) -> None:
    made = TestClient(make_app(bench, token=None, hosts=("qa.example.com",)), HOST)
    named = {"host": "qa.example.com", "origin": "https://qa.example.com"}
    assert made.get("/categories", headers=named).status_code == 200
    refused(made.get("/categories", headers=named | {"origin": "https://evil.example"}), 403)


def test_every_answer_forbids_scripts_from_elsewhere(client: TestClient) -> None:
    for path in ("/", "/static/page.js", "/static/page.css", "/health", "/nowhere"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    assert client.get("/", headers={"authorization": ""}).text == (FILES / "page.html").read_text()


def test_the_page_makes_no_markup_of_what_it_is_told() -> None:
    script, page = (FILES / "page.js").read_text(), (FILES / "page.html").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)
    assert "style=" not in page and not re.search(r"\son\w+=", page), "the page's own policy forbids them"
    assert set(re.findall(r'\$\("([\w-]+)"\)', script)) <= set(re.findall(r'id="([\w-]+)"', page))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\parts\\a.png", "a.png"),
        ("a\r\nSet-Cookie: x\u202egnp.exe", "aSet-Cookie: xgnp.exe"),
        ("<img src=x onerror=alert(1)>", "<img src=x onerror=alert(1)>"),
        ("x" * 900, "x" * 200),
        ("\0/", "image 3"),
    ],
)
def test_a_file_name_is_shown_and_never_a_path(name: str, shown: str) -> None:
    assert shown_name(name, 3) == shown


def test_a_body_that_grows_beyond_its_word_or_comes_too_slowly_is_refused(bench: Bench) -> None:
    limits = Limits(request_bytes=1000, seconds=0.05)
    app = make_app(bench, token=None, limits=limits)
    kind = [(b"host", b"127.0.0.1"), (b"content-type", b"multipart/form-data; boundary=x")]

    async def status_of(*parts: bytes) -> tuple[int, bytes]:
        waiting = list(parts)
        sent: list[Any] = []

        async def receive() -> Any:
            if not waiting:
                await asyncio.sleep(10)
            return {"type": "http.request", "body": waiting.pop(0), "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/inspect/tile", "raw_path": b"/inspect/tile"}
        scope |= {"query_string": b"", "headers": kind, "client": ("127.0.0.1", 1), "http_version": "1.1"}
        await app({**scope, "scheme": "http", "server": ("127.0.0.1", 80), "root_path": ""}, receive, send)
        return sent[0]["status"], sent[1]["body"]

    start = b'--x\r\ncontent-disposition: form-data; name="images"; filename="a"\r\n\r\n'
    assert asyncio.run(status_of(start, b"y" * 2000))[0] == 413
    status, body = asyncio.run(status_of(start, b"y"))
    assert status == 408 and b"did not come in 0.05 seconds" in body


def test_who_asks_too_often_waits_and_others_do_not() -> None:
    now = 0.0
    limits = Limits(requests_per_minute=60, burst=2)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guard = Guard(app, token=None, limits=limits, clock=lambda: now)
    first = TestClient(guard, HOST, client=("10.0.0.1", 1))
    other = TestClient(guard, HOST, client=("10.0.0.2", 1))
    assert [first.get("/").status_code for _ in range(3)] == [204, 204, 429]
    assert other.get("/").status_code == 204
    now = 1.0
    assert [first.get("/").status_code for _ in range(2)] == [204, 429]


def test_a_failure_of_the_server_is_503_and_tells_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(questions: Any) -> Any:
        raise RuntimeError("secret /home/path")

    monkeypatch.setattr(bench, "inspect", broken)
    made = TestClient(make_app(bench, token=None), HOST, raise_server_exceptions=False)
    answer = made.post("/inspect/tile", files=form(("a.png", png())))
    assert "log says why" in refused(answer, 503) and "secret" not in answer.text


def test_metrics_count_requests_and_images(bench: Bench, photos: list[Path]) -> None:
    made = TestClient(make_app(bench, token=None), HOST)
    made.post("/inspect/tile", files=form(("a.png", photos[0].read_bytes()), ("b.png", b"x")))
    made.get('/nowhere/with"quotes')
    text = made.get("/metrics").text
    assert 'dskd_images_total{category="tile",verdict="unreadable"} 1' in text
    assert 'dskd_requests_total{route="/inspect/{category}",status="200"} 1' in text
    assert 'dskd_requests_total{route="other",status="404"} 1' in text
    assert "dskd_inspection_seconds_count 1" in text and 'le="+Inf"} 1' in text


def test_metrics_tell_drift_of_what_the_detector_of_today_saw() -> None:
    normals = tuple(np.random.default_rng(0).normal(5, 1, 40).tolist())
    category = Category('a"b', "v2", "", Threshold(0.05, 8.0, 40), (), normals)
    metrics = Metrics()
    for version, shift in (("v1", 1.5), ("v2", 0.0)):
        seen = np.random.default_rng(1).normal(5 + shift, 1, 30).tolist()
        rows = [{"verdict": "good", "score": score, "detector_version": version} for score in seen]
        metrics.count_inspection('a"b', rows, 0.3)
    text = metrics.text([category])
    assert float(re.findall(r'dskd_drift_p_value\{category="a\\"b"\} (\S+)', text)[0]) > 0.05
    drifted = metrics.text([category._replace(detector_version="v1")])
    assert float(re.findall(r'dskd_drift_p_value\{category="a\\"b"\} (\S+)', drifted)[0]) < 0.001
    assert 'dskd_inspection_seconds_bucket{le="0.25"} 0' in text and 'bucket{le="0.5"} 2' in text


def test_a_judged_photo_lies_in_quarantine_until_it_is_approved(
    detector_folder: Path, photos: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "tile"
    shutil.copytree(detector_folder, folder)
    before = (folder / "detector.json").read_bytes()
    bench = Bench([folder])
    with bench.working():
        made = TestClient(make_app(bench, token=None), HOST)
        content = photos[-1].read_bytes()
        for judged in ("defect", "good"):  # the last word holds
            answer = made.post(f"/feedback/tile?judged={judged}", files=form(("../../evil.png", content)))
            assert answer.status_code == 201 and answer.json()["kept"]["name"] == "evil.png"
        assert (folder / "detector.json").read_bytes() == before
        (entry,) = Quarantine.of(folder).entries()
        assert entry.judged == "good" and entry.path.read_bytes() == content and entry.path.suffix == ".png"
        (category,) = made.get("/categories").json()["categories"]
        accept(Detector.load(folder), folder, [entry])
        (changed,) = made.get("/categories").json()["categories"]
        assert changed["detector_version"] != category["detector_version"]
        assert len(changed["normal_scores"]) == len(category["normal_scores"]) + 1
        row = made.post("/inspect/tile", files=form(("a.png", content))).json()["predictions"][0]
        assert (
            row["threshold"] == changed["threshold"]["value"] and row["detector_version"] == changed["detector_version"]
        )


def test_the_real_server_answers_what_is_cut_off_lied_about_and_no_http_at_all(
    served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, SECRET)
    said: list[str] = []
    running: list[uvicorn.Server] = []
    server = threading.Thread(
        target=serve_page,
        args=([served],),
        kwargs={"port": 0, "device": "cpu", "say": said.append, "on_start": running.append},
    )
    server.start()
    try:
        while not (running and running[0].started):
            assert server.is_alive()
            time.sleep(0.01)
        assert SECRET not in said[0], "a token of one's own is never printed"
        port = int(said[0].partition("127.0.0.1:")[2].partition("/")[0])

        def answer(text: str, *, is_cut_off: bool = False) -> str:
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                connection.sendall(text.encode())
                return "" if is_cut_off else connection.recv(65536).decode()

        head = f"POST /inspect/tile HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {SECRET}\r\n"
        assert " 413 " in answer(f"{head}Content-Length: 999999999\r\n\r\n")
        assert " 400 " in answer("nonsense\r\n\r\n")
        assert answer(f"{head}Content-Type: {FORM}; boundary=x\r\nContent-Length: 99\r\n\r\n--x", is_cut_off=True) == ""
        assert " 200 OK" in answer(f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n")
        assert "server:" not in answer(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n").lower()
    finally:
        for each in running:
            each.should_exit = True
        server.join()


def test_two_detectors_of_one_category_are_not_served_together(served: Path) -> None:
    with pytest.raises(ValueError, match="both of the category 'tile'; serve one of them"):
        Bench([served, served])


def test_a_token_is_drawn_or_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert page_token() != page_token() and len(page_token()[0]) == 32 and not page_token()[1]
    monkeypatch.setenv(TOKEN, SECRET)
    assert page_token() == (SECRET, True)
    monkeypatch.setenv(TOKEN, "short")
    with pytest.raises(ValueError, match="at least 16 letters"):
        page_token()


def test_a_refusal_survives_the_way_between_processes() -> None:
    copy = pickle.loads(pickle.dumps(Refusal(422, "No image.", ["a"])))
    assert (copy.status, copy.sentence, copy.details) == (422, "No image.", ["a"])
