"""How a search ends before its time: on Ctrl-C or SIGTERM, without its cluster, or because another has its lease.

The main thread, which may wait for anything, takes no part in it: the process is ended from here. What a kill would
leave to the next start is done at once: the runs in MLflow are closed and the lease is given back, within 3 s, as
`ray job stop` by default kills after that. Then there is time for the groups to store their trials.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tune.runtime.stopping import exit_code
from tune.storage.lease import Lease
from tune.study.progress import SearchProgress
from tune.trial.groups import Groups

if TYPE_CHECKING:  # a slow import
    from tune.tracking.tracker import Tracker

STOPPED = "stopped; the same command continues"
"""Why a run was closed, in MLflow."""
LEASE_LOST = 1
"""Exit code of a search whose lease another took."""
CLUSTER_LOST = 1
"""That of a search whose Ray cluster is gone."""
_SECONDS = 9.0
"""Seconds from the signal to the end of the process, whatever does not answer."""
_FIRST_SECONDS = 1.0
"""Seconds that the groups have before the runs in MLflow are closed, for reports on their way."""
_LEASE_SECONDS = 2.5
"""Seconds from the signal after which the lease is given back, although groups are still storing."""


class EarlyEnd:
    """Ends the process of a search; knows of its parts as far as it has begun them."""

    def __init__(self, progress: SearchProgress, end: Callable[[int], object] = os._exit) -> None:
        self._progress, self._end = progress, end
        self._one = threading.Lock()
        self.lease: Lease | None = None
        self.groups: Groups | None = None
        self.tracker: Tracker | None = None
        self.unsent = ""
        """File of the events that MLflow has not taken."""

    def stop(self, number: signal.Signals) -> None:
        """End on a signal: what is running is stored, its runs are closed, and the lease is given back."""
        began = time.monotonic()
        self._begin(exit_code(number), f"{number.name}: stopping, and storing what is running")
        saving = _Beside(self._save)
        saving.wait(_FIRST_SECONDS)
        closing = _Beside(self._close_runs)
        closing.wait(began + _LEASE_SECONDS - time.monotonic())
        saving.wait(began + _LEASE_SECONDS - time.monotonic())
        leaving = _Beside(self._give_back)
        for each in (leaving, saving, closing):
            each.wait(began + _SECONDS - 0.5 - time.monotonic())
        num_unsent = closing.result
        kept = f"; MLflow does not answer, the rest is in {self.unsent}" if num_unsent else ""
        lost = "; what a trial did since its last checkpoint is done again" if saving.result else ""
        self._progress.say_last(f"{STOPPED}{lost}{kept}")
        self._end(exit_code(number))

    def lose(self, reason: str) -> None:
        """End because another search has taken the lease: it writes from now on, and this one nothing more."""
        self._begin(LEASE_LOST, reason)
        if self.tracker is not None:
            self.tracker.abandon()
        # What it stores meanwhile lies in this generation's folder. The groups must not train on.
        _Beside(self._save).wait(_SECONDS - 1)
        self._progress.say_last("ended; the other search goes on with its trials")
        self._end(LEASE_LOST)

    def lose_cluster(self, reason: str) -> None:
        """End because the Ray cluster or a part of it that the driver needs is gone: what is stored has to do."""
        began = time.monotonic()
        self._begin(CLUSTER_LOST, reason)
        closing, leaving = _Beside(self._close_runs), _Beside(self._give_back)
        for each in (closing, leaving):
            each.wait(began + _SECONDS - 0.5 - time.monotonic())
        kept = f"; MLflow does not answer, the rest is in {self.unsent}" if closing.result else ""
        self._progress.say_last(f"ended; once the cluster is there again, the same command continues{kept}")
        self._end(CLUSTER_LOST)

    def wait_if_ending(self) -> None:
        """Called before the process ends by itself: never returns if it is being ended here."""
        if not self._one.acquire(blocking=False):
            threading.Event().wait()

    def _begin(self, code: int, line: str) -> None:
        self.wait_if_ending()
        timer = threading.Timer(_SECONDS, self._end, (code,))
        timer.daemon = True
        timer.start()
        logging.disable(logging.CRITICAL)  # what others say of processes that end now is of no use
        self._progress.say_last(line)

    def _save(self) -> int:
        return self.groups.stop(_SECONDS - 1.5) if self.groups is not None else 0

    def _close_runs(self) -> int:
        if self.tracker is None:
            return 0
        return self.tracker.stop(self._progress.running(), STOPPED, _SECONDS - _FIRST_SECONDS - 1.0)

    def _give_back(self) -> int:
        if self.lease is not None:
            self.lease.give_back()
        return 0


class _Beside:
    """A function in a thread that nobody waits for longer than is good."""

    def __init__(self, act: Callable[[], int]) -> None:
        self.result = 1
        """What it returned; 1 if it failed or has not ended."""
        self._act = act
        self._thread = threading.Thread(target=self._run, name="stop", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        self._thread.join(max(0.0, seconds))

    def _run(self) -> None:
        try:
            self.result = self._act()
        except Exception as error:  # of a cluster or a storage that is gone, which the next start deals with
            logging.getLogger(__name__).debug("%s", error)
