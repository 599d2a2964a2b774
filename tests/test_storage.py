import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

from dskd.checkpoint import RECORD_FILE, WEIGHTS_FILE, BrokenDetector, read_record, rewrite_record
from tune import storage as module
from tune.champions import Champion, champion_categories, crown, deliver, find_champion, note_run
from tune.storage import Storage, StorageError, open_search


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSES", (0.0, 0.0))


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "store"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_comes_back_as_it_went(store: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep/er").mkdir(parents=True)
    (source / "a.bin").write_bytes(bytes(range(256)) * 100)
    (source / "deep/er/empty").write_bytes(b"")
    (source / "deep/with space ü.txt").write_text("x")
    store.upload(source, "trials/one")
    store.download("trials/one", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)
    assert store.names("trials") == ["one"]
    assert sorted(store.names("trials/one")) == ["a.bin", "deep"]
    assert store.names("nothing/here") == []


def test_an_address_may_hold_spaces(tmp_path: Path) -> None:
    spaced = Storage(str(tmp_path / "my results"))
    spaced.probe()
    spaced.write_json("a.json", {"x": 1})
    assert json.loads((tmp_path / "my results/a.json").read_text()) == {"x": 1}


def test_documents_are_replaced_whole(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.read_json("deep/a.json") is None
    store.write_json("deep/a.json", {"x": 1})
    store.write_json("deep/a.json", {"x": [2, "ü"]})
    assert store.read_json("deep/a.json") == {"x": [2, "ü"]}
    assert store.names("deep") == ["a.json"]

    def cut(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:3])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", cut)
    with pytest.raises(StorageError, match=r"writing deep/a\.json .* failed 3 times: disk full"):
        store.write_json("deep/a.json", {"x": 3})
    assert store.read_json("deep/a.json") == {"x": [2, "ü"]}


def test_what_fails_now_and_then_is_tried_again(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_json("a.json", {"x": 1})
    outages = [OSError("away"), OSError("still away")]
    replace = os.replace

    def unsteady(source: Any, target: Any) -> None:
        if outages:
            raise outages.pop()
        replace(source, target)

    monkeypatch.setattr(os, "replace", unsteady)
    store.write_json("a.json", {"x": 2})
    assert outages == [] and store.read_json("a.json") == {"x": 2}


def test_nothing_to_download_is_an_error(store: Storage, tmp_path: Path) -> None:
    (tmp_path / "store/empty").mkdir()
    for name, message in (("empty", "empty is empty"), ("absent", "downloading absent")):
        with pytest.raises(StorageError, match=message):
            store.download(name, tmp_path / "back")


class Hostile:
    """A file system that lists a name which leads out of the folder asked for."""

    def get_file_info(self, selector: pyarrow.fs.FileSelector) -> list[pyarrow.fs.FileInfo]:
        return [pyarrow.fs.FileInfo(f"{selector.base_dir}/../../stolen", pyarrow.fs.FileType.File, size=4)]

    def open_input_stream(self, path: str) -> Any:
        raise AssertionError(f"{path} must not be opened")


def test_a_name_that_leaves_the_folder_is_refused(
    store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_files", Hostile())
    with pytest.raises(StorageError, match=r"unsafe name \.\./\.\./stolen"):
        store.download("trials/one", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_usable_storage_is_probed_without_a_trace(store: Storage, tmp_path: Path) -> None:
    store.probe()
    assert list((tmp_path / "store").iterdir()) == []


def test_an_unusable_storage_is_one_line(store: Storage, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="store is not usable: ") as gone:
        store.probe()
    with pytest.raises(StorageError, match="--storage nope://bucket cannot be opened: ") as foreign:
        Storage("nope://bucket")
    with pytest.raises(StorageError, match="file cannot be opened: ") as occupied:
        Storage(str(tmp_path / "file"))
    for raised in (gone, foreign, occupied):
        assert "\n" not in str(raised.value)


def test_only_an_existing_search_is_opened(store: Storage, tmp_path: Path) -> None:
    store.write_json("spring/a.json", {})
    assert open_search(str(tmp_path / "store"), "spring").names(".") == ["a.json"]
    with pytest.raises(StorageError, match=r"no search 'sprnig' in .*; check --name and --storage"):
        open_search(str(tmp_path / "store"), "sprnig")
    assert store.names(".") == ["spring"]


@pytest.fixture
def crowned(store: Storage, detector_folder: Path, tmp_path: Path) -> Champion:
    """The champion of `tile`, from a trial's folder as Ray would leave it."""
    store.upload(detector_folder, "trials/t7/checkpoint/detector")
    champion, record = crown(
        store, "tile", "t7", f"{store.uri}/trials/t7/checkpoint/detector", {"test/aupro": 0.25}, tmp_path / "local"
    )
    assert record == read_record(tmp_path / "local")
    return champion


def test_a_champion_is_kept_with_its_test_figures_and_delivered(
    store: Storage, crowned: Champion, detector_folder: Path, tmp_path: Path
) -> None:
    assert find_champion(store, "tile") == crowned
    assert find_champion(store, "wood") is None
    assert champion_categories(store) == ("tile",)
    note_run(store, crowned._replace(run_id="run1"))
    found = find_champion(store, "tile")
    assert found is not None and found.run_id == "run1"
    record = deliver(store, found, tmp_path / "out/tile")
    assert record == read_record(tmp_path / "out/tile")
    assert record.metrics == {**read_record(detector_folder).metrics, "test/aupro": 0.25} == dict(crowned.metrics)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tile"]


def damage_weights(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[-5] ^= 255
    (folder / WEIGHTS_FILE).write_bytes(content)


def cut_record(folder: Path) -> None:
    (folder / RECORD_FILE).write_bytes((folder / RECORD_FILE).read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (damage_weights, BrokenDetector),
        (cut_record, BrokenDetector),
        (lambda folder: (folder / WEIGHTS_FILE).unlink(), BrokenDetector),
        (shutil.rmtree, StorageError),
    ],
)
@pytest.mark.parametrize("has_older", [False, True])
def test_a_damaged_champion_is_refused_and_leaves_what_was_there(
    store: Storage, crowned: Champion, detector_folder: Path, tmp_path: Path, damage: Any, error: Any, has_older: bool
) -> None:
    damage(tmp_path / "store" / crowned.folder)
    target = tmp_path / "out/tile"
    if has_older:
        shutil.copytree(detector_folder, target)
    with pytest.raises(error):
        deliver(store, crowned, target)
    assert [path.name for path in target.parent.iterdir()] == (["tile"] if has_older else [])
    assert not has_older or contents(target) == contents(detector_folder)


def test_delivery_replaces_an_older_detector_and_nothing_else(
    store: Storage, crowned: Champion, detector_folder: Path, tmp_path: Path
) -> None:
    older = tmp_path / "out/tile"
    shutil.copytree(detector_folder, older)
    rewrite_record(older, dataclasses.replace(read_record(older), epoch=99))
    assert deliver(store, crowned, older).epoch != 99
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.png").write_text("precious")
    with pytest.raises(ValueError, match="photos"):
        deliver(store, crowned, tmp_path / "photos")
    assert (tmp_path / "photos/holiday.png").read_text() == "precious"


@pytest.mark.parametrize("folder", ["champions/../../etc", "/etc", "elsewhere/tile"])
def test_a_champion_that_points_elsewhere_is_refused(store: Storage, crowned: Champion, folder: str) -> None:
    store.write_json("champions/tile.json", {**crowned._asdict(), "folder": folder})
    with pytest.raises(StorageError, match="unsafe folder"):
        find_champion(store, "tile")


def test_a_champion_record_that_lacks_a_field_is_refused(store: Storage, crowned: Champion) -> None:
    store.write_json("champions/tile.json", {"category": "tile"})
    with pytest.raises(StorageError, match=r"tile\.json lacks 'trial_id'"):
        find_champion(store, "tile")
