"""Servers that ask who one is, and credentials that must not be repeated."""

import importlib.util
import secrets
from pathlib import Path
from typing import Any

import pytest
import requests
import services

from tune.preflight.checks import check_inputs
from tune.preflight.draft import drafted
from tune.settings.search import SearchSettings
from tune.tracking.client import check_may_write, check_server
from tune.tracking.events import EpochDone, TrialEnded, TrialStarted
from tune.tracking.tracker import Tracker


def settings(data: Path, storage: Path, **more: Any) -> SearchSettings:
    return SearchSettings(data=str(data), storage=str(storage), teacher_weights="random", image_size=32, **more)


def test_a_server_that_is_away_is_named_without_its_password(mvtec_root: Path, tmp_path: Path) -> None:
    canary = secrets.token_hex(8)
    studies = f"postgresql+psycopg2://dskd:{canary}@127.0.0.1:1/optuna"
    mlflow = f"http://dskd:{canary}@127.0.0.1:1"
    with drafted(settings(mvtec_root, tmp_path, study_storage=studies, tracking_uri=mlflow)) as draft:
        studies_fault, tracking_fault = sorted(check_inputs(draft).errors)
    assert studies_fault.startswith("--study-storage postgresql")
    assert tracking_fault.startswith("MLflow at http://127.0.0.1:1 does not answer")
    assert canary not in studies_fault + tracking_fault
    assert canary not in repr(settings(mvtec_root, tmp_path, study_storage=studies))


@pytest.mark.services
def test_a_tracking_server_with_users_takes_a_search_that_says_who_it_is_and_may_write(
    detector_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may only read is told so before the search; where the right is taken away later, the events are kept."""
    reason = services.mlflow_unavailable()
    if reason is None and importlib.util.find_spec("flask_wtf") is None:
        reason = "MLflow's basic-auth app is not installed: pip install 'mlflow[auth]'"
    if reason:
        pytest.skip(reason)
    password = secrets.token_hex(12)
    with services.mlflow_server(
        tmp_path, backend_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_root=str(tmp_path / "artifacts"),
        admin_password=password,
    ) as uri:  # fmt: skip
        for user, secret in ((None, None), ("admin", secrets.token_hex(12))):
            if user and secret:
                monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
                monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", secret)
            with pytest.raises(ConnectionError, match="MLflow at http://127") as refused:
                check_server(uri)
            assert "\n" not in str(refused.value) and (secret is None or secret not in str(refused.value))
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        check_server(uri)
        unsent = tmp_path / "unsent.jsonl"
        tracker = Tracker(uri, "parts", artifact_location=None, tags={}, unsent=unsent)
        tracker.put(TrialStarted("bolt", "one", {"learning_rate": 0.1}))
        tracker.put(EpochDone("bolt", "one", 1, {"val/best_objective": 0.5}, 1))
        tracker.put(TrialEnded("bolt", "one", "finished", ""))
        done = tracker.register_champion("bolt", "one", detector_folder, {"val/objective": 0.5}, "data", patience=60)
        assert tracker.close(60) == 0 and done.is_champion

        known = {"username": "ann", "password": secrets.token_hex(12)}
        made = requests.post(f"{uri}/api/2.0/mlflow/users/create", json=known, auth=("admin", password), timeout=60)
        assert made.status_code == 200, made.text
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", known["password"])
        check_server(uri)
        check_may_write(uri, "another", [])
        for experiment, model in (("parts", "dskd-none"), ("another", "dskd-bolt")):
            with pytest.raises(ConnectionError, match=r"does not let this search write: .*Permission denied") as denied:
                check_may_write(uri, experiment, [model])
            assert "\n" not in str(denied.value)
        reader = Tracker(uri, "parts", artifact_location=None, tags={}, unsent=unsent)
        reader.put(TrialStarted("bolt", "two", {}))
        reader.put(TrialEnded("bolt", "two", "finished", ""))
        assert reader.close(60) == 2 and "Permission denied" in reader.trouble and unsent.exists()
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        assert Tracker(uri, "parts", artifact_location=None, tags={}, unsent=unsent).close(60) == 0
        assert not unsent.exists()
