"""Which version of a detector is champion, since when, by which search and why; and the way back."""

import json
import re
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from dskd.checkpoint import read_record
from tune.jobs.pull import pull
from tune.jobs.versions import versions
from tune.settings.pull import PullSettings
from tune.settings.versions import VersionsSettings
from tune.tracking.registry import REASON
from tune.tracking.tracker import Tracker
from tune.tracking.versions import detector_versions


@pytest.fixture(scope="module")
def uri(detector_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow where two searches have registered a detector of `tile`, the second a better one."""
    home = tmp_path_factory.mktemp("mlflow")
    address = f"sqlite:///{home}/mlflow.db"
    for search, objective in (("parts", 0.5), ("parts-2", 0.75)):
        tracker = Tracker(
            address, search, artifact_location=f"file://{home}/artifacts", tags={"dskd.search": search},
            unsent=home / "unsent.jsonl",
        )  # fmt: skip
        tracker.register_champion("tile", f"of-{search}", detector_folder, {"val/objective": objective}, "images", 60,
                                  detector_version=f"v-of-{search}")  # fmt: skip
        tracker.close(60)
    return address


def client_of(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def test_an_alias_goes_back_with_a_reason_that_is_kept(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newer, older = detector_versions(client_of(uri), "tile")
    assert (newer.version, newer.is_champion, newer.search, newer.objective) == (2, True, "parts-2", 0.75)
    assert newer.detector_version == "v-of-parts-2"
    assert newer.reason == "validation 0.7500, version 1 had 0.5000 on the same data" and newer.until == ""
    assert (older.version, older.is_champion, older.search, older.trial_id) == (1, False, "parts", "of-parts")
    assert older.reason == "the first of its category"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", newer.since) and older.until == newer.since

    asked = VersionsSettings(category="tile", champion=1, reason="misses rust on line 3", tracking_uri=uri, json=True)
    assert versions(asked) == 0
    said = capsys.readouterr()
    told = {each["version"]: each for each in json.loads(said.out)["versions"]}
    assert told[1]["is_champion"] and told[1]["reason"] == "misses rust on line 3" and told[1]["until"] == ""
    assert not told[2]["is_champion"] and told[2]["until"] == told[1]["since"]
    assert "misses rust on line 3" in said.err and "pull.py tile --version 2" in said.err
    assert client_of(uri).get_model_version_by_alias("dskd-tile", "champion").tags[REASON] == "misses rust on line 3"

    pull(PullSettings(categories=("tile",), out=tmp_path, version=2, tracking_uri=uri, json=True))
    (detector,) = json.loads(capsys.readouterr().out)["detectors"]
    assert (detector["version"], detector["trial"]) == ("2", "of-parts-2")
    assert read_record(tmp_path / "tile").category == "tile"


def test_what_is_not_there_is_said_with_what_is(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dskd-tile has no version 9; there are: 1, 2"):
        versions(VersionsSettings(category="tile", champion=9, reason="r", tracking_uri=uri))
    champion = next(each.version for each in detector_versions(client_of(uri), "tile") if each.is_champion)
    with pytest.raises(ValueError, match=f"version {champion} of dskd-tile is the champion already"):
        versions(VersionsSettings(category="tile", champion=champion, reason="r", tracking_uri=uri))
    with pytest.raises(ValueError, match="no registered model dskd-wood"):
        versions(VersionsSettings(category="wood", tracking_uri=uri))
    with pytest.raises(ValueError, match=r"no version 9 of the model dskd-tile; there are: 1, 2"):
        pull(PullSettings(categories=("tile",), out=tmp_path, version=9, tracking_uri=uri))
    with pytest.raises(ValueError, match="needs --tracking-uri"):
        versions(VersionsSettings(category="tile", storage=str(tmp_path)))


def test_flags_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="--champion needs --reason"):
        VersionsSettings(category="tile", champion=1)
    with pytest.raises(ValueError, match="--reason is of use with --champion"):
        VersionsSettings(category="tile", reason="because")
    for categories, alias in ((("all",), None), (("tile", "wood"), None), (("tile",), "champion")):
        with pytest.raises(ValueError, match="--version takes one category, and no --alias"):
            PullSettings(categories=categories, out=Path("out"), version=1, alias=alias)
