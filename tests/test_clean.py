"""What is removed of a search's storage, and what is not."""

from pathlib import Path
from typing import Any

import pytest

from tune.jobs.clean import clean, leftovers
from tune.settings.clean import CleanSettings
from tune.storage import lease
from tune.storage.files import Storage
from tune.storage.lease import only_search
from tune.study.records import TrialRecord, TrialRecords
from tune.trial.checkpoints import keep_checkpoint, newest_checkpoint


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A search with a trial of each kind."""
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.01)
    storage, made = Storage(f"{tmp_path}/results/parts"), tmp_path / "made"
    made.mkdir()
    (made / "training.pt").write_bytes(b"0" * 1000)
    records = TrialRecords(storage, "tile")
    for order, (name, status) in enumerate({"a1": "finished", "b2": "pruned", "c3": "failed", "d4": None}.items(), 1):
        record = TrialRecord(
            trial_id=name, order=order, number=order, suggested={}, distributions={}, is_enqueued=False
        )  # fmt: skip
        records.put(record)
        if status is not None:
            records.end(name, status, {})  # type: ignore[arg-type]
        keep_checkpoint(f"{storage.uri}/workers/tile", name, 3, made, generation=1)
    keep_checkpoint(f"{storage.uri}/workers/tile", "a1-fold-1", 3, made, generation=1)
    keep_checkpoint(f"{storage.uri}/workers/tile", "e5", 3, made, generation=1)  # killed before it was recorded
    storage.upload(made, "workers/tile/d4/lease-000001/epoch-000009")  # killed before it wrote the index
    storage.upload(made, ".reach-1234")
    for name in ("champions/tile/a1", "champions/tile/a1-lease-000002"):
        storage.upload(made, name)
    champion: dict[str, Any] = {
        "category": "tile",
        "trial_id": "a1",
        "folder": "champions/tile/a1-lease-000002",
        "metrics": {},
    }
    storage.write_json("champions/tile.json", champion | {"run_id": ""})
    storage.write_json("champions/broken.json", {})
    return storage


REMOVED = [
    "workers/tile/b2", "workers/tile/c3", "workers/tile/d4/lease-000001/epoch-000009", "workers/tile/e5",
    "champions/tile/a1", ".reach-1234",
]  # fmt: skip


def test_a_dry_run_lists_what_nobody_needs_with_its_size_and_leaves_it(
    storage: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = storage.files("")
    assert clean(CleanSettings(name="parts", storage=f"{tmp_path}/results")) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said[:-1]] == REMOVED
    assert "of a trial that was pruned" in said[0] and "replaced by a newer checkpoint" in said[2]
    assert said[-1] == "6 folders, 0.0 MB: would be removed; --delete does so"
    assert storage.files("") == before


def test_deleting_leaves_what_the_search_goes_on_with(storage: Storage, tmp_path: Path) -> None:
    assert clean(CleanSettings(name="parts", storage=f"{tmp_path}/results", delete=True)) == 0
    assert leftovers(storage) == []
    for name in ("a1", "d4", "a1-fold-1"):
        assert newest_checkpoint(f"{storage.uri}/workers/tile", name).endswith("epoch-000003")
    assert storage.names("champions/tile") == ["a1-lease-000002"]
    assert {"champions", "trials", "workers", "lease.json", ".lock"} == set(storage.names(""))


def test_nothing_is_deleted_while_the_search_runs(storage: Storage, tmp_path: Path) -> None:
    before = storage.names("workers/tile")
    with only_search(storage, "parts", print), pytest.raises(ValueError, match="a search 'parts' runs already"):
        clean(CleanSettings(name="parts", storage=f"{tmp_path}/results", delete=True))
    assert storage.names("workers/tile") == before
