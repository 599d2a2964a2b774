import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tune.storage import lease as module
from tune.storage.files import Storage
from tune.storage.lease import LeaseLostError, only_search


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(module, "_RENEW_SECONDS", 0.05)
    monkeypatch.setattr(module, "_SETTLE_SECONDS", 0.0)
    return Storage(str(tmp_path / "spring"))


def unexpected(reason: str) -> None:
    raise AssertionError(reason)


def test_a_second_search_of_a_name_is_refused_and_a_later_one_is_not(store: Storage) -> None:
    with only_search(store, "spring", unexpected):
        with pytest.raises(ValueError, match=r"a search .spring. runs already, as process .*another --name"):
            only_search(store, "spring", unexpected).__enter__()
        time.sleep(0.2)
        held = store.read_json("lease.json")
        assert held is not None and held["renewals"] > 0
    with only_search(store, "spring", unexpected):
        pass


def test_the_lease_of_a_killed_search_on_this_machine_is_taken_at_once(
    store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import os, sys; from tune.storage import lease; from tune.storage.files import Storage\n"
        "lease._SETTLE_SECONDS = 0.0\n"
        "with lease.only_search(Storage(sys.argv[1]), 'spring', print): os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).resolve().parents[1]
    killed = subprocess.run([sys.executable, "-c", script, store.uri], cwd=root, check=False)
    assert killed.returncode == -9
    left = store.read_json("lease.json")
    assert left is not None and left["owner"]
    monkeypatch.setattr(module, "_RENEW_SECONDS", 3600.0)  # it must not watch for renewals
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with only_search(store, "spring", unexpected):
        assert slept == [0.0]


def elsewhere(renewals: int) -> dict[str, object]:
    return {"owner": "a1", "machine": "node-7 b00t", "process": "12 345", "renewals": renewals}


def test_the_lease_of_another_machine_is_taken_when_nobody_renews_it(store: Storage) -> None:
    store.write_json("lease.json", elsewhere(3))
    with only_search(store, "spring", unexpected):
        held = store.read_json("lease.json")
        assert held is not None and held["owner"] != "a1"


def test_of_two_that_waited_for_a_lease_one_takes_it(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_json("lease.json", elsewhere(3))
    replace, other = store.replace_json, elsewhere(0) | {"owner": "b2", "machine": "node-8 b00t"}

    def overtaken(*arguments: Any) -> None:
        store.write_json("lease.json", other)
        replace(*arguments)

    monkeypatch.setattr(store, "replace_json", overtaken)
    with pytest.raises(ValueError, match="on node-8; wait for it"):
        only_search(store, "spring", unexpected).__enter__()
    assert store.read_json("lease.json") == other


def test_the_lease_of_another_machine_is_respected_while_it_is_renewed(store: Storage) -> None:
    store.write_json("lease.json", elsewhere(3))
    threading.Timer(0.12, store.write_json, ("lease.json", elsewhere(4))).start()
    with pytest.raises(ValueError, match="on node-7; wait for it"):
        only_search(store, "spring", unexpected).__enter__()
    assert store.read_json("lease.json") == elsewhere(4)


def test_a_live_search_in_another_container_of_this_host_is_not_taken_for_a_dead_one(
    store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the same host name and boot id; its process's id says nothing here, where that process is not seen."""
    with only_search(store, "spring", unexpected):
        held = store.read_json("lease.json")
    assert held is not None
    held |= {"owner": "theirs", "process": "999999999 1"}
    for theirs, is_taken in ((held["namespace"], True), ("pid:[1]", False)):
        store.write_json("lease.json", held | {"namespace": theirs})
        waited: list[float] = []

        def renewed(seconds: float, waited: list[float] = waited, theirs: str = theirs) -> None:
            waited.append(seconds)
            store.write_json("lease.json", held | {"namespace": theirs, "renewals": 7})

        monkeypatch.setattr(time, "sleep", renewed if not is_taken else lambda seconds: None)
        if is_taken:
            with only_search(store, "spring", unexpected):
                pass
        else:
            with pytest.raises(ValueError, match="runs already"):
                only_search(store, "spring", unexpected).__enter__()
            assert len(waited) == 1


def test_each_taking_has_the_next_generation(store: Storage) -> None:
    generations = []
    for _ in range(3):
        with only_search(store, "spring", unexpected) as lease:
            generations.append(lease.generation)
    assert generations == [1, 2, 3]


def test_a_lease_that_cannot_be_renewed_is_not_sure_any_more_before_another_may_take_it(
    store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(module, "_clock", lambda: clock[0])
    monkeypatch.setattr(module, "_RENEW_SECONDS", 3600.0)
    with only_search(store, "spring", unexpected) as lease:
        assert lease.is_sure()
        clock[0] += module._MAX_MISSED_RENEWALS * 5.0 - 5.0
        assert not lease.is_sure()
        monkeypatch.setattr(module, "_RENEW_SECONDS", 0.05)
    assert not lease.is_sure(), "given back"


def test_a_search_whose_lease_was_taken_over_ends_and_leaves_it(store: Storage) -> None:
    reasons: list[str] = []
    with only_search(store, "spring", reasons.append):
        store.write_json("lease.json", elsewhere(1))
        deadline = time.monotonic() + 30
        while not reasons and time.monotonic() < deadline:
            time.sleep(0.01)
    assert reasons == ["another search has taken 'spring' over; this one ends"]
    assert store.read_json("lease.json") == elsewhere(1)


def test_the_lease_is_read_before_what_only_its_owner_may_write(
    store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RENEW_SECONDS", 3600.0)
    monkeypatch.setattr(module, "_LOSS_SECONDS", 0.0)
    with only_search(store, "spring", unexpected) as lease:
        lease.check()
        store.write_json("lease.json", elsewhere(1))
        with pytest.raises(LeaseLostError):
            lease.check()
        monkeypatch.setattr(module, "_RENEW_SECONDS", 0.05)
