import dataclasses
import datetime
import errno
import ipaddress
import json
import os
import pickle
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.fs
import pytest
import services
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dskd.checkpoint import PREVIEW_FILE, RECORD_FILE, WEIGHTS_FILE, BrokenDetectorError, read_record, rewrite_record
from tune.jobs.pull import pull
from tune.settings.pull import PullSettings
from tune.storage import files as module
from tune.storage.champions import (
    Champion,
    champion_categories,
    download_detector,
    download_detector_files,
    find_best,
    find_champion,
    note_best,
    note_run,
    replaced_champions,
    save_champion,
    store_champion,
)
from tune.storage.files import Storage, StorageError, open_search
from tune.storage.lease import LeaseLostError


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_PAUSE", 0.0)
    monkeypatch.setattr(module, "RETRY_ATTEMPTS", 3)


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


def test_what_several_write_at_once_is_lost_by_none(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_PAUSE", 0.001)
    monkeypatch.setattr(module, "RETRY_ATTEMPTS", 12)

    def count(known: dict[str, Any] | None) -> dict[str, Any]:
        return {"count": (known or {}).get("count", 0) + 1}

    threads = [threading.Thread(target=store.replace_json, args=("deep/a.json", count)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read_json("deep/a.json") == {"count": 4}
    store.replace_json("deep/a.json", lambda known: None)
    assert store.read_json("deep/a.json") == {"count": 4}, "None leaves it"
    store.write("deep/a.json", b"[")
    store.replace_json("deep/a.json", count)
    assert store.read_json("deep/a.json") == {"count": 1}, "what cannot be read counts as missing"


def test_a_writer_that_stands_still_is_not_waited_for_for_ever(store: Storage) -> None:
    def blocked(known: object) -> None:
        with pytest.raises(StorageError, match=r"writing a.json at .* failed 3 times: .*unavailable"):
            store.replace_json("a.json", lambda known: {"x": 1})

    store.replace_json("a.json", blocked)
    assert store.read_json("a.json") is None


def test_a_lock_goes_back_though_a_program_that_is_being_started_holds_a_copy_of_its_file(store: Storage) -> None:
    copies: list[int] = []

    def starting(known: object) -> dict[str, Any]:
        """What a fork in another thread does at this moment."""
        locks = [int(fd) for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == lock]
        copies.extend(os.dup(fd) for fd in locks)
        return {"x": 1}

    lock = os.path.realpath(store.uri + "/.lock")
    try:
        store.tried_once().replace_json("a.json", starting)
        store.tried_once().replace_json("a.json", lambda known: {"x": 2})
    finally:
        for copy in copies:
            os.close(copy)
    assert copies and store.read_json("a.json") == {"x": 2}


def test_a_file_system_without_locks_is_written_to_all_the_same(
    store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    store.replace_json("a.json", lambda known: {"x": 1})
    assert store.read_json("a.json") == {"x": 1}


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
def champion(store: Storage, detector_folder: Path, tmp_path: Path) -> Champion:
    """The champion of `tile`, from a trial's folder as Ray would leave it."""
    store.upload(detector_folder, "trials/t7/checkpoint/detector")
    champion, record = save_champion(
        store, "tile", "t7", f"{store.uri}/trials/t7/checkpoint/detector", {"test/aupro": 0.25}, tmp_path / "local"
    )
    assert record == read_record(tmp_path / "local")
    return champion


def test_a_champion_is_kept_with_its_test_figures_and_downloaded(
    store: Storage, champion: Champion, detector_folder: Path, tmp_path: Path
) -> None:
    assert find_champion(store, "tile") == champion
    assert find_champion(store, "wood") is None
    assert champion_categories(store) == ("tile",)
    note_run(store, champion._replace(run_id="run1"))
    found = find_champion(store, "tile")
    assert found is not None and found.run_id == "run1"
    record = download_detector(store, found, tmp_path / "out/tile")
    assert record == read_record(tmp_path / "out/tile")
    assert record.metrics == {**read_record(detector_folder).metrics, "test/aupro": 0.25} == dict(champion.metrics)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tile"]


def test_a_driver_that_has_lost_its_lease_writes_no_champion(
    store: Storage, detector_folder: Path, tmp_path: Path
) -> None:
    """Neither over the record nor over the files of the one that has it now."""

    def save(trial: str, generation: int) -> Champion:
        local = Path(shutil.copytree(detector_folder, tmp_path / f"{trial}-{generation}"))
        return store_champion(store, "tile", trial, local, {}, generation=generation)[0]

    first = save("t1", 1)
    store.write_json("lease.json", {"owner": "newer", "generation": 2})
    assert note_best(store, "tile", "t2", 0.7, f"{store.uri}/workers/tile/t2/lease-000002/detector", 2)
    newer = save("t1", 2)
    assert newer.folder != first.folder and store.names(first.folder) == store.names(newer.folder)
    assert replaced_champions(store, "tile") == [first.folder]
    for write in (
        lambda: save("t3", 1),
        lambda: note_run(store, first),
        lambda: note_best(store, "tile", "t4", 0.9, f"{store.uri}/workers/tile/t4/detector", 1),
    ):
        with pytest.raises(LeaseLostError, match="another search has written the champion of 'tile'; this one ends"):
            write()
    assert find_champion(store, "tile") == newer
    store.write_json("lease.json", {"owner": "restored", "generation": 1})
    assert save("t5", 1) == find_champion(store, "tile"), "a folder restored without its lease begins to count anew"


def test_the_best_so_far_follows_a_trial_that_was_ended_under_a_newer_lease(store: Storage) -> None:
    before, after = (f"{store.uri}/workers/tile/t1/lease-00000{number}/detector" for number in (1, 2))
    assert note_best(store, "tile", "t1", 0.7, before, 1) and not note_best(store, "tile", "t1", 0.7, before, 1)
    assert not note_best(store, "tile", "t2", 0.7, after, 2), "another that is as good changes nothing"
    assert note_best(store, "tile", "t1", 0.7, after, 2)
    found = find_best(store, "tile")
    assert found is not None and f"{store.uri}/{found.folder}" == after


def damage_weights(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[-5] ^= 255
    (folder / WEIGHTS_FILE).write_bytes(content)


def cut_record(folder: Path) -> None:
    (folder / RECORD_FILE).write_bytes((folder / RECORD_FILE).read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (damage_weights, BrokenDetectorError),
        (cut_record, BrokenDetectorError),
        (lambda folder: (folder / WEIGHTS_FILE).unlink(), BrokenDetectorError),
        (shutil.rmtree, StorageError),
    ],
)
@pytest.mark.parametrize("has_older", [False, True])
def test_a_damaged_champion_is_refused_and_leaves_what_was_there(
    store: Storage, champion: Champion, detector_folder: Path, tmp_path: Path, damage: Any, error: Any, has_older: bool
) -> None:
    damage(tmp_path / "store" / champion.folder)
    target = tmp_path / "out/tile"
    if has_older:
        shutil.copytree(detector_folder, target)
    with pytest.raises(error):
        download_detector(store, champion, target)
    assert [path.name for path in target.parent.glob("*")] == (["tile"] if has_older else [])
    assert not has_older or contents(target) == contents(detector_folder)


def test_a_download_replaces_an_older_detector_and_nothing_else(
    store: Storage, champion: Champion, detector_folder: Path, tmp_path: Path
) -> None:
    older = tmp_path / "out/tile"
    shutil.copytree(detector_folder, older)
    rewrite_record(older, dataclasses.replace(read_record(older), step=99))
    assert download_detector(store, champion, older).step != 99
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.png").write_text("precious")
    with pytest.raises(ValueError, match="photos"):
        download_detector(store, champion, tmp_path / "photos")
    assert (tmp_path / "photos/holiday.png").read_text() == "precious"


@pytest.mark.parametrize("folder", ["champions/../../etc", "/etc", "elsewhere/tile"])
def test_a_champion_that_points_elsewhere_is_refused(store: Storage, champion: Champion, folder: str) -> None:
    store.write_json("champions/tile.json", {**champion._asdict(), "folder": folder})
    with pytest.raises(StorageError, match="unsafe folder"):
        find_champion(store, "tile")


def test_a_champion_record_that_lacks_a_field_is_refused(store: Storage, champion: Champion) -> None:
    store.write_json("champions/tile.json", {"category": "tile"})
    with pytest.raises(StorageError, match=r"tile\.json lacks 'trial_id'"):
        find_champion(store, "tile")


def test_the_best_trial_so_far_can_be_pulled_before_the_search_ends(
    store: Storage, detector_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = Storage(f"{store.uri}/spring")
    assert find_best(search, "tile") is None
    for trial, objective, is_best in (("a", 0.5, True), ("b", 0.4, False), ("c", 0.7, True), ("d", 0.7, False)):
        place = f"tune/tile/{trial}/checkpoint_000001/detector"
        search.upload(detector_folder, place)
        assert note_best(search, "tile", trial, objective, f"{search.uri}/{place}") is is_best
    found = find_best(search, "tile")
    assert found is not None and found.trial_id == "c" and not found.is_final
    assert find_champion(search, "tile") is None and champion_categories(search) == ("tile",)
    pull(PullSettings(categories=("all",), out=tmp_path / "out", name="spring", storage=store.uri, json=True))
    shown = capsys.readouterr()
    document = json.loads(shown.out)["detectors"][0]
    assert (document["trial"], document["is_final"]) == ("c", False) and "best so far" in shown.err
    assert contents(tmp_path / "out/tile") == contents(detector_folder)

    search.upload(detector_folder, "champions/tile/c")
    final = Champion("tile", "c", "champions/tile/c", {"val/objective": 0.7}, "run")
    note_run(search, final)
    assert find_best(search, "tile") == final
    assert note_best(search, "tile", "e", 0.8, f"{search.uri}/tune/tile/a/checkpoint_000001/detector")
    later = find_best(search, "tile")
    assert later is not None and later.trial_id == "e"


def test_a_broken_download_is_gone_on_with(
    store: Storage, champion: Champion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out/tile"
    weights = tmp_path / "store" / champion.folder / WEIGHTS_FILE
    whole = weights.stat().st_size
    copy, copied = shutil.copyfileobj, []

    def breaking(source: Any, sink: Any, length: int = 0) -> None:
        if sink.name.endswith(WEIGHTS_FILE):
            sink.write(source.read(whole // 3))
            sink.flush()
            raise OSError("connection reset")
        copy(source, sink, length)

    def counting(source: Any, sink: Any, length: int = 0) -> None:
        before = sink.tell()
        copy(source, sink, length)
        if sink.name.endswith(WEIGHTS_FILE):
            copied.append(sink.tell() - before)

    monkeypatch.setattr(module, "RETRY_ATTEMPTS", 1)
    monkeypatch.setattr(shutil, "copyfileobj", breaking)
    with pytest.raises(StorageError, match="connection reset"):
        download_detector(store, champion, target)
    assert [path.name for path in target.parent.iterdir()] == [".tile.partial"], "nothing incomplete under its name"
    monkeypatch.setattr(shutil, "copyfileobj", counting)
    download_detector(store, champion, target)
    assert copied == [whole - whole // 3]
    assert [path.name for path in target.parent.iterdir()] == ["tile"] and read_record(target)

    stale = target.with_name(".tile.partial")
    stale.mkdir()
    (stale / WEIGHTS_FILE).write_bytes(b"part of another detector")
    (stale / "left over").mkdir()
    shutil.rmtree(target)
    download_detector(store, champion, target)
    assert read_record(target) and copied[1:] == [whole - len(b"part of another detector"), whole]


def test_only_what_makes_a_detector_is_fetched(store: Storage, champion: Champion, tmp_path: Path) -> None:
    source = tmp_path / "store" / champion.folder
    (source / "evil.pkl").write_bytes(b"\x80\x04.")
    (source / "deeper").mkdir()
    download_detector(store, champion, tmp_path / "out/tile")
    names = {path.name for path in (tmp_path / "out/tile").iterdir()}
    assert {RECORD_FILE, WEIGHTS_FILE} <= names <= {RECORD_FILE, WEIGHTS_FILE, PREVIEW_FILE}


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda folder: (folder / RECORD_FILE).write_text("[" * 100_000), "damaged"),
        (lambda folder: (folder / RECORD_FILE).write_bytes(b" " * (65 * 2**20)), "more than the"),
        (lambda folder: plant_weights(folder, struct.pack("<Q", 2**40) + b"{}"), "cannot be read"),
        (lambda folder: plant_weights(folder, pickle.dumps({"a": 1})), "cannot be read"),
    ],
    ids=["nested too deeply", "oversized record", "oversized header", "a pickle"],
)
def test_a_hostile_champion_is_refused_in_one_line(
    store: Storage, champion: Champion, tmp_path: Path, plant: Any, message: str
) -> None:
    plant(tmp_path / "store" / champion.folder)
    with pytest.raises((BrokenDetectorError, StorageError), match=message) as raised:
        download_detector(store, champion, tmp_path / "out/tile")
    assert "\n" not in str(raised.value) and list((tmp_path / "out").glob("*")) == []


def plant_weights(folder: Path, content: bytes) -> None:
    """Weights whose hash the record vouches for."""
    record = read_record(folder)
    (folder / WEIGHTS_FILE).write_bytes(content)
    rewrite_record(folder, record)


@pytest.mark.parametrize("name", ["..", ".", "../tile", "/etc", ""])
def test_a_category_that_leads_out_of_the_folder_is_refused(store: Storage, champion: Champion, name: str) -> None:
    with pytest.raises(ValueError, match="no name of a category"):
        find_best(store, name)


def test_two_pulls_to_one_folder_do_not_mix(store: Storage, champion: Champion, tmp_path: Path) -> None:
    def fetch(name: str, path: Path) -> None:
        with pytest.raises(OSError, match="another process is fetching"):
            download_detector(store, champion, tmp_path / "out/tile")
        store.resume(f"{champion.folder}/{name}", path)

    assert download_detector_files(fetch, store.names(champion.folder), tmp_path / "out/tile")


STRAYS: list[tuple[str, object, str]] = [
    ("champions/list.json", [1, 2], "no record of a champion but a list"),
    ("champions/text.json", "tile", "no record of a champion but a str"),
    ("champions/notes.json", {"note": "do not touch"}, "lacks 'category'"),
    ("champions/number.json", {"folder": 7}, "a field has a value of another kind"),
    ("champions/figures.json", {"metrics": ["val/objective"]}, "a field has a value of another kind"),
    ("champions/text-figures.json", {"metrics": {"val/objective": "0.5"}}, "a field has a value of another kind"),
    ("champions/other.json", {"category": "wood"}, "the record of another category, 'wood'"),
    ("champions/gone.json", {"folder": "champions/gone/x"}, "champions/gone/x is empty"),
    ("champions/broken.json", b"{", "is no JSON document"),
    ("champions/binary.json", b"\xff\xfe\x00", "is no JSON document"),
    ("champions/deep.json", b"[" * 100_000, "is no JSON document"),
    ("best-so-far/early.json", {"folder": None}, "a field has a value of another kind"),
]


def test_strays_and_broken_records_stop_no_pull_of_what_is_whole(
    store: Storage, champion: Champion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = Storage(f"{store.uri}/spring")
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    shutil.copytree(tmp_path / "copy", tmp_path / "store/spring", dirs_exist_ok=True)
    for name, content, _ in STRAYS:
        category = Path(name).stem
        whole = {**champion._asdict(), "category": category}
        if isinstance(content, dict) and "note" not in content:
            content = {**whole, **content}
        if isinstance(content, bytes):
            (tmp_path / "store/spring" / name).write_bytes(content)
        else:
            search.write_json(name, content)  # type: ignore[arg-type]
    (tmp_path / "store/spring/champions/README.txt").write_text("no record")
    (tmp_path / "store/spring/champions/.json").write_text("{}")
    (tmp_path / "store/spring/champions/folder.json").mkdir()
    asked = PullSettings(categories=("all",), out=tmp_path / "out", name="spring", storage=store.uri, json=True)
    assert pull(asked) == 1
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert [each["category"] for each in document["detectors"]] == ["tile"], said.err
    assert read_record(tmp_path / "out/tile") and [path.name for path in (tmp_path / "out").iterdir()] == ["tile"]
    assert set(document["faults"]) == {Path(name).stem for name, _, _ in STRAYS} | {"folder"}
    for name, _, reason in STRAYS:
        assert reason in document["faults"][Path(name).stem], name
        assert sum(line.startswith(f"{Path(name).stem}: not pulled: ") for line in said.err.splitlines()) == 1
    assert "Traceback" not in said.err


@pytest.mark.parametrize("given", ["AWS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_one_variable_for_an_own_authority_holds_for_every_client(
    given: str, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"AWS_CA_BUNDLE": "SSL_CERT_FILE", "SSL_CERT_FILE": "AWS_CA_BUNDLE"}[given]
    monkeypatch.setenv(other, "")
    monkeypatch.setenv(given, "/etc/own.pem")
    Storage(store.uri)
    assert os.environ[other] == os.environ[given] == "/etc/own.pem"
    monkeypatch.setenv(other, "/etc/other.pem")
    Storage(store.uri)
    assert (os.environ[given], os.environ[other]) == ("/etc/own.pem", "/etc/other.pem"), "what is set stays"


class _OneObject(BaseHTTPRequestHandler):
    """The requests of S3 for one object, which is always there."""

    content = b'{"x": 1}'
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.send_header("ETag", '"1"')
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content)

    def do_PUT(self) -> None:
        type(self).content = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class _Conditional(_OneObject):
    """Keeps to If-Match, with the quotes that HTTP asks for, or knows no conditions."""

    knows_conditions = True
    tag = 1
    others: ClassVar[list[bytes]] = []
    """What another process writes just before each of the next writes."""

    def do_HEAD(self) -> None:
        self.answer(200, len(self.content))

    def do_PUT(self) -> None:
        kind, condition = type(self), self.headers.get("If-Match")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.others:
            kind.content, kind.tag = self.others.pop(), kind.tag + 1
        if condition and not self.knows_conditions:
            self.answer(501, 0)
        elif condition and condition != f'"{self.tag}"':
            self.answer(412, 0)
        else:
            kind.content, kind.tag = content, kind.tag + 1
            self.answer(200, 0)

    def answer(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("ETag", f'"{self.tag}"')
        self.send_header("Content-Length", str(length))
        self.end_headers()


@pytest.mark.parametrize(("knows_conditions", "found"), [(True, 11), (False, 2)])
def test_an_object_is_written_only_over_what_was_read_where_the_server_can(
    knows_conditions: bool, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Conditional, "knows_conditions", knows_conditions)
    monkeypatch.setattr(_Conditional, "content", b'{"x": 1}')
    monkeypatch.setattr(_Conditional, "others", [b'{"x": 10}'])
    with ThreadingHTTPServer(("127.0.0.1", 0), _Conditional) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}
        for name, value in (own | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}).items():
            monkeypatch.setenv(name, value)
        Storage("s3://b/home").replace_json("a.json", lambda known: {"x": known["x"] + 1 if known else 0})
        server.shutdown()
    assert json.loads(_Conditional.content) == {"x": found}


def own_authority(folder: Path) -> tuple[Path, Path]:
    """Certificate and key of 127.0.0.1, which nobody else vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "own")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    (folder / "own.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "own.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "own.pem", folder / "own.key"


def test_a_server_that_takes_a_document_or_a_folder_and_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickled after its first request, too: what asks a server stays behind."""
    monkeypatch.setattr(module, "_ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        store = Storage("s3://bucket/searches").tried_once()
        for each in (store, pickle.loads(pickle.dumps(store))):
            with pytest.raises(StorageError, match=r"writing a\.json at .* failed 1 times: Read timeout"):
                each.write_json("a.json", {"a": 1})
        for size in (9, 9 << 20):  # in one request, and in parts
            (tmp_path / "state").write_bytes(bytes(size))
            with pytest.raises(StorageError, match=r"uploading one at .* failed 1 times: Read timeout"):
                store.upload(tmp_path, "one")


@pytest.mark.slow
def test_a_server_with_a_certificate_of_an_own_authority_is_reached_by_every_client(tmp_path: Path) -> None:
    """By pyarrow, which reads here, and by boto3, which also writes; with either variable."""
    certificate, key = own_authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), _OneObject) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}
        own["AWS_ENDPOINT_URL"] = f"https://127.0.0.1:{server.server_port}"
        script = (
            "from tune.storage import files; files.RETRY_ATTEMPTS = 1; store = files.Storage('s3://b/home')\n"
            "assert store.read_json('a.json')['x'] >= 1\n"
            "store.replace_json('a.json', lambda known: {'x': known['x'] + 1})"
        )
        root = Path(__file__).resolve().parents[1]
        clean = {name: value for name, value in os.environ.items() if name not in ("AWS_CA_BUNDLE", "SSL_CERT_FILE")}
        asked = [
            subprocess.Popen(
                [sys.executable, "-c", script], env=clean | own | more, cwd=root, stderr=subprocess.PIPE, text=True
            )
            for more in ({"AWS_CA_BUNDLE": str(certificate)}, {"SSL_CERT_FILE": str(certificate)})
        ]
        said = [each.communicate(timeout=60)[1] for each in asked]
        server.shutdown()
    assert [each.returncode for each in asked] == [0, 0], said
    assert _OneObject.content in (b'{\n  "x": 2\n}\n', b'{\n  "x": 3\n}\n')


def rights(bucket: str, user: str, *, condition: object = None, listing: bool = True) -> str:
    """The policy of cluster/s3-policy.json, given to one user of a bucket, or less."""
    document = json.loads((Path(__file__).parents[1] / "cluster/s3-policy.json").read_text())
    statements = document["Statement"] if listing else document["Statement"][1:]
    for statement in statements:
        statement["Principal"] = {"AWS": [f"arn:aws:iam:::user/{user}"]}
        if condition and statement["Sid"] == "ListTheBucket":
            statement["Condition"] = condition
    return json.dumps(document | {"Statement": statements}).replace("DSKD_BUCKET", bucket)


@pytest.mark.services
def test_the_least_policy_is_enough_and_the_probe_finds_what_is_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user of Ceph's who has the rights of cluster/s3-policy.json alone."""
    if reason := services.s3_unavailable():
        pytest.skip(reason)
    import boto3

    with tempfile.TemporaryDirectory(prefix="s3-") as short, services.s3(Path(short)) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        owner = boto3.client("s3")
        words = ["user", "create", "--uid=least", "--display-name=least"]
        made = subprocess.run(
            ["radosgw-admin", "-c", f"{short}/s3/ceph.conf", "-n", "client.admin", *words],
            capture_output=True, check=True, text=True,
        )  # fmt: skip
        (key,) = json.loads(made.stdout)["keys"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["access_key"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["secret_key"])
        home = f"s3://{server.bucket}/searches/parts"

        owner.put_bucket_policy(Bucket=server.bucket, Policy=rights(server.bucket, "least"))
        storage = Storage(home)
        storage.probe()
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep/a").write_text("a")
        storage.upload(tmp_path, "workers/one")
        assert storage.names("workers/one") == ["deep"] and storage.read_json("none.json") is None
        storage.remove("workers/one")
        storage.remove("workers/none")
        writers = iter([{"by": "another"}, {"by": "another once more"}])

        def overtaken(known: dict[str, Any] | None) -> dict[str, Any]:
            """What is found, before which another process writes twice: where nothing is, and over what is there."""
            if (theirs := next(writers, None)) is not None:
                Storage(home).write_json("a.json", theirs)
            return {"found": known}

        storage.replace_json("a.json", overtaken)
        assert storage.read_json("a.json") == {"found": {"by": "another once more"}}
        writers = iter([{"by": "x"}])
        with pytest.raises(StorageError, match="another process has written it meanwhile"):
            storage.tried_once().replace_json("a.json", overtaken)
        assert storage.read_json("a.json") == {"by": "x"}
        storage.remove_file("a.json")
        assert storage.files("workers") == []

        prefixed = {"StringLike": {"s3:prefix": ["searches/*", "data/*"]}}
        for less in (rights(server.bucket, "least", condition=prefixed), rights(server.bucket, "least", listing=False)):
            owner.put_bucket_policy(Bucket=server.bucket, Policy=less)
            with pytest.raises(StorageError, match=r"is not usable: .*ACCESS_DENIED.*s3-policy\.json") as refused:
                Storage(home).probe()
            assert "\n" not in str(refused.value)
        owner.put_bucket_policy(Bucket=server.bucket, Policy=rights(server.bucket, "least", condition=prefixed))
        assert Storage(home).read_json("none.json") is None, "forbidden means missing where one may not look"
        with pytest.raises(StorageError, match="is not usable"):
            Storage("s3://no-such-bucket/searches").probe()
        assert [bucket["Name"] for bucket in owner.list_buckets()["Buckets"]] == [server.bucket]
