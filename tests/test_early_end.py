"""How a search ends before its time, without Ray: what is closed, in which order, and what nobody waits for."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from tune.jobs import stop as module
from tune.jobs.stop import CLUSTER_LOST, LEASE_LOST, STOPPED, EarlyEnd
from tune.runtime.stopping import signals_told_to
from tune.storage.files import created_by_one
from tune.study.progress import SearchProgress
from tune.tracking.events import TrialStarted

ROOT = Path(__file__).resolve().parents[1]


class Ended:
    """A search that is about to end, and what is done to its parts."""

    def __init__(self, folder: Path, **hanging: bool) -> None:
        """`hanging`: names of parts that do not answer."""
        self.done: list[str] = []
        self.codes: list[int] = []
        self._hanging = hanging
        self._forever = threading.Event()
        self.file = (folder / "said").open("w+")
        self.progress = SearchProgress(3, console=Console(file=self.file))
        self.progress.show(TrialStarted("tile", "a", {}))
        self.early = EarlyEnd(self.progress, self.codes.append)
        self.early.groups = cast(Any, SimpleNamespace(stop=lambda seconds: self._part("groups", 0)))
        self.early.lease = cast(Any, SimpleNamespace(give_back=lambda: self._part("lease", 0)))
        self.early.tracker = cast(
            Any,
            SimpleNamespace(
                stop=lambda running, reason, seconds: self._part(f"runs {dict(running)} {reason}", 0),
                abandon=lambda: self._part("abandoned", 0),
            ),
        )
        self.early.unsent = "unsent.jsonl"

    def _part(self, name: str, answer: int) -> int:
        if self._hanging.get(name.split()[0]):
            self._forever.wait()
        self.done.append(name)
        return answer

    def said(self) -> list[str]:
        self.file.seek(0)
        return [line.partition("] ")[2] for line in self.file.read().splitlines()]

    def close(self) -> None:
        self._forever.set()
        self.file.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_SECONDS", 0.6)
    monkeypatch.setattr(module, "_FIRST_SECONDS", 0.05)
    monkeypatch.setattr(module, "_LEASE_SECONDS", 0.1)
    yield
    logging.disable(logging.NOTSET)


def test_a_stop_stores_closes_gives_back_and_says_two_lines(tmp_path: Path) -> None:
    ended = Ended(tmp_path)
    ended.early.stop(signal.SIGTERM)
    ended.progress.say("what another thread says of it")
    assert ended.done == ["groups", f"runs {{'tile': ['a']}} {STOPPED}", "lease"]
    assert ended.codes[0] == 143
    assert ended.said() == ["SIGTERM: stopping, and storing what is running", STOPPED]
    ended.close()


@pytest.mark.parametrize("part", ["groups", "runs", "lease"])
def test_nothing_that_does_not_answer_is_waited_for(part: str, tmp_path: Path) -> None:
    ended = Ended(tmp_path, **{part: True})
    ended.early.stop(signal.SIGINT)
    assert ended.codes[0] == 130
    others = {"groups", "runs", "lease"} - {part}
    assert {name.split()[0] for name in ended.done} == others, "the others are done all the same"
    said = ended.said()[1]
    assert ("the rest is in unsent.jsonl" in said) is (part == "runs")
    assert ("since its last checkpoint is done again" in said) is (part == "groups")
    ended.close()


def test_a_search_that_has_lost_its_lease_writes_nothing_and_leaves_the_lease(tmp_path: Path) -> None:
    ended = Ended(tmp_path)
    ended.early.lose("another search has taken 'spring' over; this one ends")
    assert ended.done == ["abandoned", "groups"] and ended.codes[0] == LEASE_LOST
    assert ended.said() == [
        "another search has taken 'spring' over; this one ends", "ended; the other search goes on with its trials",
    ]  # fmt: skip
    ended.close()


def test_a_search_without_its_cluster_closes_its_runs_and_gives_the_lease_back(tmp_path: Path) -> None:
    ended = Ended(tmp_path)
    ended.early.lose_cluster("the Ray cluster is gone")
    assert set(ended.done) == {f"runs {{'tile': ['a']}} {STOPPED}", "lease"} and ended.codes[0] == CLUSTER_LOST
    assert ended.said() == [
        "the Ray cluster is gone", "ended; once the cluster is there again, the same command continues",
    ]  # fmt: skip
    ended.close()


def test_a_search_that_has_begun_nothing_ends_at_once(tmp_path: Path) -> None:
    ended = Ended(tmp_path)
    ended.early.groups = ended.early.lease = ended.early.tracker = None
    ended.early.stop(signal.SIGTERM)
    assert ended.codes[0] == 143 and ended.said()[-1] == STOPPED
    ended.close()


def test_the_first_signal_stops_in_a_thread_and_the_second_ends_the_process(tmp_path: Path) -> None:
    """The main thread waits in a lock, as in a thread pool's end."""
    script = (
        "import signal, sys, threading\n"
        "from tune.runtime.stopping import signals_told_to\n"
        "def stop(number):\n"
        "    print(number.name, threading.current_thread().name, flush=True)\n"
        "    if len(sys.argv) > 1: threading.Event().wait()\n"
        "    held.release()\n"
        "held = threading.Lock(); held.acquire()\n"
        "with signals_told_to(stop):\n"
        "    print('ready', flush=True); held.acquire()\n"
    )
    for more, code in (([], 0), (["hang"], 143)):
        child = subprocess.Popen(
            [sys.executable, "-c", script, *more], stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == "SIGTERM stop\n"
        if more:
            child.send_signal(signal.SIGTERM)
        assert child.wait(30) == code
        child.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="C's handlers are kept on Linux only")
def test_a_library_that_installs_a_handler_in_c_as_it_starts_does_not_keep_it() -> None:
    script = (
        "import ctypes, os, signal, sys, time\n"
        "from tune.runtime.stopping import same_handlers\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "with same_handlers():\n"
        "    time.sleep(0.1); ctypes.CDLL(None).signal(15, None); time.sleep(0.2)\n"  # None: the system's own
        "    os.kill(os.getpid(), 15); time.sleep(10)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert child.returncode == 7


def test_handlers_are_as_before_afterwards_and_other_threads_leave_them_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals_told_to(lambda number: None):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before

    def inside() -> None:
        with signals_told_to(lambda number: None):
            seen.append(signal.getsignal(signal.SIGTERM))

    seen: list[Any] = []
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_process_that_ends_while_it_makes_a_database_leaves_none(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"

    def make(*, to_the_end: bool) -> None:
        with created_by_one(url) as place:
            path = Path(place.removeprefix("sqlite:///"))
            assert not path.exists(), "what a killed process had begun is thrown away"
            path.write_bytes(b"")
            if not to_the_end:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(to_the_end=False)
    assert not (tmp_path / "a.db").exists()
    make(to_the_end=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.db"]
    with created_by_one(url) as place:
        assert place == url
