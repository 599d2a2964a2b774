"""A champion whose stored detector is gone or damaged comes back from what is left of its trial."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from mlflow.tracking import MlflowClient

from dskd.checkpoint import WEIGHTS_FILE, read_record
from dskd.config import RunConfig
from tune.storage.champions import Champion, download_detector, find_champion, note_run, save_champion
from tune.storage.files import Storage
from tune.study.repair import Trial, deliver_again, find_fault, readable_champion
from tune.trial.assignment import Evaluation, Training
from tune.trial.spec import TrialSpec

FIGURES = {"test/aupro": 0.25}


class Groups:
    """Worker groups that train by writing a detector, and evaluate to other figures than those that were known."""

    def __init__(self, detector: Path, trained: str) -> None:
        self._detector, self._trained, self.asked = detector, trained, list[Any]()

    def follow(self, assignment: Training | Evaluation) -> Iterator[dict[str, Any]]:
        self.asked.append(assignment)
        if isinstance(assignment, Evaluation):
            yield {"test/aupro": 0.5}
            return
        Storage(self._trained).upload(self._detector, "epoch-000002/detector")
        yield {"epoch": 2, "checkpoint_path": f"{self._trained}/epoch-000002"}

    def forget(self, assignment: object) -> None:
        pass


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "search"))


@pytest.fixture
def known(storage: Storage, detector_folder: Path, tmp_path: Path) -> Champion:
    """A delivered champion of `tile` with a run, from the checkpoint of trial t1."""
    storage.upload(detector_folder, "workers/tile/t1/epoch-000002/detector")
    uri = f"{storage.uri}/workers/tile/t1/epoch-000002/detector"
    champion, _ = save_champion(storage, "tile", "t1", uri, FIGURES, tmp_path / "first")
    note_run(storage, champion._replace(run_id="run"))
    found = find_champion(storage, "tile")
    assert found is not None
    return found


def trial(storage: Storage, tiny: RunConfig) -> Trial:
    spec = TrialSpec(
        config=tiny.to_dict(), data="data", category="tile", teacher_weights="random", cache_gb=1.0, num_workers=1,
        cpus_per_worker=1.0, gpus_per_worker=0.0, workers_uri=f"{storage.uri}/workers/tile", revision="",
    )  # fmt: skip
    return Trial("t1", f"{storage.uri}/workers/tile/t1/epoch-000002/detector", spec)


def damage(folder: Path, how: str) -> None:
    if how == "gone":
        shutil.rmtree(folder)
    elif how == "no weights":
        (folder / WEIGHTS_FILE).unlink()
    elif how == "cut short":
        (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:100])
    else:
        (folder / "detector.json").write_text("[]")


@pytest.mark.parametrize("how", ["gone", "no weights", "cut short", "another record"])
def test_a_damaged_champion_is_delivered_again_from_its_checkpoint(
    how: str, storage: Storage, known: Champion, tiny: RunConfig, detector_folder: Path, tmp_path: Path
) -> None:
    assert find_fault(storage, known) == ""
    damage(Path(storage.uri) / known.folder, how)
    fault = find_fault(storage, known)
    assert fault and "\n" not in fault
    groups = Groups(detector_folder, f"{storage.uri}/never")
    champion, source = deliver_again(storage, trial(storage, tiny), known, cast(Any, groups), "sqlite:///none.db")
    assert source == "its last checkpoint" and groups.asked == [], "the test images are looked at once"
    assert champion == known == find_champion(storage, "tile") and find_fault(storage, champion) == ""
    assert download_detector(storage, champion, tmp_path / "tile").metrics["test/aupro"] == FIGURES["test/aupro"]


def test_without_its_checkpoint_it_is_trained_again(
    storage: Storage, known: Champion, tiny: RunConfig, detector_folder: Path
) -> None:
    damage(Path(storage.uri) / known.folder, "gone")
    damage(Path(storage.uri) / "workers", "gone")
    groups = Groups(detector_folder, f"{storage.uri}/workers/tile/t1")
    asked = trial(storage, tiny)
    champion, source = deliver_again(storage, asked, known._replace(run_id=""), cast(Any, groups), "sqlite:///none.db")
    assert source == "a training from the beginning"
    assert [type(each) for each in groups.asked] == [Training, Evaluation]
    assert groups.asked[0] == Training(trial_id="t1", spec=asked.spec)
    assert find_fault(storage, champion) == "" and champion.metrics["test/aupro"] == 0.5


def test_a_training_that_fails_this_time_says_why(storage: Storage, known: Champion, tiny: RunConfig) -> None:
    damage(Path(storage.uri) / known.folder, "gone")
    damage(Path(storage.uri) / "workers", "gone")
    failing = SimpleNamespace(follow=lambda _: iter([{"epoch": 1, "error": "diverged"}]), forget=lambda _: None)
    with pytest.raises(OSError, match="training t1 again failed: diverged"):
        deliver_again(storage, trial(storage, tiny), known._replace(run_id=""), cast(Any, failing), "sqlite:///none.db")


@pytest.mark.parametrize("text", ["[]", "{", '{"category": "tile"}'])
def test_a_champion_s_record_that_cannot_be_read_is_written_anew(text: str, storage: Storage, known: Champion) -> None:
    (Path(storage.uri) / "champions/tile.json").write_text(text)
    said: list[str] = []
    assert readable_champion(storage, "tile", said.append) is None
    assert len(said) == 1 and said[0].startswith("tile: ") and "written anew" in said[0]


def test_without_its_checkpoint_it_comes_from_its_run_in_mlflow(
    storage: Storage, known: Champion, tiny: RunConfig, detector_folder: Path, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("spring", f"file://{tmp_path}/artifacts")).info.run_id
    client.log_artifacts(run_id, str(detector_folder), "model/artifacts/detector")
    damage(Path(storage.uri) / known.folder, "gone")
    damage(Path(storage.uri) / "workers", "gone")
    groups = Groups(detector_folder, f"{storage.uri}/never")
    champion, source = deliver_again(
        storage, trial(storage, tiny), known._replace(run_id=run_id), cast(Any, groups), uri
    )
    assert source == "its run in MLflow" and groups.asked == []
    assert find_fault(storage, champion) == "" and champion.metrics["test/aupro"] == FIGURES["test/aupro"]
    assert read_record(Path(storage.uri) / champion.folder).metrics == champion.metrics
