"""Registered models: served as they judge, fetched by alias, of today and of before they could be served."""

import base64
import io
import json
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.scoring_server import predictions_to_json
from mlflow.tracking import MlflowClient

from dskd.checkpoint import RECORD_FILE, WEIGHTS_FILE, read_record
from dskd.detector import Detector
from tune.jobs.pull import pull
from tune.settings.pull import PullSettings
from tune.tracking import registry
from tune.tracking.registry import find_registered, pack, registered_categories
from tune.tracking.tracker import Tracker

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def packed(detector_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "model"
    pack(detector_folder, folder)
    return folder


@pytest.fixture(scope="module")
def served(packed: Path) -> Any:  # mlflow.pyfunc.PyFuncModel, whose types are incomplete
    return mlflow.pyfunc.load_model(str(packed))


def rows(*contents: bytes) -> pd.DataFrame:
    return pd.DataFrame({"image": [base64.b64encode(content).decode() for content in contents]})


def predictions_text(found: pd.DataFrame) -> str:
    """What MLflow's scoring server sends."""
    text = io.StringIO()
    predictions_to_json(found, text)
    return text.getvalue()


def test_a_served_detector_says_what_the_detector_says(served: Any, detector_folder: Path, mvtec_root: Path) -> None:
    paths = sorted((mvtec_root / "tile/test").rglob("*.png"))
    detector = Detector.load(detector_folder)
    for rate in (0.01, 0.5):
        threshold = detector.threshold(rate).value
        expected = list(detector.predict(paths, threshold))
        found = served.predict(rows(*(path.read_bytes() for path in paths)), params={"false_alarm_rate": rate})
        assert found["score"].tolist() == [each.score for each in expected]
        assert found["threshold"].tolist() == [threshold] * len(paths)
        assert found["is_anomalous"].tolist() == [each.is_anomalous for each in expected]
        assert found["regions"].tolist() == [[region.to_dict() for region in each.regions] for each in expected]
    signature = served.metadata.signature
    assert signature is not None and signature.outputs.input_names() == list(found.columns)
    answer = json.loads(predictions_text(found))["predictions"]
    assert [row["regions"] for row in answer] == found["regions"].tolist() and answer[0]["overlay"] is None


def bomb() -> bytes:
    """A PNG whose header promises 30000 x 30000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (base64.b64encode(bomb()).decode(), "row 1 is refused as a decompression bomb"),
        (base64.b64encode(b"garbage").decode(), "row 1 is not a readable image"),
        ("../../etc/passwd", "row 1 is not base64 text"),
        ("", "row 1 is empty"),
    ],
)
def test_what_is_no_image_is_a_row_that_says_why_and_alone_a_refusal(
    served: Any, mvtec_root: Path, second: str, message: str
) -> None:
    good = next((mvtec_root / "tile/test").rglob("*.png")).read_bytes()
    bad = pd.DataFrame({"image": [second]})
    found = served.predict(pd.concat([rows(good), bad, rows(good)], ignore_index=True))
    assert found["verdict"].tolist()[1] == "unreadable" and found["error"].tolist()[1].startswith(message)
    assert found["verdict"].tolist()[0] == found["verdict"].tolist()[2] != "unreadable"
    assert found["image"].tolist() == ["row 0", "row 1", "row 2"]
    text = predictions_text(found)
    assert "NaN" not in text and json.loads(text)["predictions"][1]["score"] is None and "dskd-" not in text
    with pytest.raises(MlflowException, match=message.replace("row 1", "row 0")) as raised:
        served.predict(bad)
    assert raised.value.get_http_status_code() == 400 and "dskd-" not in str(raised.value)


FORMS: list[Callable[[bytes], str]] = [
    lambda image: base64.b64encode(image).decode(),
    lambda image: base64.encodebytes(image).decode(),  # a line break after 76 letters
    lambda image: base64.encodebytes(image).decode().replace("\n", "\r\n"),
    lambda image: base64.urlsafe_b64encode(image).decode(),
    lambda image: base64.urlsafe_b64encode(image).decode().rstrip("="),
    lambda image: f"data:image/png;base64,{base64.b64encode(image).decode()}",
    lambda image: f"DATA:image/png;name=a.png;base64,{base64.urlsafe_b64encode(image).decode()}",
    lambda image: f"  data:;base64,\n{base64.encodebytes(image).decode()}",
]


def test_an_image_may_be_sent_in_every_usual_form_of_base64(served: Any, mvtec_root: Path) -> None:
    image = (mvtec_root / "tile/test/scratch/000.png").read_bytes()
    # Three lengths, so that there are none, one and two signs of padding; what follows an image's end is not read.
    images = [image + b"\xff" * more for more in range(3)]
    assert any(set("+/") & set(base64.b64encode(each).decode()) for each in images)
    texts = [form(each) for form in FORMS for each in images]
    found = served.predict(pd.DataFrame({"image": texts}))
    assert set(found["error"]) == {None} and len(set(found["score"])) == 1, "all are the same image"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "row 0 is empty: expected an image as base64 text"),
        (" \n ", "row 0 is empty"),
        ("data:image/png;base64,", "row 0 is empty"),
        ("data:image/png,abc", "row 0 is a data URI without ;base64"),
        ("data:image/png", "row 0 is a data URI without ;base64"),
        ("%%%", "row 0 is not base64 text"),
        ("https://host/a.png", "row 0 is not base64 text"),
        ("a", "row 0 is not base64 text"),
    ],
)
def test_what_is_no_base64_says_what_it_is(text: str, reason: str, served: Any) -> None:
    with pytest.raises(MlflowException, match=re.escape(reason)):
        served.predict(pd.DataFrame({"image": [text]}))


@pytest.mark.parametrize("rate", [7, 1, 0, -0.1, float("nan"), float("inf")])
def test_a_rate_outside_of_its_range_is_refused(rate: float, served: Any, mvtec_root: Path) -> None:
    image = (mvtec_root / "tile/test/scratch/000.png").read_bytes()
    with pytest.raises(MlflowException, match=re.escape("false_alarm_rate must lie in (0, 1), got")) as raised:
        served.predict(rows(image), params={"false_alarm_rate": rate})
    assert raised.value.get_http_status_code() == 400


def test_an_unknown_parameter_is_refused_though_mlflow_would_leave_it_out(served: Any, mvtec_root: Path) -> None:
    image = (mvtec_root / "tile/test/scratch/000.png").read_bytes()
    with pytest.raises(
        MlflowException, match="unknown parameters 'false_alarm'; there is one: false_alarm_rate"
    ) as got:
        served.predict(rows(image), params={"false_alarm": 0.5, "false_alarm_rate": 0.5})
    assert got.value.get_http_status_code() == 400
    with pytest.raises(MlflowException, match="unknown parameters 'rate'"):
        served.unwrap_python_model().predict(None, rows(image), {"rate": 0.5})


def test_the_packed_model_has_code_weights_and_pinned_requirements_and_no_pickle(packed: Path) -> None:
    files = {str(path.relative_to(packed)) for path in packed.rglob("*") if path.is_file()}
    assert {"served_model.py", "code/dskd/detector.py", f"artifacts/detector/{WEIGHTS_FILE}"} <= files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pt", ".pth"))]
    required = (packed / "requirements.txt").read_text().split()
    assert all("==" in line and "+" not in line and "/" not in line for line in required)


def test_what_serving_requires_is_what_the_library_requires_without_command_line_and_training() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {line.partition(">")[0] for line in project["dependencies"]}
    assert set(registry.SERVING) == needed - {"tomli-w", "tyro", "scikit-learn"}, "it cuts training images into folds"


@pytest.fixture(scope="module")
def store(detector_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, MlflowClient]]:
    """An MLflow with the champions of `tile` (packed) and `old` (a plain folder, as searches once registered it)."""
    home = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{home}/mlflow.db"
    tracker = Tracker(
        uri, "spring", artifact_location=f"file://{home}/artifacts", tags={}, unsent=home / "unsent.jsonl"
    )
    metrics = read_record(detector_folder).metrics
    done = tracker.register_champion("tile", "t7", detector_folder, metrics, "images", 60)
    tracker.close(60)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.log_artifacts(done.run_id, str(detector_folder), "detector")
    client.create_registered_model("dskd-old")
    source = f"{client.get_run(done.run_id).info.artifact_uri}/detector"
    version = client.create_model_version("dskd-old", source, done.run_id)
    client.set_registered_model_alias("dskd-old", "champion", version.version)
    yield uri, client


def test_registered_detectors_are_pulled_by_alias(
    store: tuple[str, MlflowClient], detector_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, client = store
    assert registered_categories(client, "champion") == ("old", "tile")
    pull(PullSettings(categories=("all",), out=tmp_path / "out", alias="champion", tracking_uri=uri, json=True))
    documents = {each["category"]: each for each in json.loads(capsys.readouterr().out)["detectors"]}
    assert {name: each["trial"] for name, each in documents.items()} == {"old": "", "tile": "t7"}
    for name in ("old", "tile"):
        for file in (RECORD_FILE, WEIGHTS_FILE):
            assert (tmp_path / "out" / name / file).read_bytes() == (detector_folder / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["old", "tile"]
    shutil.rmtree(tmp_path / "out/old")
    pull(PullSettings(categories=("old",), out=tmp_path / "out", alias="champion", tracking_uri=uri))
    assert read_record(tmp_path / "out/old").category == "tile"


def test_an_alias_that_nobody_has_names_those_who_have_it(store: tuple[str, MlflowClient], tmp_path: Path) -> None:
    uri, client = store
    for category, alias, known in (("wood", "champion", "old, tile"), ("tile", "oracle", "none")):
        with pytest.raises(ValueError, match=f"alias '{alias}'; with it there are: {known}"):
            find_registered(client, category, alias)
    with pytest.raises(ValueError, match=r"no model of .* has the alias 'oracle'"):
        pull(PullSettings(categories=(), out=tmp_path, alias="oracle", tracking_uri=uri))


def test_a_damaged_registered_detector_is_not_downloaded(
    store: tuple[str, MlflowClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, _ = store
    download = MlflowClient.download_artifacts

    def damaged(self: MlflowClient, run: str, path: str, dst: Any = None) -> str:
        local = download(self, run, path, dst)
        if path.endswith(WEIGHTS_FILE):
            content = bytearray(Path(local).read_bytes())
            content[-1] ^= 1
            Path(local).write_bytes(content)
        return local

    monkeypatch.setattr(MlflowClient, "download_artifacts", damaged)
    assert pull(PullSettings(categories=("tile",), out=tmp_path / "out", alias="champion", tracking_uri=uri)) == 1
    assert "was changed or cut short" in capsys.readouterr().err
    assert list((tmp_path / "out").glob("*")) == []
